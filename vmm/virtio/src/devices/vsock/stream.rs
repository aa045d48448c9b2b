//! The host's end of a connection: a unix stream socket, and what it would not take yet.

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
};

use crate::buffers::GuestBuffers;

/// What came of an attempt to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// This many bytes, at least one.
    Data(u32),
    /// Nothing now.
    Nothing,
    /// The host sends no more.
    End,
}

/// See the module's description. No call blocks, whatever flags the descriptor came with.
#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
    /// Bytes of the guest that wait for the socket. Allocated at the first need, freed when it has emptied.
    backlog: VecDeque<u8>,
    /// The socket may have data, or its end.
    readable: bool,
    /// The host closed both directions.
    hung_up: bool,
    /// The host takes no more.
    refuses: bool,
    /// Nothing more is to be read: the host has ended its data, or the guest wants none.
    stopped_reading: bool,
    finished_writing: bool,
}

impl Stream {
    /// Around a connected socket.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            backlog: VecDeque::new(),
            readable: true,
            hung_up: false,
            refuses: false,
            stopped_reading: false,
            finished_writing: false,
        }
    }

    /// Whether an attempt to read may find something.
    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    /// An event said that there is something to read, or no end of both directions yet.
    pub(super) fn set_ready(&mut self, readable: bool, hung_up: bool) {
        self.readable |= (readable || hung_up) && !self.stopped_reading;
        self.hung_up |= hung_up;
    }

    /// The host closed both directions.
    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// The host takes no more.
    pub(super) fn refuses(&self) -> bool {
        self.refuses
    }

    /// Memory held for bytes that wait for the socket.
    #[cfg(test)]
    pub(super) fn backlog(&self) -> usize {
        self.backlog.capacity()
    }

    /// Sends guest data, straight from the guest's memory as far as the socket takes it. The rest is kept, in
    /// a buffer of `capacity` bytes, which credit made sure to suffice. Returns how many bytes are done with.
    pub(super) fn send(&mut self, payload: &GuestBuffers, capacity: u32) -> usize {
        let mut done = 0;
        if self.backlog.is_empty() && !self.refuses {
            done = self.send_vecs(payload.as_iovecs());
        }
        if self.refuses {
            return payload.len();
        }
        let rest = payload.len() - done;
        if rest > 0 {
            if self.backlog.capacity() == 0 {
                self.backlog.reserve_exact(usize::try_from(capacity).unwrap_or(rest).max(rest));
            }
            let start = self.backlog.len();
            self.backlog.resize(start + rest, 0);
            let (front, back) = self.backlog.as_mut_slices();
            // The new bytes are the last `rest` ones, which may span the two halves of the ring.
            let head = front.get_mut(start..).unwrap_or_default();
            let copied = payload.copy_to(done, head);
            let tail = back.get_mut(start.saturating_sub(front.len())..).unwrap_or_default();
            payload.copy_to(done + copied, tail);
        }
        done
    }

    /// Sends what waits; returns how many bytes are done with.
    pub(super) fn flush(&mut self) -> usize {
        let mut done = 0;
        while !self.backlog.is_empty() && !self.refuses {
            let (front, back) = self.backlog.as_slices();
            let vecs = [vec_of(front), vec_of(back)];
            let sent = self.send_vecs(&vecs);
            if sent == 0 {
                break;
            }
            self.backlog.drain(..sent);
            done += sent;
        }
        if self.refuses {
            done += self.backlog.len();
            self.backlog.clear();
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        done
    }

    /// Sends a short line of our own, before any data. Returns whether all of it went.
    pub(super) fn send_line(&mut self, line: &str) -> bool {
        self.send_vecs(&[vec_of(line.as_bytes())]) == line.len()
    }

    /// Reads into guest memory.
    pub(super) fn receive(&mut self, into: &GuestBuffers) -> Received {
        let received = receive(self.socket.as_raw_fd(), into.as_iovecs(), 0);
        self.received(received)
    }

    /// Reads without taking what is read.
    pub(super) fn peek(&self, into: &mut [u8]) -> io::Result<usize> {
        let vec = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        receive(self.socket.as_raw_fd(), &[vec], libc::MSG_PEEK)
    }

    /// Takes `n` bytes that were peeked at.
    pub(super) fn skip(&self, n: usize) -> bool {
        let mut bytes = [0; 64];
        let Some(bytes) = bytes.get_mut(..n) else { return false };
        let vec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: n };
        receive(self.socket.as_raw_fd(), &[vec], 0).is_ok_and(|read| read == n)
    }

    /// The guest sends no more: tell the host, after the last byte.
    pub(super) fn finish_writing(&mut self) {
        if self.backlog.is_empty() && !self.finished_writing {
            self.finished_writing = true;
            // An error means that the host has closed its end already.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// The guest takes no more: what the host still sends fails there.
    pub(super) fn stop_reading(&mut self) {
        if !self.stopped_reading {
            self.stopped_reading = true;
            self.readable = false;
            let _ = self.socket.shutdown(Shutdown::Read);
        }
    }

    fn received(&mut self, result: io::Result<usize>) -> Received {
        match result {
            Ok(0) => {
                self.readable = false;
                self.stopped_reading = true;
                Received::End
            }
            Ok(n) => Received::Data(u32::try_from(n).unwrap_or(u32::MAX)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Received::Nothing
            }
            // ECONNRESET comes after the last byte, from a host that closed without reading all of ours.
            Err(_) => {
                self.readable = false;
                self.stopped_reading = true;
                self.hung_up = true;
                Received::End
            }
        }
    }

    /// Returns how many bytes went; an error but a full socket means that the host takes no more.
    fn send_vecs(&mut self, vecs: &[libc::iovec]) -> usize {
        match send(self.socket.as_raw_fd(), vecs) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.refuses = true;
                0
            }
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn vec_of(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

fn message(vecs: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr of zeros is one without a name, buffers and control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = vecs.as_ptr().cast_mut();
    message.msg_iovlen = vecs.len();
    message
}

/// sendmsg(2), which reads the buffers only.
fn send(fd: RawFd, vecs: &[libc::iovec]) -> io::Result<usize> {
    let message = message(vecs);
    retry(|| {
        // SAFETY: `vecs` are buffers that their owner (guest memory or a slice) keeps alive over the call,
        // and which it allows to read. The guest may change its own meanwhile; then it sends something else.
        unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// recvmsg(2). The buffers must be writable.
fn receive(fd: RawFd, vecs: &[libc::iovec], flags: libc::c_int) -> io::Result<usize> {
    let mut message = message(vecs);
    retry(|| {
        // SAFETY: `vecs` are writable buffers that their owner (guest memory or a mutable slice) keeps alive
        // over the call. There is no room for control data, so descriptors that a peer passes are closed by
        // the kernel.
        unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT | flags) }
    })
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
