//! Waiting for a control group's file to change.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Notices that a file was modified since it was made or last asked.
#[derive(Debug)]
pub(in crate::container) struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Watches `file`.
    ///
    /// # Errors
    /// When it does not exist.
    pub(in crate::container) fn new(file: &Path) -> io::Result<Watch> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(file, AddWatchFlags::IN_MODIFY)?;
        // SAFETY: the descriptor is owned by what is registered, and closed with it.
        Ok(Watch(unsafe { AsyncFd::register(OwnedFd::from(inotify)) }?))
    }

    /// Returns after the file was modified.
    ///
    /// # Errors
    /// When the file is gone.
    pub(in crate::container) async fn changed(&mut self) -> io::Result<()> {
        let mut buffer = [0_u8; 512];
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|fd| nix::unistd::read(fd.get_ref(), &mut buffer).map_err(io::Error::from)) {
                // IN_IGNORED, in the mask of the first event: the watch ended with its file.
                Ok(Ok(_))
                    if u32::from_ne_bytes([buffer[4], buffer[5], buffer[6], buffer[7]]) & 0x8000 != 0 =>
                {
                    return Err(io::ErrorKind::NotFound.into());
                }
                Ok(result) => return result.map(|_| ()),
                Err(_would_block) => {}
            }
        }
    }
}
