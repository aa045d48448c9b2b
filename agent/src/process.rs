//! How this process begins, whatever it then is: what the standard library's entry would have done.

use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;
use std::os::fd::{AsRawFd, IntoRawFd};

/// Makes sure that no file that is opened becomes a standard stream, and that nobody who stops reading ends the process.
/// To be called first, while there is one thread.
pub fn prepare() {
    // The lowest free number is taken. Without a null device, as before there is a /dev, nothing can be done about it.
    while let Ok(null) = open("/dev/null", OFlag::O_RDWR, Mode::empty()) {
        if null.as_raw_fd() > 2 {
            break;
        }
        let _ = null.into_raw_fd();
    }
    // SAFETY: no handler is installed.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
}
