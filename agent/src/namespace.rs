//! Work inside another namespace.

use std::io;
use std::os::fd::BorrowedFd;

use nix::sched::{CloneFlags, setns};

/// Runs `work` on a thread of its own inside `namespace`. The thread ends with it: no other work ever runs there.
///
/// # Errors
/// When the thread can not be made or may not enter, or as `work` fails.
pub fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    aside(|| {
        setns(namespace, CloneFlags::empty())?;
        work()
    })
}

/// Runs `work` on a thread of its own, whose namespaces and credentials it may change.
///
/// # Errors
/// When the thread can not be made, or as `work` fails.
pub fn aside<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}
