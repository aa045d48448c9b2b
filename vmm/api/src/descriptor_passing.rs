//! Descriptors that come with a message on a unix socket (unix(7), SCM_RIGHTS).

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// The most descriptors that Linux passes with one message (SCM_MAX_FD).
pub const MAX_DESCRIPTORS: usize = 253;

/// Words of control data, of which the kernel wants them aligned: a header, and the descriptors.
const CONTROL_WORDS: usize = (mem::size_of::<libc::cmsghdr>() + MAX_DESCRIPTORS * mem::size_of::<RawFd>())
    .div_ceil(mem::size_of::<u64>());

/// What has come.
#[derive(Debug)]
pub struct Received {
    /// Bytes of data.
    pub len: usize,
    /// The descriptors, which are closed when they are dropped.
    pub descriptors: Vec<OwnedFd>,
    /// Something is missing: there was more data than room, or the process could not have more descriptors.
    pub truncated: bool,
}

/// Receives a message into `data`, with all descriptors that came with it. `flags` are those of recvmsg(2).
///
/// # Errors
/// As recvmsg(2).
pub fn receive(socket: BorrowedFd<'_>, data: &mut [u8], flags: libc::c_int) -> io::Result<Received> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut vec = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: a msghdr of zeros is one without a name, buffers and control data.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut vec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control);
    let len = loop {
        // SAFETY: both buffers are writable, as long as the header says, and outlive the call.
        let received =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags | libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(received) {
            Ok(len) => break len,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    // Whatever else is to be said about the message: these are the process's own by now.
    let descriptors = take_descriptors(&message);
    let truncated = message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok(Received { len, descriptors, truncated })
}

/// Takes the descriptors that the kernel has just put into a message's control data.
fn take_descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has set the length of the control data to what it has written of it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null, or a header inside of the control data, as the two functions find them.
    while let Some(header) = unsafe { next.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: the length of no data is a constant; the data follows the header.
            let (empty, data) = unsafe { (libc::CMSG_LEN(0) as usize, libc::CMSG_DATA(next)) };
            let count = header.cmsg_len.saturating_sub(empty) / mem::size_of::<RawFd>();
            descriptors.extend((0..count).map(|index| {
                // SAFETY: as many numbers are there as the header's length says, and the kernel has just made
                // these descriptors for this process, so that nothing else owns them.
                unsafe { OwnedFd::from_raw_fd(data.cast::<RawFd>().add(index).read_unaligned()) }
            }));
        }
        // SAFETY: the header is one of this message's.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSlice, Read},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
    };

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn send(socket: &OwnedFd, data: &[u8], descriptors: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let socket = socket.as_raw_fd();
        sendmsg::<UnixAddr>(socket, &[IoSlice::new(data)], &rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn as_many_come_as_can_be_sent() {
        let (ours, theirs) = pair();
        let file = tempfile::tempfile().unwrap();
        send(&theirs, b"message", &[file.as_raw_fd(); MAX_DESCRIPTORS]);
        let mut data = [0; 16];
        let received = receive(ours.as_fd(), &mut data, 0).unwrap();
        assert_eq!((received.len, received.descriptors.len(), received.truncated), (7, 253, false));
        assert_eq!(&data[..7], b"message");
        drop(theirs);
        let end = receive(ours.as_fd(), &mut data, 0).unwrap();
        assert_eq!((end.len, end.descriptors.len(), end.truncated), (0, 0, false));
    }

    #[test]
    fn what_comes_with_a_message_that_is_too_long_is_not_lost() {
        let (ours, theirs) = pair();
        let (mut peer, passed) = UnixStream::pair().unwrap();
        send(&theirs, &[7; 100], &[passed.as_raw_fd()]);
        drop(passed);
        let received = receive(ours.as_fd(), &mut [0; 16], 0).unwrap();
        assert_eq!((received.len, received.descriptors.len(), received.truncated), (16, 1, true));
        // That was the last one: the other end sees that it is closed.
        drop(received);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }
}
