//! Requests to the kernel over rtnetlink(7), and its answers.
//!
//! The kernel answers while it takes a request, so a socket that blocks never waits, and nothing has to be matched
//! up across tasks.

use std::convert::Infallible;
use std::io;

use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, Parseable,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::link::Link;

/// An rtnetlink socket, of the network namespace that it was made in, whoever uses it.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// A message's body as it travels.
struct Body {
    kind: u16,
    bytes: Vec<u8>,
}

impl NetlinkSerializable for Body {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Body {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self { kind: header.message_type, bytes: payload.to_vec() })
    }
}

impl Netlink {
    /// A socket of the calling thread's network namespace.
    pub(super) fn new() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        // Only the kernel is heard.
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Everything of a kind: `get` is the type of the request, `filter` its body.
    pub(super) fn dump<T: Parseable<[u8]>>(
        &mut self,
        get: u16,
        filter: &impl Emitable,
    ) -> io::Result<Vec<T>> {
        let found = self.request(get, NLM_F_DUMP, filter)?;
        found.iter().map(|bytes| T::parse(bytes).map_err(malformed)).collect()
    }

    /// Makes what `message` tells, in the place of one that is there already.
    pub(super) fn put(&mut self, new: u16, message: &impl Emitable) -> io::Result<()> {
        self.request(new, NLM_F_CREATE | NLM_F_REPLACE, message).map(drop)
    }

    /// Changes the link that `change` names by its index.
    pub(super) fn set_link(&mut self, change: &Link) -> io::Result<()> {
        self.request(libc::RTM_SETLINK, 0, change).map(drop)
    }

    /// The link with this name. None: there is none.
    pub(super) fn link_by_name(&mut self, name: &str) -> io::Result<Option<Link>> {
        match self.request(libc::RTM_GETLINK, 0, &Link::change(0).name(name)) {
            Ok(found) => found.first().map(|bytes| Link::parse(bytes).map_err(malformed)).transpose(),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn request(&mut self, kind: u16, flags: u16, body: &impl Emitable) -> io::Result<Vec<Vec<u8>>> {
        let mut bytes = vec![0; body.buffer_len()];
        body.emit(&mut bytes);
        self.exchange(Body { kind, bytes }, flags)
    }

    /// Sends a request, and returns the bodies of the answer.
    fn exchange(&mut self, body: Body, flags: u16) -> io::Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(body));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut bodies = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            if self.collect(&datagram, &mut bodies)? {
                return Ok(bodies);
            }
        }
    }

    /// Takes the messages of one datagram, and says whether the answer ends with it.
    fn collect(&self, datagram: &[u8], bodies: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        let mut rest = datagram;
        while !rest.is_empty() {
            let message = NetlinkMessage::<Body>::deserialize(rest).map_err(malformed)?;
            let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
            rest = length.checked_next_multiple_of(4).and_then(|next| rest.get(next..)).unwrap_or_default();
            if message.header.sequence_number != self.sequence {
                // Of a request before, whose answer was given up.
                continue;
            }
            match message.payload {
                NetlinkPayload::InnerMessage(body) => bodies.push(body.bytes),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }
}

fn malformed(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
