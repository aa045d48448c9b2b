//! The init of a pod's PID namespace: the agent, executed again, that does nothing but reap.

use std::io;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::reaper::Reaper;

/// The argument that makes the program this init.
pub const ARGUMENT: &str = "pod-init";

/// Starts the init in a PID namespace of its own. It is a child of the agent when this returns.
///
/// # Errors
/// When the program can not be started or has no luck.
pub async fn spawn(reaper: &Reaper) -> io::Result<Pid> {
    let (writer, mut reader) = pipe::pipe()?;
    let hold = reaper.hold();
    let child = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .stdin(Stdio::null())
        .stdout(writer.into_blocking_fd()?)
        .env_clear()
        .spawn()?;
    let launcher = hold.watch(Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?));
    drop(hold);
    let mut text = String::new();
    reader.read_to_string(&mut text).await?;
    // The launcher is gone before its child is used, so that the child is the agent's.
    let _ = launcher.await;
    let pid = text.trim().parse().map_err(|_| io::Error::other("the pod's init did not start"))?;
    Ok(Pid::from_raw(pid))
}

/// The program's main with [`ARGUMENT`]: prints the pid of the init and ends; the init goes on. Never returns in the
/// init itself.
///
/// # Errors
/// When the namespace can not be made.
pub fn run() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: the process has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            println!("{child}");
            Ok(())
        }
        ForkResult::Child => reap_forever(),
    }
}

fn reap_forever() -> ! {
    // The pipe ends when nobody holds it any more.
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null.as_fd());
    }
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that none is lost between the last wait and the next sigwait.
    let _ = children.thread_block();
    loop {
        while matches!(
            waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)),
            Ok(status) if status != WaitStatus::StillAlive
        ) {}
        let _ = children.wait();
    }
}
