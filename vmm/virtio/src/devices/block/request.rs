//! What a descriptor chain asks for (VIRTIO 1.3, section 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    config::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS, SECTOR},
    disk::Disk,
};
use crate::buffers::GuestBuffers;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// How a request ended, as its driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::cast_possible_truncation, reason = "the constants are 0, 1 and 2")]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// Bytes of the disk, within its capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// For write-zeroes: the space may be given back.
    pub(super) unmap: bool,
}

/// A valid request.
#[derive(Debug)]
pub(super) enum Request {
    Read { offset: u64, data: GuestBuffers },
    Write { offset: u64, data: GuestBuffers },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    GetId(GuestBuffers),
}

/// A chain that has at least what every request has.
#[derive(Debug)]
pub(super) struct Parsed {
    /// What it asks for, or the answer to what it must not ask for.
    pub(super) request: Result<Request, Status>,
    /// The byte for the status.
    pub(super) status: GuestBuffers,
}

impl Request {
    /// The bytes to account for.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } => data.len() as u64,
            Self::Flush | Self::Discard(_) | Self::WriteZeroes(_) | Self::GetId(_) => 0,
        }
    }
}

/// Takes a chain's buffers apart.
///
/// # Errors
/// In words, when the chain has no header or no place for a status: then it cannot even be refused.
pub(super) fn parse(
    mut readable: GuestBuffers,
    mut writable: GuestBuffers,
    disk: &Disk,
) -> Result<Parsed, &'static str> {
    let mut header = [0; HEADER];
    if readable.copy_to(0, &mut header) != HEADER {
        return Err("request without a header");
    }
    readable.advance(HEADER);
    let status_at = writable.len().checked_sub(1).ok_or("request without a status byte")?;
    let status = writable.split_off(status_at);
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let request = decode(kind, u64::from_le_bytes(sector), readable, writable, disk);
    Ok(Parsed { request, status })
}

fn decode(
    kind: u32,
    sector: u64,
    readable: GuestBuffers,
    writable: GuestBuffers,
    disk: &Disk,
) -> Result<Request, Status> {
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = transfer(sector, &writable, disk)?;
            Ok(Request::Read { offset, data: writable })
        }
        VIRTIO_BLK_T_GET_ID => Ok(Request::GetId(writable)),
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only() => {
            Err(Status::IoError)
        }
        VIRTIO_BLK_T_OUT => {
            let offset = transfer(sector, &readable, disk)?;
            Ok(Request::Write { offset, data: readable })
        }
        VIRTIO_BLK_T_DISCARD => {
            let ranges = ranges(&readable, MAX_DISCARD_SECTORS, disk)?;
            // Only write-zeroes has the flag (section 5.2.6.2).
            if ranges.iter().any(|range| range.unmap) {
                return Err(Status::Unsupported);
            }
            Ok(Request::Discard(ranges))
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            Ok(Request::WriteZeroes(ranges(&readable, MAX_WRITE_ZEROES_SECTORS, disk)?))
        }
        _ => Err(Status::Unsupported),
    }
}

/// Where a transfer starts, in bytes, if all of it is on the disk.
fn transfer(sector: u64, data: &GuestBuffers, disk: &Disk) -> Result<u64, Status> {
    let len = data.len() as u64;
    if !len.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    within(sector, len, disk)
}

fn within(sector: u64, len: u64, disk: &Disk) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if end > disk.capacity() { Err(Status::IoError) } else { Ok(offset) }
}

/// The ranges of a discard or write-zeroes request (section 5.2.6, struct virtio_blk_discard_write_zeroes).
fn ranges(data: &GuestBuffers, max_sectors: u32, disk: &Disk) -> Result<Vec<Range>, Status> {
    let count = data.len() / RANGE;
    let most = usize::try_from(MAX_RANGES).unwrap_or(usize::MAX);
    if count == 0 || count > most || !data.len().is_multiple_of(RANGE) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::with_capacity(count);
    for index in 0..count {
        let mut bytes = [0; RANGE];
        data.copy_to(index * RANGE, &mut bytes);
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        ranges.push(Range { offset: within(sector, len, disk)?, len, unmap: flags != 0 });
    }
    Ok(ranges)
}
