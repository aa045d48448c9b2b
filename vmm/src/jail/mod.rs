//! The jail: what is left to a process whose guest has broken out of its virtual machine.
//!
//! The process first opens everything it will ever need, then [enters](Jail::enter), and only then builds the
//! machine and runs guest code. From the entry on it has: the descriptors that it was told to keep, and
//! nothing else. In particular no view of the host's files, processes, network or IPC, no capability, no way
//! to gain one, and an identity that it shares with nobody. Seccomp ([`crate::seccomp`]) comes on top, thread
//! by thread.
//!
//! | module | owns |
//! |---|---|
//! | `parent` | the process that stays outside, and passes the inner one's end on |
//! | `filesystem` | the new root |
//! | `privileges` | identity, capabilities, limits, Landlock |
//! | `descriptors` | closing what was not handed over |
//!
//! # Two processes
//! A PID namespace needs a fork: only children are inside. The process that was started stays outside as the
//! *parent*. It holds no descriptor and no privilege either; all it does is wait. The inner process, PID
//! 1 of its namespace, is the VMM.
//!
//! - The inner one ends: the parent ends the same way, with the same exit code or by the same signal, so
//!   whoever started it sees what happened.
//! - The parent is asked to end (SIGTERM, SIGINT, SIGHUP): it kills the inner one, and then ends by that
//!   signal.
//! - The parent ends for any other reason (SIGKILL, the OOM killer): the kernel kills the inner one
//!   (`PR_SET_PDEATHSIG`), and with it, as it is PID 1, everything in the namespace.
//!
//! The virtual machine has to be made inside, as KVM ties it to the memory of the process that made it; so
//! has guest memory, which a fork would have to copy on write.
//!
//! # As root and as somebody else
//! Real root makes the namespaces while it is root of the host, so that they belong to the host: nobody
//! inside has a say in them. Then it takes a user namespace of its own in which only the VM's own ids exist,
//! and becomes one of them. Anybody else takes the user namespace first, because that is what allows the
//! others; whether the host permits that is up to its administrator.

mod descriptors;
mod filesystem;
mod parent;
mod privileges;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    io::Write,
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::OnceLock,
};

use caisson_vmm_api::jail::{JailConfig, SeccompMode};
use caps::{CapSet, Capability};
pub use descriptors::{Inherited, own_descriptors};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::{ForkResult, Gid, Uid, fork, setsid},
};
pub use parent::Ended;
pub use privileges::{LandlockStatus, drop_thread_capabilities, raise_share_capabilities};

use crate::seccomp;

