//! Deaths on purpose, so that what depends on the agent can be tried without it.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};

/// Which call from now on is the last; 0: none is. Of the process, as the death is.
static LAST_CALL: AtomicU32 = AtomicU32::new(0);

/// Has the agent die of the call with this number.
pub fn die_of_call(number: NonZeroU32) {
    LAST_CALL.store(number.get(), Ordering::Relaxed);
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
