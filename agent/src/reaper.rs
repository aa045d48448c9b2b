//! The one place that reaps children.
//!
//! PID 1 inherits every orphan and has to reap all of them, and `wait4(-1)` takes whatever has ended: two callers
//! would steal each other's statuses. So everything else asks here. The order that can not lose a status:
//!
//! 1. take a [`Hold`]: while one lives, only watched children are reaped, so the status (and the pid) of a process
//!    that ends at once stays with the kernel;
//! 2. fork, learn the pid (of a child, or of a grandchild that was handed over with `CLONE_PARENT`);
//! 3. [`Hold::watch`] that pid;
//! 4. drop the hold.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::task;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// By `exit(2)` with this code, 0 to 255.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

impl ExitStatus {
    /// The code as a shell and runc report it: the exit code, or 128 + signal.
    pub fn code(self) -> i32 {
        match self {
            ExitStatus::Exited(code) => code,
            ExitStatus::Signaled(signal) => signal.saturating_add(128),
        }
    }
}

/// Reaps all children of this process. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    holds: usize,
    watched: HashMap<Pid, oneshot::Sender<ExitStatus>>,
}

/// Keeps the statuses of children that nobody watches yet with the kernel.
#[derive(Debug)]
pub struct Hold {
    reaper: Reaper,
}

impl Reaper {
    /// Starts reaping on SIGCHLD. At most one reaper may run in a process.
    ///
    /// # Errors
    /// When the signal handler can not be installed.
    pub fn start() -> io::Result<Reaper> {
        let reaper = Reaper::default();
        let mut children = signal(SignalKind::child())?;
        let task = reaper.clone();
        task::spawn(async move {
            while children.recv().await.is_some() {
                task.reap();
            }
        });
        Ok(reaper)
    }

    /// To be taken before a fork whose child shall be watched.
    pub fn hold(&self) -> Hold {
        self.lock().holds += 1;
        Hold { reaper: self.clone() }
    }

    /// Collects all children that have ended and may be collected.
    fn reap(&self) {
        let mut table = self.lock();
        if table.holds == 0 {
            while let Ok(Some((pid, status))) = wait(Pid::from_raw(-1)) {
                if let Some(watcher) = table.watched.remove(&pid) {
                    // A receiver that is gone does not want to know.
                    let _ = watcher.send(status);
                }
            }
        } else {
            let ended: Vec<_> = table.watched.keys().filter_map(|&pid| wait(pid).ok()?).collect();
            for (pid, status) in ended {
                if let Some(watcher) = table.watched.remove(&pid) {
                    let _ = watcher.send(status);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is consistent after every statement, so a panic elsewhere does not spoil it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    /// The receiver gets the status of the child `pid`, at once if it has ended already. It fails when `pid` is not
    /// a child of this process.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.lock();
        // Its SIGCHLD may have come before.
        match wait(pid) {
            Ok(Some((_, status))) => {
                let _ = sender.send(status);
            }
            Ok(None) => {
                table.watched.insert(pid, sender);
            }
            Err(_) => drop(sender),
        }
        receiver
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let last = {
            let mut table = self.reaper.lock();
            table.holds = table.holds.saturating_sub(1);
            table.holds == 0
        };
        if last {
            self.reaper.reap();
        }
    }
}

/// One child of `pid` (-1: any) that has ended.
///
/// # Errors
/// As waitpid(2): ECHILD when there is no such child.
pub(crate) fn wait(pid: Pid) -> Result<Option<(Pid, ExitStatus)>, Errno> {
    // __WALL: children that were cloned without SIGCHLD as well.
    let options = libc::WNOHANG | libc::__WALL;
    loop {
        let mut status = 0;
        // Not by nix, which reaps a child that a real-time signal killed and then fails, for want of a name for that.
        // SAFETY: the status outlives the call.
        let ended = match unsafe { libc::waitpid(pid.as_raw(), &raw mut status, options) } {
            0 => return Ok(None),
            -1 if Errno::last() == Errno::EINTR => continue,
            -1 => return Err(Errno::last()),
            ended => Pid::from_raw(ended),
        };
        if libc::WIFEXITED(status) {
            return Ok(Some((ended, ExitStatus::Exited(libc::WEXITSTATUS(status)))));
        }
        // A traced child's stops are reported without being asked for.
        if libc::WIFSIGNALED(status) {
            return Ok(Some((ended, ExitStatus::Signaled(libc::WTERMSIG(status)))));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[allow(clippy::zombie_processes)] // Reaping is what is tested.
    fn spawn(script: &str) -> Pid {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        Pid::from_raw(i32::try_from(child.id()).unwrap())
    }

    #[tokio::test]
    async fn statuses_reach_their_watchers() {
        let reaper = Reaper::start().unwrap();
        let hold = reaper.hold();
        let exited = hold.watch(spawn("exit 7"));
        let killed = hold.watch(spawn("kill -9 $$"));
        drop(hold);
        assert_eq!(exited.await.unwrap(), ExitStatus::Exited(7));
        let killed = killed.await.unwrap();
        assert_eq!(killed, ExitStatus::Signaled(9));
        assert_eq!(killed.code(), 137);
    }

    /// The first and the last that the C library leaves to programs: no enumeration has them.
    #[tokio::test]
    async fn real_time_signals_are_told_like_others() {
        let reaper = Reaper::start().unwrap();
        for signal in [34, 64] {
            let hold = reaper.hold();
            let watched = hold.watch(spawn(&format!("kill -{signal} $$")));
            // One that nobody watches does not stop what comes after it either.
            spawn(&format!("kill -{signal} $$"));
            drop(hold);
            assert_eq!(watched.await.unwrap(), ExitStatus::Signaled(signal));
        }
    }

    #[tokio::test]
    async fn a_child_that_ends_before_it_is_watched_is_not_lost() {
        let reaper = Reaper::start().unwrap();
        let hold = reaper.hold();
        let early = spawn("exit 3");
        // Another child's end drives the reaper while the first is a zombie that nobody watches.
        let other = hold.watch(spawn("sleep 0.2; exit 4"));
        assert_eq!(other.await.unwrap(), ExitStatus::Exited(4));
        assert_eq!(hold.watch(early).await.unwrap(), ExitStatus::Exited(3));
    }

    #[tokio::test]
    async fn unwatched_children_are_reaped_when_the_hold_ends() {
        let reaper = Reaper::start().unwrap();
        let hold = reaper.hold();
        let orphan = spawn("exit 0");
        let other = hold.watch(spawn("sleep 0.2"));
        other.await.unwrap();
        assert!(nix::sys::signal::kill(orphan, None).is_ok(), "zombie was reaped under a hold");
        drop(hold);
        assert_eq!(nix::sys::signal::kill(orphan, None), Err(Errno::ESRCH));
    }

    #[tokio::test]
    async fn watching_a_stranger_fails() {
        let reaper = Reaper::start().unwrap();
        let hold = reaper.hold();
        assert!(hold.watch(Pid::from_raw(1)).await.is_err());
        assert_eq!(hold.watch(spawn("exit 5")).await.unwrap(), ExitStatus::Exited(5));
    }
}
