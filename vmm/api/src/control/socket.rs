//! Packets with descriptors on a unix socket (unix(7), `SOCK_SEQPACKET`).

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

use nix::sys::{
    socket::{
        AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
        connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt,
    },
    stat::{Mode, umask},
};

pub use crate::descriptor_passing::MAX_DESCRIPTORS;
use crate::descriptor_passing::{self, Received};

/// The longest message.
pub const MAX_MESSAGE: usize = 128 << 10;

/// Makes a socket at `path`, which only this user can reach, and listens.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] when something is there already.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let listener = new_socket()?;
    let address = UnixAddr::new(path)?;
    // The socket's mode is set by the mask at bind(2); changing it afterwards would leave a moment in
    // between.
    let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let bound = bind(listener.as_raw_fd(), &address);
    umask(before);
    bound?;
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}

/// Connects to a machine's socket.
///
/// # Errors
/// When nobody listens there.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Whether `socket` listens, rather than being connected.
///
/// # Errors
/// When it is no socket.
pub fn is_listening(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(getsockopt(&socket, sockopt::AcceptConn)?)
}

/// Accepts a connection.
///
/// # Errors
/// When there is none, or the process is out of descriptors.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the call has just returned it, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Sends a packet.
///
/// # Errors
/// When the peer is gone, or there is more than a packet holds; with `wait` false also when it does not keep
/// up.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], descriptors: &[RawFd], wait: bool) -> io::Result<()> {
    if data.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        let (bytes, count) = (data.len(), descriptors.len());
        let what = format!(
            "{bytes} bytes and {count} descriptors, where {MAX_MESSAGE} and {MAX_DESCRIPTORS} are possible"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
    let sent = sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(data)], control, flags, None)?;
    if sent == data.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The length of the packet that is next: most are short, and clearing a buffer for the longest takes longer
/// than to carry out what is asked for.
fn next_length(socket: BorrowedFd<'_>, flags: MsgFlags) -> io::Result<usize> {
    let flags = flags | MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
    Ok(recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut [IoSliceMut::new(&mut [])], None, flags)?.bytes)
}

/// A packet.
#[derive(Debug)]
pub struct Packet {
    /// What it says.
    pub data: Vec<u8>,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
    /// It was longer than [`MAX_MESSAGE`], or not all of its descriptors could be taken.
    pub truncated: bool,
}

/// Receives a packet; `None` when the peer has closed its end.
///
/// # Errors
/// When the connection fails; with `wait` false also when there is no packet.
pub fn receive(socket: BorrowedFd<'_>, wait: bool) -> io::Result<Option<Packet>> {
    let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
    let mut data = vec![0; next_length(socket, flags)?.min(MAX_MESSAGE)];
    let Received { len, descriptors, truncated } =
        descriptor_passing::receive(socket, &mut data, flags.bits())?;
    if len == 0 && descriptors.is_empty() && !truncated {
        return Ok(None);
    }
    data.truncate(len);
    Ok(Some(Packet { data, descriptors, truncated }))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn packets_keep_their_borders_and_their_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = listen_at(&path).unwrap();
        assert!(is_listening(listener.as_fd()).unwrap());
        let client = connect_to(&path).unwrap();
        let server = accept(listener.as_fd()).unwrap();
        let file = tempfile::tempfile().unwrap();
        send(client.as_fd(), b"one", &[file.as_raw_fd()], true).unwrap();
        send(client.as_fd(), b"two", &[], true).unwrap();
        let packet = receive(server.as_fd(), false).unwrap().unwrap();
        assert_eq!((packet.data.as_slice(), packet.descriptors.len()), (&b"one"[..], 1));
        let packet = receive(server.as_fd(), false).unwrap().unwrap();
        assert_eq!((packet.data.as_slice(), packet.descriptors.len()), (&b"two"[..], 0));
        drop(client);
        assert!(receive(server.as_fd(), false).unwrap().is_none());
    }

    #[test]
    fn more_than_a_packet_holds_is_not_sent() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let refused = |data: &[u8], descriptors: &[RawFd]| {
            send(ours.as_fd(), data, descriptors, true).unwrap_err().kind() == io::ErrorKind::InvalidInput
        };
        assert!(refused(&vec![0; MAX_MESSAGE + 1], &[]));
        assert!(refused(b"x", &[ours.as_raw_fd(); MAX_DESCRIPTORS + 1]));
    }

    #[test]
    fn a_path_in_use_is_refused_and_the_socket_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _first = listen_at(&path).unwrap();
        assert_eq!(listen_at(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
    }
}
