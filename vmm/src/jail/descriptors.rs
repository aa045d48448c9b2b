use std::os::fd::RawFd;

use super::{JailError, step};

/// Closes every descriptor but 0 to 2, those in `keep`, and `link`.
pub(super) fn close_all_but(keep: &[RawFd], link: RawFd) -> Result<(), JailError> {
    let mut kept: Vec<u32> =
        keep.iter().chain([&link]).filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut from = 3;
    for fd in kept {
        if from < fd {
            close_range(from, fd - 1)?;
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX)
}

/// Closes descriptors `first` to `last`, both included; see close_range(2).
pub(super) fn close_range(first: u32, last: u32) -> Result<(), JailError> {
    // SAFETY: no argument is a pointer. What is closed is, by the contract of `Jail::new`, used by nobody.
    let result = unsafe { libc::close_range(first, last, 0) };
    if result == 0 { Ok(()) } else { Err(step("closing descriptors")(std::io::Error::last_os_error())) }
}
