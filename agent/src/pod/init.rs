//! The init of a pod's PID namespace: the agent, executed again, that does nothing but reap.
//!
//! It is in the middle of containers, one of which may be allowed to trace it (CAP_SYS_PTRACE), and to reach through its
//! `/proc/1` whatever it holds. So it holds nothing: its root is an empty file system, its namespaces are the pod's or
//! its own, it has no descriptor, no capability and no way to get one, it can not make the sockets that the agent
//! listens on, and its program is on a read-only mount.

use std::ffi::c_int;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setgroups, setresgid, setresuid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::Pod;
use crate::container::init::{change_root, empty_directory};
use crate::container::{seccomp, sys};
use crate::process::lower_limits;
use crate::reaper::{self, Reaper};

/// The name that makes the program this init.
pub const ARGV0: &str = "caisson-pod-init";

/// Its user and group, which images leave free.
const NOBODY: u32 = 65_535;

/// What Kubernetes gives its own pods' init: the kernel looks elsewhere for memory first.
const OOM_SCORE_ADJ: &str = "-998";

/// Starts the init in a PID namespace of its own and otherwise in the pod's. `helper` is the agent's program. It is a
/// child of the agent when this returns.
///
/// # Errors
/// When the program can not be started or has no luck.
pub async fn spawn(pod: &Pod, helper: BorrowedFd<'_>, reaper: &Reaper) -> io::Result<Pid> {
    let (writer, mut reader) = pipe::pipe()?;
    let mut command = Command::new(format!("/proc/self/fd/{}", helper.as_raw_fd()));
    command.arg0(ARGV0).env_clear().stdin(Stdio::null()).stdout(writer.into_blocking_fd()?);
    // SAFETY: what is called is safe between fork and exec.
    unsafe { command.pre_exec(lower_limits) };
    let hold = reaper.hold();
    // The command goes too, and with it the pipe's end that it keeps.
    let child = pod.within(move || command.spawn())?;
    let launcher = hold.watch(Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?));
    drop(hold);
    let mut text = String::new();
    reader.read_to_string(&mut text).await?;
    // The launcher is gone before its child is used, so that the child is the agent's.
    let _ = launcher.await;
    let pid = text.trim().parse();
    Ok(Pid::from_raw(pid.map_err(|_| io::Error::other(format!("it did not start: {text}")))?))
}

/// The program's main as [`ARGV0`]: prints the pid of the init, or why there is none, and ends; the init goes on. Never
/// returns in the init itself.
pub fn run() -> c_int {
    // SAFETY: the process has one thread.
    let forked = isolate().and_then(|()| Ok(unsafe { fork() }?));
    let (said, code) = match forked {
        Ok(ForkResult::Child) => reap_forever(),
        Ok(ForkResult::Parent { child }) => (child.to_string(), libc::EXIT_SUCCESS),
        Err(error) => (error.to_string(), libc::EXIT_FAILURE),
    };
    // Whoever does not read it does not want to know.
    let _ = io::stdout().write_all(said.as_bytes()).and_then(|()| io::stdout().flush());
    code
}

/// Gives away everything that the next child does not need, the standard streams excepted.
fn isolate() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    sys::close_from(3)?;
    nix::sys::prctl::set_name(c"pod-init")?;
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)?;
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let procfs = OwnedFd::from(File::open("/proc")?);
    let root = empty_directory()?;
    // A root has to be mounted somewhere to become one.
    sys::move_mount(root.as_fd(), File::open("/dev")?.as_fd())?;
    change_root(root.as_fd(), procfs.as_fd())?;
    nix::sys::prctl::set_no_new_privs()?;
    let guard = seccomp::vsock_guard();
    sys::seccomp(&guard.instructions(), guard.flags)?;
    setgroups(&[])?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    sys::capset(0, 0, 0)?;
    // Credentials changed; that is a decision of the kernel's configuration.
    nix::sys::prctl::set_dumpable(false)?;
    Ok(())
}

fn reap_forever() -> ! {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that none is lost between the last wait and the next sigwait.
    let _ = children.thread_block();
    // The pipe ends when nobody holds it any more: then the agent goes on.
    let _ = sys::close_from(0);
    loop {
        while let Ok(Some(_)) = reaper::wait(Pid::from_raw(-1)) {}
        let _ = children.wait();
    }
}
