//! Reading directories.

use std::{
    ffi::CStr,
    io,
    sync::{Arc, PoisonError},
};

use fuse_backend_rs::api::filesystem::DirEntry;

use super::{
    sys,
    table::{Handle, Inode, ROOT},
};

/// Bytes of `struct linux_dirent64` before the name.
const HEADER: usize = 19;
/// What one call reads at most, whatever the guest asks for.
const BUFFER: u32 = 64 << 10;

/// Calls `add` with each entry from `offset` on, until it says that there is no room for more, or the buffer that
/// `size` allows is used up.
pub(super) fn read(
    handle: &Arc<Handle>,
    inode: &Inode,
    size: u32,
    offset: u64,
    mut add: impl FnMut(DirEntry<'_>, &CStr) -> io::Result<usize>,
) -> io::Result<()> {
    if !inode.is_dir() {
        return Err(sys::errno(libc::ENOTDIR));
    }
    let mut buffer = vec![0; usize::try_from(size.clamp(1024, BUFFER)).unwrap_or(1024)];
    let len = {
        let _position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
        // Positions are opaque numbers, some file systems' with the highest bit set.
        sys::seek(&handle.file, offset.cast_signed(), libc::SEEK_SET)?;
        sys::getdents(&handle.file, &mut buffer)?
    };
    let mut rest = buffer.get(..len).unwrap_or_default();
    let mut first = true;
    while let Some((entry, name, next)) = parse(rest, inode) {
        match add(entry, name) {
            Ok(0) => break,
            Ok(_) => {}
            // What was added before is not lost by an error; it comes again with the next call.
            Err(error) if first => return Err(error),
            Err(_) => break,
        }
        first = false;
        rest = next;
    }
    Ok(())
}

/// The entry at the start of `bytes`, and what follows it.
fn parse<'a>(bytes: &'a [u8], dir: &Inode) -> Option<(DirEntry<'a>, &'a CStr, &'a [u8])> {
    let (header, _) = bytes.split_first_chunk::<HEADER>()?;
    let [i0, i1, i2, i3, i4, i5, i6, i7, o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, kind] = *header;
    let len = usize::from(u16::from_ne_bytes([l0, l1]));
    let name = CStr::from_bytes_until_nul(bytes.get(HEADER..len)?).ok()?;
    // What is above the root is none of the guest's business.
    let outside = dir.id == ROOT && name == c"..";
    let ino = if outside { dir.key.inode } else { u64::from_ne_bytes([i0, i1, i2, i3, i4, i5, i6, i7]) };
    let offset = u64::from_ne_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
    let entry = DirEntry { ino, offset, type_: u32::from(kind), name: name.to_bytes() };
    Some((entry, name, bytes.get(len..)?))
}
