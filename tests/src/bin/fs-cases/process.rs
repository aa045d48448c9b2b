//! Other processes.

use std::{io::Write, os::fd::AsFd, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Gid, Pid, Uid, fork, pipe, setgroups, setresgid, setresuid},
};

/// A process that runs a function, and ends with it.
pub(crate) struct Other {
    pid: Pid,
    output: std::fs::File,
    ended: bool,
}

impl Other {
    /// Starts one.
    pub(crate) fn start(run: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (reader, writer) = pipe().context("making a pipe")?;
        // SAFETY: this program has one thread, so the child may do what it likes.
        match unsafe { fork() }.context("forking")? {
            ForkResult::Parent { child } => {
                drop(writer);
                Ok(Self { pid: child, output: reader.into(), ended: false })
            }
            ForkResult::Child => {
                let code = match run() {
                    Ok(()) => 0,
                    Err(error) => {
                        // If it cannot be said, the exit code still is.
                        let _ = write!(std::fs::File::from(writer), "{error:#}");
                        1
                    }
                };
                std::process::exit(code)
            }
        }
    }

    /// Whether it is still at it after a while.
    pub(crate) fn waits(&self) -> Result<bool> {
        std::thread::sleep(Duration::from_millis(300));
        let mut fds = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? == 0)
    }

    /// Waits for its end, which has to be a good one.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.ended = true;
        let status = waitpid(self.pid, None).context("waiting")?;
        let said = std::io::read_to_string(&self.output)?;
        match status {
            WaitStatus::Exited(_, 0) => Ok(()),
            _ => bail!("in the other process: {said} ({status:?})"),
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        if !self.ended {
            // It may have ended by itself.
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// Runs a function in a process of another user, and waits for it.
pub(crate) fn as_user(uid: u32, gid: u32, groups: &[u32], run: impl FnOnce() -> Result<()>) -> Result<()> {
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    let other = Other::start(move || {
        setgroups(&groups)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        ensure!(Uid::current() == uid);
        run()
    })?;
    other.finish()
}
