//! OCI containers inside the guest. Knows neither gRPC nor vsock.
//!
//! - [`Runtime`]: the containers and what can be done with them.
//! - [`init`]: the single-threaded helper that becomes a container's process.
//! - [`cgroup`]: control groups: limits, device rules, statistics, freezing and killing.
//! - [`seccomp`]: compiles the specification's filter to classic BPF.
//! - [`validate`]: refuses what is not honoured, by name.
//!
//! What is refused, and why: AppArmor and SELinux labels (the guest's kernel has neither; whoever passes a host's
//! specification on removes what only made sense there), all hooks but `startContainer` (their programs are the host's),
//! a mount namespace to be joined, seccomp user notification, Intel RDT, network devices, memory policies, classic network
//! control groups.
//!
//! Whatever its specification says, a container has no vsock sockets and no io_uring(7), which could make them: see
//! [`seccomp::vsock_guard`].

pub mod cgroup;
mod error;
pub mod init;
mod process;
mod runtime;
pub mod seccomp;
pub(crate) mod sys;
pub mod validate;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::SystemTime;

pub use error::Error;
pub use runtime::Runtime;

use crate::oci;
use crate::reaper::ExitStatus;

/// Where the runtime works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The control group under which each container gets one: an absolute path in a mounted cgroup v2 hierarchy.
    pub cgroup: PathBuf,
    /// The program to be executed as helper, whose `main` calls [`init::run_if_helper`] first. Normally
    /// `/proc/self/exe`.
    pub helper: PathBuf,
}

/// A process's standard streams; what is absent is `/dev/null`. Ignored for a process with a terminal.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Read end.
    pub stdin: Option<OwnedFd>,
    /// Write end.
    pub stdout: Option<OwnedFd>,
    /// Write end.
    pub stderr: Option<OwnedFd>,
}

/// What a container is made of.
#[derive(Debug)]
pub struct CreateRequest {
    /// Unique; `[A-Za-z0-9_.-]{1,128}`, not "." or "..".
    pub id: String,
    /// Its configuration. `root.path` is replaced by [`CreateRequest::rootfs`] if that is set.
    pub spec: oci::Document<oci::Spec>,
    /// Directory of the root file system, absolute.
    pub rootfs: Option<PathBuf>,
    /// The first process's streams.
    pub stdio: Stdio,
}

/// A process to be run in a container.
#[derive(Debug)]
pub struct ExecRequest {
    /// The container.
    pub container: String,
    /// Unique in its container; the same alphabet as a container's id.
    pub id: String,
    /// The process. Its absent capabilities mean none, as for a container.
    pub process: oci::Document<oci::Process>,
    /// Its streams.
    pub stdio: Stdio,
}

/// A process that was made.
#[derive(Debug)]
pub struct Created {
    /// In the agent's PID namespace.
    pub pid: u32,
    /// The master side of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// State of a container or of a process in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its process waits to be started.
    Created,
    /// Its process runs.
    Running,
    /// Frozen.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
        })
    }
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// How.
    pub status: ExitStatus,
    /// When it was collected.
    pub at: SystemTime,
}

/// What happens to containers by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process ended. An out-of-memory kill that ended it was reported before.
    Exit {
        /// The container's id.
        container: String,
        /// The exec's id, empty for the init process.
        process: String,
        /// In the agent's PID namespace.
        pid: u32,
        /// How.
        exit: Exit,
    },
    /// The kernel killed for lack of memory.
    Oom {
        /// The container's id.
        container: String,
        /// How many processes so far (`oom_kill` of memory.events).
        kills: u64,
    },
}

/// What a listing says of a container.
#[derive(Clone, Debug)]
pub struct Info {
    /// Its id.
    pub id: String,
    /// Its state.
    pub state: State,
    /// Its init process in the agent's PID namespace.
    pub pid: u32,
    /// Ids of its execs, also of ended ones that were not removed.
    pub execs: Vec<String>,
    /// Set when stopped.
    pub exit: Option<Exit>,
    /// The specification's annotations.
    pub annotations: BTreeMap<String, String>,
}

/// A process of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// In the agent's PID namespace.
    pub pid: u32,
    /// The exec's id, empty for the init process, absent for their descendants.
    pub exec: Option<String>,
}