/// Why the jail could not be entered. The process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Threads keep their own credentials and view of files, so there may be only one.
    #[error("the process has {0} threads; the jail has to be entered with one")]
    Threads(usize),
    /// The configuration asks for what only root can do.
    #[error("jail.{0} needs root's privileges")]
    NeedsRoot(&'static str),
    /// Ids that do not exist, or that are root's.
    #[error(
        "jail.{what}: {count} ids from {first} on are not a valid range (the host's root may not be in it)"
    )]
    Ids {
        /// `uid` or `gid`.
        what: &'static str,
        /// The first of them.
        first: u32,
        /// How many.
        count: u32,
    },
    /// A directory or file that the configuration names, or that the kernel offers.
    #[error("{}", path.display())]
    Path {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// A step that the kernel refused.
    #[error("{doing}")]
    Step {
        /// Which one.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A set of capabilities could not be emptied.
    #[error("dropping capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// Landlock is there but refused the rules.
    #[error("setting up Landlock")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A filter could not be installed.
    #[error("filtering system calls")]
    Seccomp(#[source] seccomp::SeccompError),
    /// The other one of the two processes died during the entry.
    #[error("the process on the other side of the jail is gone")]
    OtherSideGone,
}

/// Names the step that an error happened in.
fn step<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError::Step { doing, source: error.into() }
}

/// Where [`Jail::enter`] returned.
#[derive(Debug)]
pub enum Side {
    /// In the jail.
    Inside(Inside),
    /// In the parent, after the inner process has ended.
    Outside(Ended),
}

/// What the jail turned out to be.
#[derive(Debug)]
pub struct Inside {
    /// How much of the Landlock rules this kernel enforces.
    pub landlock: LandlockStatus,
    /// Whether threads that serve the share can get at its capabilities ([`raise_share_capabilities`]).
    pub share_capabilities: bool,
    /// The share, if the jail has one.
    pub share: Option<Share>,
}

/// The share as it is reached from inside, and what its threads need.
#[derive(Debug)]
pub struct Share {
    /// The directory.
    pub root: OwnedFd,
    /// The process's own `/proc/self/fd`, which no path leads to any more.
    pub descriptors: OwnedFd,
}

/// What threads do to themselves, once the process is jailed.
#[derive(Clone, Copy, Debug)]
struct Confinement {
    seccomp: SeccompMode,
    share_capabilities: bool,
}

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// The last step, taken by each thread for itself before it runs anything that a guest has a hand in: gives
/// up the capabilities for the share, or takes them if it serves it, and installs the filter for its kind. In
/// a process that is not jailed it does nothing.
///
/// # Errors
/// When the kernel refuses. The thread must not go on.
pub fn confine_thread(thread: seccomp::Thread) -> Result<(), JailError> {
    let Some(confinement) = CONFINEMENT.get() else { return Ok(()) };
    if confinement.share_capabilities {
        match thread {
            seccomp::Thread::Fs => raise_share_capabilities()?,
            _ => drop_thread_capabilities()?,
        }
    }
    seccomp::apply(thread, confinement.seccomp).map_err(JailError::Seccomp)
}

/// [`confine_thread`] for the start of a thread that has nobody to tell: when it fails, the process ends.
pub fn confine_thread_or_abort(thread: seccomp::Thread) {
    if let Err(error) = confine_thread(thread) {
        tracing::error!(?thread, %error, "cannot confine the thread");
        std::process::abort();
    }
}

/// A jail to be entered.
#[derive(Debug)]
pub struct Jail {
    config: JailConfig,
    keep: Vec<RawFd>,
    ids: Option<Ids>,
    remove: Vec<PathBuf>,
}

/// The host ids of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ids {
    uid: u32,
    gid: u32,
    count: u32,
}

/// From here on up there are ids for VMMs that were given none: beyond what distributions and container
/// runtimes hand out, and below 2^32 for any process id.
const DEFAULT_ID_BASE: u32 = 0x7800_0000;

impl Jail {
    /// Checks the configuration. Besides standard input, output and error, the descriptors in `keep` survive
    /// the entry, and no others.
    ///
    /// # Errors
    /// When the configuration makes no sense, or asks for what this user cannot have.
    pub fn new(config: JailConfig, keep: Vec<RawFd>) -> Result<Self, JailError> {
        let ids = if is_root()? { Some(Ids::choose(&config)?) } else { None };
        if ids.is_none() {
            let root_only = [
                ("uid", config.uid.is_some()),
                ("gid", config.gid.is_some()),
                ("id_count", config.id_count != 1),
                ("user_namespace", !config.user_namespace),
            ];
            if let Some((key, _)) = root_only.into_iter().find(|(_, asked)| *asked) {
                return Err(JailError::NeedsRoot(key));
            }
        }
        Ok(Self { config, keep, ids, remove: Vec::new() })
    }

    /// Has the parent remove files at the end, such as sockets that the process made: from inside they
    /// cannot be reached. For that the parent keeps, besides its user, the capabilities to change any
    /// directory.
    #[must_use]
    pub fn removing(mut self, paths: impl IntoIterator<Item = PathBuf>) -> Self {
        self.remove.extend(paths);
        self
    }

    /// Enters. Returns twice: [inside](Side::Inside), and [outside](Side::Outside) once the inside has ended.
    ///
    /// # Errors
    /// When any part of the jail could not be had, on whichever side it went wrong; the other side then ends.
    pub fn enter(self) -> Result<Side, JailError> {
        let threads = fs::read_dir("/proc/self/task")
            .map_err(|source| JailError::Path { path: "/proc/self/task".into(), source })?
            .count();
        if threads != 1 {
            return Err(JailError::Threads(threads));
        }
        self.join_cgroup()?;
        let (outer, inner) = UnixStream::pair().map_err(step("making a socket pair"))?;
        if self.ids.is_some() {
            unshare(CloneFlags::CLONE_NEWPID).map_err(step("making a PID namespace"))?;
        } else {
            parent::become_own_root()?;
        }
        // From here on whoever is outside has to remove files at the end: no signal may end it before it can.
        let signals = parent::hold_signals()?;
        // SAFETY: there is one thread, so nothing is in an undefined state in the child.
        match unsafe { fork() }.map_err(step("forking"))? {
            ForkResult::Parent { child } => {
                drop(inner);
                let mapped = self.mapped_ids();
                parent::supervise(child, outer, mapped, self.ids, &self.remove).map(Side::Outside)
            }
            ForkResult::Child => {
                drop(outer);
                signals.thread_set_mask().map_err(step("unblocking signals"))?;
                self.go_in(inner).map(Side::Inside)
            }
        }
    }

