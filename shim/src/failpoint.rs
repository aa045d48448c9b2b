//! Dying on purpose, for tests of what is left then.
//!
//! The variable `CAISSON_FAILPOINT` of the environment, which only tests set, names a file with a number. A shim that
//! finds it kills itself right after it has written so many lines into its pod's record: at the worst moment, as the
//! thing is written down and not made, or made and not used. Without the variable this costs one look at memory.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::{Signal, getpid, kill_process};

/// The variable.
const VARIABLE: &str = "CAISSON_FAILPOINT";

/// A line was written into the record.
pub(crate) fn recorded() {
    static WANTED: OnceLock<Option<usize>> = OnceLock::new();
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let Some(wanted) = *WANTED.get_or_init(wanted) else { return };
    if WRITTEN.fetch_add(1, Ordering::Relaxed).saturating_add(1) == wanted {
        tracing::error!(wanted, "dying on purpose");
        // Nothing else ends a process without any of its own code running.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

fn wanted() -> Option<usize> {
    let file = std::env::var_os(VARIABLE)?;
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}
