//! Failures on purpose, so that what depends on the agent can be tried without it. Only with the feature `failpoints`,
//! which what ships does not have.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::task;

/// What fails on purpose once the agent serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failpoint {
    /// A task panics.
    Panic,
    /// The agent dies of the call with this number, the first of which is 1. PID 1's death is a kernel panic.
    Die(NonZeroU32),
}

/// Which call from now on is the last; 0: none is. Of the process, as the death is.
static LAST_CALL: AtomicU32 = AtomicU32::new(0);

impl Failpoint {
    /// From the value of the option: `panic` or `die:N`.
    pub(crate) fn parse(value: &str) -> Option<Failpoint> {
        match value.strip_prefix("die:") {
            Some(call) => Some(Failpoint::Die(call.parse().ok()?)),
            None => (value == "panic").then_some(Failpoint::Panic),
        }
    }

    /// Makes the agent fail so.
    pub fn arm(self) {
        match self {
            Failpoint::Panic => drop(task::spawn(panic_on_purpose())),
            Failpoint::Die(call) => LAST_CALL.store(call.get(), Ordering::Relaxed),
        }
    }
}

/// Notes that a call has come.
pub(crate) fn call() {
    let counted = LAST_CALL
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .unwrap_or_default();
    if counted == 1 {
        // Without a word or an unwound frame, as a kill would be.
        std::process::abort();
    }
}

#[allow(clippy::panic)] // That is what it is for.
async fn panic_on_purpose() {
    panic!("a failpoint panics")
}
