//! The duties of PID 1: mounts of a minimal system, the control group tree, the end of the machine.

mod exit;
mod mounts;

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use thiserror::Error;
use tracing::{info, warn};

use crate::state::Shutdown;

pub use exit::power_off;
pub use mounts::{CGROUP_ROOT, prepare};

/// Bound of each part of a shutdown that waits for processes after SIGKILL.
const KILL_BOUND: Duration = Duration::from_secs(5);

/// From the first to the second look whether killed processes are gone, which they usually are by then.
const FIRST_LOOK: Duration = Duration::from_millis(1);
/// Between two looks later on.
const LAST_LOOK: Duration = Duration::from_millis(16);

/// PID 1 can not set up the machine.
#[derive(Debug, Error)]
#[error("{action} {path}")]
pub struct InitError {
    action: &'static str,
    path: String,
    source: io::Error,
}

impl InitError {
    fn new(action: &'static str, path: &str) -> impl FnOnce(io::Error) -> InitError {
        let path = path.to_owned();
        move |source| InitError { action, path, source }
    }
}

/// Ends all processes but this one: SIGTERM, then SIGKILL when `grace` is over. The reaper must be running.
pub async fn end_processes(how: Shutdown) {
    let grace = Duration::from_millis(how.grace_ms.into());
    if !grace.is_zero() {
        signal_all(Signal::SIGTERM);
        // Stopped processes have to run to die.
        signal_all(Signal::SIGCONT);
        wait_until_alone(grace).await;
    }
    signal_all(Signal::SIGKILL);
    if !wait_until_alone(KILL_BOUND).await {
        warn!("processes survive SIGKILL");
    }
}

/// Flushes and takes away all file systems, as far as that goes.
pub fn end_file_systems() {
    nix::unistd::sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // Later mounts may be inside of earlier ones.
    for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
        if keeps_until_the_end(target) {
            continue;
        }
        if let Err(errno) = nix::mount::umount2(target, nix::mount::MntFlags::empty()) {
            warn!(target, %errno, "not unmounted");
        }
    }
    nix::unistd::sync();
    info!("file systems are unmounted");
}

fn keeps_until_the_end(target: &str) -> bool {
    target == "/"
        || ["/proc", "/sys", "/dev"]
            .iter()
            .any(|top| target.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

fn signal_all(signal: Signal) {
    // -1: every process but PID 1 and the caller.
    if let Err(errno) = kill(Pid::from_raw(-1), signal)
        && errno != Errno::ESRCH
    {
        warn!(%signal, %errno, "not all processes were signalled");
    }
}

async fn wait_until_alone(bound: Duration) -> bool {
    let end = Instant::now() + bound;
    let mut look_again = FIRST_LOOK;
    // There is no descriptor that tells this, and it happens once.
    while !is_alone() {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(look_again).await;
        look_again = (look_again * 2).min(LAST_LOOK);
    }
    true
}

/// Whether PID 1 has no children: whoever else runs descends from one, as orphans become PID 1's. (A signal to
/// everybody does not tell: it finds the kernel's own threads, which stay.)
fn is_alone() -> bool {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::All, look) == Err(Errno::ECHILD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_threads_are_no_company() {
        assert!(is_alone());
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!is_alone());
        child.kill().unwrap();
        assert!(!is_alone(), "one that has ended is there until it is reaped");
        child.wait().unwrap();
        assert!(is_alone());
    }

    #[test]
    fn what_a_shutdown_leaves_mounted() {
        for kept in ["/", "/proc", "/dev/pts", "/sys/fs/cgroup"] {
            assert!(keeps_until_the_end(kept), "{kept}");
        }
        for gone in ["/run/caisson/storage/a", "/devices", "/procession"] {
            assert!(!keeps_until_the_end(gone), "{gone}");
        }
    }
}
