//! What is in front of every packet (VIRTIO 1.3, section 5.10.6).
//!
//! The header alone is parsed here, from a copy, so that the guest can't change it under us. The payload is
//! never copied: it stays in the chain's own buffers, of which there may be many (Linux sends MSG_ZEROCOPY
//! data as one descriptor per page), and goes from them to the socket.

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The length of a header.
pub const HEADER_LEN: usize = 44;
/// The most payload that goes to the guest in one packet, what Linux sends at most itself.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// SOCK_STREAM, the one socket type that is offered.
pub const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// The sender is done.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for (`enum virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Ends one at once, or says that there is none.
    Rst = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries data.
    Rw = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for it.
    CreditRequest = 7,
}

impl Op {
    fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sent it.
    pub src_cid: u64,
    /// Whom it is for.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// The payload's length.
    pub len: u32,
    /// [`TYPE_STREAM`], or a type that was never offered.
    pub kind: u16,
    /// See [`Op`]; kept raw, as a guest may send anything.
    pub op: u16,
    /// Of a [`Op::Shutdown`]: what ends.
    pub flags: u32,
    /// How much the sender's receive buffer holds in all.
    pub buf_alloc: u32,
    /// How many bytes have left the sender's receive buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The operation, unless it is none that is known.
    #[must_use]
    pub fn op(&self) -> Option<Op> {
        Op::from_raw(self.op)
    }

    /// The length of header and payload together.
    #[must_use]
    pub fn packet_len(&self) -> u32 {
        u32::try_from(HEADER_LEN).map_or(u32::MAX, |header| header.saturating_add(self.len))
    }

    /// From its little-endian bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// As little-endian bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = &mut bytes[..];
        put(&mut rest, &self.src_cid.to_le_bytes());
        put(&mut rest, &self.dst_cid.to_le_bytes());
        put(&mut rest, &self.src_port.to_le_bytes());
        put(&mut rest, &self.dst_port.to_le_bytes());
        put(&mut rest, &self.len.to_le_bytes());
        put(&mut rest, &self.kind.to_le_bytes());
        put(&mut rest, &self.op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buf_alloc.to_le_bytes());
        put(&mut rest, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The RST that answers this packet.
    #[must_use]
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            // The answer names the type that it answers, or Linux would take it for another socket's.
            kind: self.kind,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }
}

/// The next `N` bytes; zeros once there are fewer, which the fixed length of a header rules out.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, tail)) => {
            *rest = tail;
            *field
        }
        None => [0; N],
    }
}

fn put(rest: &mut &mut [u8], field: &[u8]) {
    if let Some((to, tail)) = std::mem::take(rest).split_at_mut_checked(field.len()) {
        to.copy_from_slice(field);
        *rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_standard_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x11,
            dst_port: 0x22,
            len: 0x33,
            kind: TYPE_STREAM,
            op: Op::Rw as u16,
            flags: 0x44,
            buf_alloc: 0x55,
            fwd_cnt: 0x66,
        };
        let bytes = header.encode();
        let at = [
            (0, 3),
            (8, 2),
            (16, 0x11),
            (20, 0x22),
            (24, 0x33),
            (28, 1),
            (30, 5),
            (32, 0x44),
            (36, 0x55),
            (40, 0x66),
        ];
        for (offset, value) in at {
            assert_eq!(bytes[offset], value, "offset {offset}");
        }
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), at.len());
    }

    proptest! {
        #[test]
        fn survives_the_round_trip(bytes: [[u8; 11]; 4]) {
            let bytes: [u8; HEADER_LEN] = bytes.concat().try_into().unwrap();
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}
