//! Requests that the protocol server does not know: copying within the share, files without a name,
//! everything that is known of a file, and bringing a file system to its disk (fuse(4), `linux/fuse.h`).

use std::io;

use fuse_backend_rs::abi::fuse_abi::{CopyFileRangeIn, CreateIn, EntryOut, OpenOut, WriteOut};
use vm_memory::ByteValued;

use super::{Header, IN_HEADER};
use crate::{
    buffers::GuestBuffers,
    devices::fs::passthrough::{Passthrough, RangeCopy},
};

const COPY_FILE_RANGE: u32 = 47;
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const STATX: u32 = 52;

/// Bytes of `struct fuse_statx_in`.
const STATX_IN: usize = 24;
/// Bytes of `struct fuse_statx_out`.
const STATX_OUT: usize = 288;

/// What is behind the header of a reply; `None` for requests that are not among these.
pub(super) fn serve(
    share: &Passthrough,
    header: &Header,
    message: &GuestBuffers,
) -> Option<io::Result<Vec<u8>>> {
    Some(match header.opcode {
        COPY_FILE_RANGE => body(message).and_then(|args| copy_range(share, header, args)),
        SYNCFS => share.sync_file_system(header.node).map(|()| Vec::new()),
        TMPFILE => body(message).and_then(|args| unnamed(share, header, args)),
        STATX => statx(share, header, message),
        _ => return None,
    })
}

/// The arguments of a request.
fn body<T: ByteValued + Default>(message: &GuestBuffers) -> io::Result<T> {
    let mut args = T::default();
    let bytes = args.as_mut_slice();
    if message.copy_to(IN_HEADER, bytes) < bytes.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(args)
}

fn copy_range(share: &Passthrough, header: &Header, args: CopyFileRangeIn) -> io::Result<Vec<u8>> {
    if args.flags != 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let size = share.copy_range(&RangeCopy {
        from: (header.node, args.fh_in, args.offset_in),
        to: (args.nodeid_out, args.fh_out, args.offset_out),
        len: args.len,
        uid: header.uid,
    })?;
    Ok(WriteOut { size, padding: 0 }.as_slice().to_vec())
}

fn unnamed(share: &Passthrough, header: &Header, args: CreateIn) -> io::Result<Vec<u8>> {
    let (entry, handle, options) = share.create_unnamed((header.uid, header.gid), header.node, args)?;
    let open = OpenOut { fh: handle, open_flags: options.bits(), passthrough: 0 };
    Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
}

fn statx(share: &Passthrough, header: &Header, message: &GuestBuffers) -> io::Result<Vec<u8>> {
    let mut args = [0; STATX_IN];
    if message.copy_to(IN_HEADER, &mut args) < STATX_IN {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // Which handle it is asked of makes no difference to a file that is held.
    let [.., f0, f1, f2, f3, m0, m1, m2, m3] = args;
    let (flags, mask) = (u32::from_le_bytes([f0, f1, f2, f3]), u32::from_le_bytes([m0, m1, m2, m3]));
    let (stat, valid) = share.statx(header.node, flags, mask)?;

    let mut out = Vec::with_capacity(STATX_OUT);
    out.extend(valid.as_secs().to_le_bytes());
    out.extend(u64::from(valid.subsec_nanos()).to_le_bytes());
    out.extend([0; 16]);
    put_attributes(&mut out, &stat);
    // What follows, the number of the host's mount among it, is none of the guest's business.
    out.resize(STATX_OUT, 0);
    Ok(out)
}

/// `struct fuse_statx`, which begins as the system call's `struct statx` does.
fn put_attributes(out: &mut Vec<u8>, stat: &libc::statx) {
    out.extend([stat.stx_mask, stat.stx_blksize].into_iter().flat_map(u32::to_le_bytes));
    out.extend(stat.stx_attributes.to_le_bytes());
    out.extend([stat.stx_nlink, stat.stx_uid, stat.stx_gid].into_iter().flat_map(u32::to_le_bytes));
    out.extend(u32::from(stat.stx_mode).to_le_bytes());
    let words = [stat.stx_ino, stat.stx_size, stat.stx_blocks, stat.stx_attributes_mask];
    out.extend(words.into_iter().flat_map(u64::to_le_bytes));
    for time in [stat.stx_atime, stat.stx_btime, stat.stx_ctime, stat.stx_mtime] {
        out.extend(time.tv_sec.to_le_bytes());
        out.extend(u64::from(time.tv_nsec).to_le_bytes());
    }
    let devices = [stat.stx_rdev_major, stat.stx_rdev_minor, stat.stx_dev_major, stat.stx_dev_minor];
    out.extend(devices.into_iter().flat_map(u32::to_le_bytes));
}
