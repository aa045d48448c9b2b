//! Dying on purpose, for tests of what is left then. Only with the feature `failpoints`, which what ships does not have.
//!
//! The variable `CAISSON_FAILPOINT` of the environment, which only tests set, names a file with a number, and perhaps that
//! of a process. A shim that finds it kills itself, or that process, after so many steps of its pod's record: at the worst
//! moment, as a thing is written down and not made, or made and not used, or undone and not struck off. What
//! removes a dead shim's pod does not look.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Pid, Signal, getpid, kill_process};

/// The variable.
#[cfg(feature = "failpoints")]
const VARIABLE: &str = "CAISSON_FAILPOINT";

/// Who dies, and after how many steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Failpoint {
    steps: usize,
    victim: Option<Pid>,
}

static ARMED: OnceLock<Failpoint> = OnceLock::new();

/// Arms the failpoint of the environment in this process, which serves a pod.
#[cfg(feature = "failpoints")]
pub(crate) fn arm() {
    if let Some(failpoint) = Failpoint::of_environment() {
        let _ = ARMED.set(failpoint);
    }
}

/// A line was written into the record, or what one speaks of was undone.
pub(crate) fn reached() {
    static STEPS: AtomicUsize = AtomicUsize::new(0);
    let Some(failpoint) = ARMED.get() else { return };
    if STEPS.fetch_add(1, Ordering::Relaxed).saturating_add(1) == failpoint.steps {
        let victim = failpoint.victim.unwrap_or_else(getpid);
        tracing::error!(?failpoint, "killing on purpose");
        // Nothing else ends a process without any of its own code running. It may have ended already.
        let _ = kill_process(victim, Signal::KILL);
    }
}

impl Failpoint {
    #[cfg(feature = "failpoints")]
    fn of_environment() -> Option<Failpoint> {
        let file = std::env::var_os(VARIABLE)?;
        Failpoint::parse(&std::fs::read_to_string(file).ok()?)
    }

    fn parse(text: &str) -> Option<Failpoint> {
        let mut words = text.split_whitespace();
        let steps = words.next()?.parse().ok()?;
        let victim = match words.next() {
            // Only a positive one is one process.
            Some(pid) => Some(Pid::from_raw(pid.parse::<u32>().ok()?.try_into().ok()?)?),
            None => None,
        };
        Some(Failpoint { steps, victim })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failpoints_are_a_number_and_perhaps_a_process() {
        let parsed = |text| Failpoint::parse(text).map(|it| (it.steps, it.victim.map(Pid::as_raw_nonzero)));
        assert_eq!(parsed("7\n"), Some((7, None)));
        let victim = Pid::from_raw(12).map(Pid::as_raw_nonzero);
        assert_eq!(parsed("7 12"), Some((7, victim)));
        // Never taken for the shim itself, or for all processes.
        for bad in ["", "x", "7 x", "7 0", "7 -1"] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }
}