    /// The ids that the inner process is to have in a user namespace that its parent sets up.
    fn mapped_ids(&self) -> Option<Ids> {
        self.ids.filter(|_| self.config.user_namespace)
    }

    fn join_cgroup(&self) -> Result<(), JailError> {
        let Some(cgroup) = &self.config.cgroup else { return Ok(()) };
        let path = cgroup.join("cgroup.procs");
        let joined = fs::File::options().write(true).open(&path).and_then(|mut file| file.write_all(b"0"));
        joined.map_err(|source| JailError::Path { path, source })
    }

    fn go_in(self, mut link: UnixStream) -> Result<Inside, JailError> {
        use std::os::fd::AsRawFd;
        descriptors::close_all_but(&self.keep, link.as_raw_fd())?;
        // Away from the terminal, into which input could otherwise be pushed.
        setsid().map_err(step("starting a session"))?;
        unshare(
            CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWCGROUP,
        )
        .map_err(step("making namespaces"))?;
        let descriptors = self.config.share.is_some().then(descriptors::private_descriptors).transpose();
        let descriptors = descriptors.map_err(step("opening /proc/self/fd"))?;
        let max_open_files = privileges::max_open_files(&self.config);
        filesystem::enter(&self.config)?;
        let share = descriptors.map(filesystem::open_share).transpose()?;
        privileges::limit_resources(&self.config, max_open_files, self.ids.is_some())?;
        if self.mapped_ids().is_some() {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(step("making a user namespace"))?;
            parent::ask_for_ids(&mut link)?;
        }
        let share_capabilities = self.config.share.is_some();
        let keep = if share_capabilities { &privileges::SHARE_CAPABILITIES[..] } else { &[] };
        privileges::drop_all(self.inner_ids(), keep)?;
        let landlock = privileges::confine_paths(share_capabilities)?;
        // Last, as a change of ids would undo it. A parent that died before this shows as a closed link.
        parent::die_with(&link)?;
        // Cannot be set already: only one thread gets here, and only once.
        let _ = CONFINEMENT.set(Confinement { seccomp: self.config.seccomp, share_capabilities });
        Ok(Inside { landlock, share_capabilities, share })
    }

    /// The ids to become, as they are called where the inner process is by then.
    fn inner_ids(&self) -> Option<(Uid, Gid)> {
        let ids = self.ids?;
        let mapped = self.config.user_namespace;
        Some(if mapped {
            (Uid::from_raw(0), Gid::from_raw(0))
        } else {
            (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid))
        })
    }
}

impl Ids {
    fn choose(config: &JailConfig) -> Result<Self, JailError> {
        let default = DEFAULT_ID_BASE.saturating_add(std::process::id());
        let uid = config.uid.unwrap_or(default);
        let gid = config.gid.unwrap_or(default);
        let count = config.id_count;
        for (what, first) in [("uid", uid), ("gid", gid)] {
            // The last id, -1, means "no change" to most system calls.
            let end = first.checked_add(count).filter(|_| first > 0 && count > 0);
            if end.is_none() {
                return Err(JailError::Ids { what, first, count });
            }
        }
        Ok(Self { uid, gid, count })
    }
}

/// Whether this process may do what the host's root may, as far as a jail needs it.
fn is_root() -> Result<bool, JailError> {
    let have = caps::read(None, CapSet::Effective).map_err(JailError::Capabilities)?;
    let need =
        [Capability::CAP_SYS_ADMIN, Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_SETPCAP];
    Ok(need.iter().all(|cap| have.contains(cap)))
}
