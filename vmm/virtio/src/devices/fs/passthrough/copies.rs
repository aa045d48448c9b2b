//! What the FUSE library has no methods for: copying within the share, files without a name, and whole file
//! systems.

use std::{io, os::fd::AsFd, time::Duration};

use fuse_backend_rs::{
    abi::fuse_abi::CreateIn,
    api::filesystem::{Entry, OpenOptions},
};

use super::{
    OPEN_FLAGS, Passthrough, appends,
    credentials::{AsCaller, Unprivileged},
    sys::{self, errno},
};

/// What one request copies at most, so that it keeps a worker from others for no longer than a long write
/// does; the guest asks again for the rest.
const MAX_COPY: u64 = 16 << 20;

/// A part of one open file that is to be copied into another: for each its node, its handle and a position.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct RangeCopy {
    pub(in super::super) from: (u64, u64, u64),
    pub(in super::super) to: (u64, u64, u64),
    pub(in super::super) len: u64,
    /// Who asks for it.
    pub(in super::super) uid: u32,
}

impl Passthrough {
    /// Copies within the host, where the file system may share blocks; how many bytes it were.
    pub(in super::super) fn copy_range(&self, copy: &RangeCopy) -> io::Result<u32> {
        let from = self.table.handle(copy.from.1, copy.from.0)?;
        let to = self.table.handle(copy.to.1, copy.to.0)?;
        self.check_writable()?;
        let _unprivileged = Unprivileged::new(copy.uid != 0);
        let len = usize::try_from(copy.len.min(MAX_COPY)).unwrap_or(0);
        let copied = sys::copy_range((&from.file, copy.from.2), (&to.file, copy.to.2), len)?;
        u32::try_from(copied).map_err(io::Error::other)
    }

    /// Makes a file without a name in a directory, and opens it.
    pub(in super::super) fn create_unnamed(
        &self,
        (uid, gid): (u32, u32),
        parent: u64,
        args: CreateIn,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let parent = self.table.inode(parent)?;
        self.check_writable()?;
        if !parent.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        // For the file, and for its handle.
        self.table.check_room()?;
        let flags = args.flags.cast_signed();
        let caller = AsCaller::new(uid, gid, args.umask)?;
        // One that is made exclusively can never be given a name.
        let file = sys::open_unnamed(parent.fd(), flags & (OPEN_FLAGS | libc::O_EXCL), args.mode & 0o7777)?;
        drop(caller);
        let fd = sys::reopen(self.descriptors(), file.as_fd(), libc::O_PATH)?;
        let entry = self.entry(&parent, fd)?;
        let inode = self.table.inode(entry.inode)?;
        match self.table.open(&inode, file.into(), appends(flags)) {
            Ok(handle) => Ok((entry, handle, self.open_options(&inode, flags))),
            Err(error) => {
                self.table.forget(entry.inode, 1);
                Err(error)
            }
        }
    }

    /// Everything that is known of a file, and for how long it may be believed.
    pub(in super::super) fn statx(
        &self,
        inode: u64,
        flags: u32,
        mask: u32,
    ) -> io::Result<(libc::statx, Duration)> {
        let inode = self.table.inode(inode)?;
        Ok((sys::statx(inode.fd(), flags.cast_signed(), mask)?, self.cache.timeout()))
    }

    /// Brings all of the file system that a file is on to its disk, as sync(2) of any process on the host
    /// would.
    pub(in super::super) fn sync_file_system(&self, inode: u64) -> io::Result<()> {
        let inode = self.table.inode(inode)?;
        if self.read_only {
            return Ok(());
        }
        if !inode.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        self.table.check_room()?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        sys::sync_file_system(sys::reopen(self.descriptors(), inode.fd(), flags)?.as_fd())
    }
}
