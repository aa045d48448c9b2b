//! The files behind a disk: what is accepted, how large they are, and which bytes of the disk are where.
//!
//! A disk is one file, or, read-only, several in a row (**concat**): the layers of an image become one disk.
//! Each file of a concat disk starts at a multiple of 512 bytes, right behind the previous one; what is
//! missing to a multiple of 512 at the end of a file reads as zeros. The same padding completes a read-only
//! disk of one file. A writable file's size must be a multiple of 512 already, since its last bytes could not
//! be written.
//!
//! Nothing looks into the files: they are raw, whatever their first bytes say, as a format that a guest can
//! write is a format that a guest can choose.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::FileTypeExt,
    },
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::config::SECTOR;
use crate::buffers::GuestBuffers;

/// The most files in one disk.
pub const MAX_FILES: usize = 128;

/// Why files were refused as a disk. Files are counted from 0.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There must be one at least, and [`MAX_FILES`] at most.
    #[error("a disk needs 1 to {MAX_FILES} files, got {0}")]
    FileCount(usize),
    /// Only a read-only disk can be made of several files.
    #[error("a disk of several files must be read-only")]
    WritableConcat,
    /// The guest must not be able to write, not even through a hole in this process.
    #[error("file {0} is open for writing, but the disk is read-only")]
    OpenForWriting(usize),
    /// The guest is to write, and could not.
    #[error("file {0} is not open for reading and writing")]
    NotWritable(usize),
    /// Flags with which reads and writes at a position do not work: O_APPEND, O_DIRECT or O_PATH.
    ///
    /// O_DIRECT wants buffers aligned to the device's DMA alignment, and where they lie is up to the guest.
    #[error("file {0} is open with O_APPEND, O_DIRECT or O_PATH")]
    OpenFlags(usize),
    /// Neither a regular file nor a block device.
    #[error("file {0} is neither a regular file nor a block device")]
    FileType(usize),
    /// A writable disk ends with a whole sector.
    #[error("the size of a writable disk must be a multiple of {SECTOR} bytes, this one has {0}")]
    Unaligned(u64),
    /// The positions do not fit.
    #[error("the disk is too large")]
    TooLarge,
    /// The host said so.
    #[error("examining file {index}")]
    Examine {
        /// Which file.
        index: usize,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

/// One file's place in the disk.
#[derive(Debug)]
struct Extent {
    file: File,
    /// Where it begins in the disk, in bytes.
    start: u64,
    /// Bytes in the file.
    len: u64,
}

/// The files, in order.
#[derive(Debug)]
pub(super) struct Disk {
    extents: Vec<Extent>,
    /// Bytes, a multiple of 512.
    capacity: u64,
    read_only: bool,
}

/// A piece of a request that lies in one file.
#[derive(Debug)]
pub(super) struct Part {
    /// The file's index.
    pub(super) file: usize,
    /// Where in the file, in bytes.
    pub(super) offset: u64,
    /// What to read to or write from.
    pub(super) data: GuestBuffers,
}

impl Disk {
    pub(super) fn new(files: Vec<OwnedFd>, read_only: bool) -> Result<Self, DiskError> {
        if files.is_empty() || files.len() > MAX_FILES {
            return Err(DiskError::FileCount(files.len()));
        }
        if files.len() > 1 && !read_only {
            return Err(DiskError::WritableConcat);
        }
        let mut extents = Vec::with_capacity(files.len());
        let mut capacity = 0u64;
        for (index, fd) in files.into_iter().enumerate() {
            let mut file = File::from(fd);
            check(index, &file, read_only)?;
            let len = size(&mut file).map_err(|source| DiskError::Examine { index, source })?;
            if !read_only && len % SECTOR != 0 {
                return Err(DiskError::Unaligned(len));
            }
            extents.push(Extent { file, start: capacity, len });
            capacity = len
                .checked_next_multiple_of(SECTOR)
                .and_then(|padded| capacity.checked_add(padded))
                .filter(|&end| i64::try_from(end).is_ok())
                .ok_or(DiskError::TooLarge)?;
        }
        Ok(Self { extents, capacity, read_only })
    }

    /// Bytes, a multiple of 512.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// The files' descriptors, in order: what an engine works with. They stay open for as long as the disk
    /// lives.
    pub(super) fn fds(&self) -> Vec<RawFd> {
        self.extents.iter().map(|extent| extent.file.as_raw_fd()).collect()
    }

    /// Looks at the size of a one-file disk again; whether it changed. A disk never shrinks under its guest:
    /// reads beyond the new end fail instead, until the guest has taken notice.
    pub(super) fn refresh(&mut self) -> Result<bool, DiskError> {
        let [extent] = self.extents.as_mut_slice() else {
            return Ok(false);
        };
        let len = size(&mut extent.file).map_err(|source| DiskError::Examine { index: 0, source })?;
        if !self.read_only && len % SECTOR != 0 {
            return Err(DiskError::Unaligned(len));
        }
        let capacity = len.checked_next_multiple_of(SECTOR).ok_or(DiskError::TooLarge)?;
        let changed = capacity != self.capacity;
        extent.len = len;
        self.capacity = capacity;
        Ok(changed)
    }

    /// Cuts a request at the files' borders. Padding is zeroed here and now, as no file holds it, so it must
    /// be a request to read if there is any. The caller has checked the request against the capacity.
    pub(super) fn parts(&self, offset: u64, mut data: GuestBuffers) -> Vec<Part> {
        let mut parts = Vec::with_capacity(1);
        let mut at = offset;
        let first = self.extents.partition_point(|extent| extent.start <= offset).saturating_sub(1);
        for (index, extent) in self.extents.iter().enumerate().skip(first) {
            if data.is_empty() {
                break;
            }
            let within = at - extent.start;
            let in_file = extent.len.saturating_sub(within);
            let end = extent.start + extent.len.next_multiple_of(SECTOR);
            let rest = data.split_off(clamp(end - at));
            data.split_off(clamp(in_file)).zero();
            let data_here = std::mem::replace(&mut data, rest);
            if !data_here.is_empty() {
                parts.push(Part { file: index, offset: within, data: data_here });
            }
            at = end;
        }
        parts
    }
}

fn clamp(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn check(index: usize, file: &File, read_only: bool) -> Result<(), DiskError> {
    let examine = |source| DiskError::Examine { index, source };
    let kind = file.metadata().map_err(examine)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::FileType(index));
    }
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| examine(errno.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    if flags.intersects(OFlag::O_APPEND | OFlag::O_DIRECT | OFlag::O_PATH) {
        return Err(DiskError::OpenFlags(index));
    }
    match (flags & OFlag::O_ACCMODE, read_only) {
        (OFlag::O_RDONLY, true) | (OFlag::O_RDWR, false) => Ok(()),
        (_, true) => Err(DiskError::OpenForWriting(index)),
        (_, false) => Err(DiskError::NotWritable(index)),
    }
}

/// A file's size, or a block device's, which its metadata does not tell.
fn size(file: &mut File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}
