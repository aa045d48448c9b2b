//! Requests and responses (VIRTIO 1.3, section 5.15.6).

use vm_memory::{Bytes, GuestAddress};

use crate::{memory::GuestMem, queue::Descriptors};

/// Length of `struct virtio_mem_req`.
const REQUEST_LEN: usize = 24;
/// Length of `struct virtio_mem_resp`.
const RESPONSE_LEN: u32 = 10;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// VIRTIO_MEM_REQ_PLUG
    Plug { addr: u64, count: u16 },
    /// VIRTIO_MEM_REQ_UNPLUG
    Unplug { addr: u64, count: u16 },
    /// VIRTIO_MEM_REQ_UNPLUG_ALL
    UnplugAll,
    /// VIRTIO_MEM_REQ_STATE
    State { addr: u64, count: u16 },
    /// Anything else.
    Unknown,
}

impl Request {
    /// Fields are little-endian 16-bit (type, padding ×3), 64-bit (address), 16-bit (number of blocks,
    /// padding ×3).
    fn parse(bytes: &[u8; REQUEST_LEN]) -> Self {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = *bytes;
        let addr = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let count = u16::from_le_bytes([n0, n1]);
        match u16::from_le_bytes([t0, t1]) {
            0 => Self::Plug { addr, count },
            1 => Self::Unplug { addr, count },
            2 => Self::UnplugAll,
            3 => Self::State { addr, count },
            _ => Self::Unknown,
        }
    }
}

/// The device's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Not now: more than was asked for would be plugged.
    Nack,
    /// The host cannot do it at the moment.
    Busy,
    /// The request is wrong.
    Error,
    /// To a state request: all blocks are plugged.
    Plugged,
    /// To a state request: no block is.
    Unplugged,
    /// To a state request: some are.
    Mixed,
}

impl Response {
    /// Response type (VIRTIO_MEM_RESP_*) and state (VIRTIO_MEM_STATE_*), with padding between.
    fn bytes(self) -> [u8; RESPONSE_LEN as usize] {
        let (kind, state) = match self {
            Self::Ack | Self::Plugged => (0, 0),
            Self::Unplugged => (0, 1),
            Self::Mixed => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// Where the driver wants its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer(GuestAddress);

impl Answer {
    /// Writes it; returns how many bytes.
    ///
    /// # Errors
    /// With what the driver did, when that is not in guest memory.
    pub(super) fn write(self, mem: &GuestMem, response: Response) -> Result<u32, &'static str> {
        mem.write_slice(&response.bytes(), self.0).map_err(|_| "response outside guest memory")?;
        Ok(RESPONSE_LEN)
    }
}

/// Reads a request: one readable descriptor, followed by a writable one for the answer.
///
/// # Errors
/// With what the driver did, when the chain has another shape.
pub(super) fn read_request(
    mem: &GuestMem,
    mut chain: Descriptors,
) -> Result<(Request, Answer), &'static str> {
    let request = chain.next().filter(|d| !d.is_write_only()).ok_or("no request")?;
    let answer = chain.next().filter(|d| d.is_write_only()).ok_or("no room for a response")?;
    if request.len() as usize != REQUEST_LEN {
        return Err("request of another length");
    }
    if answer.len() < RESPONSE_LEN {
        return Err("too little room for a response");
    }
    let mut bytes = [0; REQUEST_LEN];
    mem.read_slice(&mut bytes, request.addr()).map_err(|_| "request outside guest memory")?;
    Ok((Request::parse(&bytes), Answer(answer.addr())))
}
