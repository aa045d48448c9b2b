//! Descriptors of pipes and terminals as asynchronous readers and writers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;

/// A non-blocking descriptor that can be polled.
#[derive(Debug)]
pub struct Fd(AsyncFd<OwnedFd>);

impl Fd {
    /// Takes over `fd` and makes its open file description non-blocking.
    ///
    /// # Errors
    /// When the descriptor can not be polled (a regular file).
    pub fn new(fd: OwnedFd) -> io::Result<Fd> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the OwnedFd stays open, and the same descriptor, as long as the registration.
        Ok(Fd(unsafe { AsyncFd::register(fd) }?))
    }

    /// Reads what is there now: `None` when nothing is, 0 at the end.
    ///
    /// # Errors
    /// As read(2).
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match nix::unistd::read(self.0.get_ref(), buffer) {
                Ok(size) => return Ok(Some(size)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                // A terminal whose other side is closed.
                Err(Errno::EIO) => return Ok(Some(0)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads at least one byte, or 0 at the end.
    ///
    /// # Errors
    /// As read(2).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.try_read(buffer)? {
                Some(size) => return Ok(size),
                None => ready.clear_ready(),
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// As write(2); EPIPE when nobody reads any more.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            match nix::unistd::write(self.0.get_ref().as_fd(), bytes) {
                Ok(size) => bytes = bytes.get(size..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The descriptor, e.g. to resize a terminal.
    pub fn get(&self) -> &OwnedFd {
        self.0.get_ref()
    }
}
