//! How connections enter and leave on the host's side, by descriptors alone.
//!
//! *Host to guest*: clients connect to a listening unix socket and name the guest's port in a first line, as
//! with Firecracker and Cloud Hypervisor. The socket is bound outside and passed in.
//!
//! *Guest to host*: a [`Dialer`] finds the host's end of a port.
//! - [`PathDialer`] connects to `<path>_<port>`, again as others do. It needs a file system, and the rights
//!   to walk it, so it serves a VMM that a person runs without a jail.
//! - [`PassingDialer`] is for the jail, whose root is empty: it makes a socket pair and passes one half, with
//!   the port, over a socket that it was given. Linux has no `connectat(2)`, and `/proc/self/fd/N/name` needs
//!   a `/proc`, so a directory's descriptor is no way out of an empty root; and a jailed process that could
//!   connect to names of the host would be one with a view of the host. This way the receiver decides, per
//!   connection, and the ports that exist are fixed before the guest runs.
//! - None at all, the default: a guest that dials the host gets a reset.

use std::{
    collections::BTreeSet,
    fmt, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use caisson_vmm_api::descriptor_passing;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
    socketpair,
};

/// Finds the host's end of a connection that the guest opens.
pub trait Dialer: Send {
    /// A connected stream to whoever serves `port`.
    ///
    /// Called from the device's event loop, so it must not block.
    ///
    /// # Errors
    /// When nobody does, or not now: the guest's connection is reset.
    fn dial(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// The host's end of a device.
#[derive(Default)]
pub struct HostEnd {
    /// Where the host's clients connect to reach the guest.
    pub listener: Option<UnixListener>,
    /// Who serves the guest's connections to the host.
    pub dialer: Option<Box<dyn Dialer>>,
}

impl fmt::Debug for HostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { listener, dialer } = self;
        f.debug_struct("HostEnd").field("listener", listener).field("dialer", &dialer.is_some()).finish()
    }
}

/// Connects to the unix socket `<path>_<port>`.
#[derive(Clone, Debug)]
pub struct PathDialer {
    path: PathBuf,
}

impl PathDialer {
    /// `path`: what comes before the underscore, by custom the path of the device's own socket.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned() }
    }
}

impl Dialer for PathDialer {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let addr = UnixAddr::new(Path::new(&path))?;
        // Connecting to a unix socket is done at once, or fails: with EAGAIN, when the listener's backlog is
        // full.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(stream.as_raw_fd(), &addr)?;
        Ok(stream.into())
    }
}

/// Passes one half of a socket pair to a [`DialReceiver`] in another process.
#[derive(Debug)]
pub struct PassingDialer {
    socket: OwnedFd,
    ports: BTreeSet<u32>,
}

impl PassingDialer {
    /// `socket`: a SOCK_SEQPACKET unix socket whose other end is a [`DialReceiver`]. `ports`: those that
    /// exist.
    pub fn new(socket: OwnedFd, ports: impl IntoIterator<Item = u32>) -> Self {
        Self { socket, ports: ports.into_iter().collect() }
    }
}

impl Dialer for PassingDialer {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        if !self.ports.contains(&port) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
        let message = port.to_le_bytes();
        let descriptors = [theirs.as_raw_fd()];
        sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &[io::IoSlice::new(&message)],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(ours.into())
    }
}

/// The other end of a [`PassingDialer`]: accepts the guest's connections, in the process that serves them.
///
/// By the time that one is received the guest holds it to be open, as with a listener's backlog; to refuse
/// it, drop it.
#[derive(Debug)]
pub struct DialReceiver {
    socket: OwnedFd,
}

impl DialReceiver {
    /// Both ends: this one to keep, the other for [`PassingDialer::new`] in the VMM.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { socket }, other))
    }

    /// Waits for the next connection: its port and its stream. `None` once the VMM is gone.
    ///
    /// What does not look like one is dropped: the VMM is less trusted than whoever calls this.
    ///
    /// # Errors
    /// As recvmsg(2); [`io::ErrorKind::WouldBlock`] when the descriptor was made non-blocking and there is
    /// none.
    pub fn accept(&self) -> io::Result<Option<(u32, UnixStream)>> {
        loop {
            let mut port = [0; 4];
            let received = descriptor_passing::receive(self.socket.as_fd(), &mut port, 0)?;
            let (length, mut streams) = (received.len, received.descriptors);
            match streams.pop() {
                Some(stream) if length == port.len() && streams.is_empty() && !received.truncated => {
                    return Ok(Some((u32::from_le_bytes(port), stream.into())));
                }
                None if length == 0 && !received.truncated => return Ok(None),
                _ => {}
            }
        }
    }
}

impl AsRawFd for DialReceiver {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn paths_are_dialled_by_port() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(dir.path().join("vsock_7")).unwrap();
        let mut dialer = PathDialer::new(&path);
        dialer.dial(7).unwrap().write_all(b"hello").unwrap();
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(dialer.dial(8).is_err());
    }

    #[test]
    fn streams_are_passed_to_another_process() {
        let (receiver, socket) = DialReceiver::pair().unwrap();
        let mut dialer = PassingDialer::new(socket, [7]);
        assert_eq!(dialer.dial(8).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let mut guest = dialer.dial(7).unwrap();
        let (port, mut host) = receiver.accept().unwrap().unwrap();
        assert_eq!(port, 7);
        guest.write_all(b"ping").unwrap();
        let mut word = [0; 4];
        host.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"ping");
        drop(host);
        assert_eq!(guest.read(&mut word).unwrap(), 0);
        drop(dialer);
        assert!(receiver.accept().unwrap().is_none());
    }

    #[test]
    fn what_is_no_connection_is_dropped() {
        let (receiver, socket) = DialReceiver::pair().unwrap();
        let none: &[ControlMessage<'_>] = &[];
        for junk in [&[1u8, 2][..], &[0; 4], &[0; 64]] {
            let fd = socket.as_raw_fd();
            sendmsg::<UnixAddr>(fd, &[io::IoSlice::new(junk)], none, MsgFlags::empty(), None).unwrap();
        }
        PassingDialer::new(socket, [9]).dial(9).unwrap();
        assert_eq!(receiver.accept().unwrap().unwrap().0, 9);
    }
}
