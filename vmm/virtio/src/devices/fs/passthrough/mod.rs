//! The files of a directory, as FUSE operations.
//!
//! | module | owns |
//! |---|---|
//! | `table` | what the guest holds, counted and limited |
//! | `directory`, `attributes` | reading directories; changing attributes |
//! | `credentials` | whose files are made, and with which privileges |
//! | `version` | whether what the guest has cached of a file is still so |
//! | `copies` | what the FUSE library does not know: copying, files without a name, whole file systems |
//! | `sys` | the system calls |
//!
//! A file is a descriptor opened with `O_PATH` from the moment that the guest looks it up until it forgets
//! it, so no path is ever resolved: a request names a file that is held, or one name in a directory that is.
//! Names are checked before anything else sees them. Only regular files and directories are ever opened for
//! more than that; FIFOs, sockets and devices are the guest's kernel's own business. Locks are too: the
//! guest's kernel keeps them.
//!
//! # What keeps a guest in the share
//! The share is not the root directory of the process that serves it, and need not be:
//! - Each step is one checked name below a directory that is held, by openat2(2) with `RESOLVE_BENEATH`,
//!   `RESOLVE_NO_SYMLINKS` and `RESOLVE_NO_MAGICLINKS`. So `..`, links of any kind, and directories that are
//!   moved while somebody goes through them lead nowhere. (A directory that the host moves out of the share
//!   after the guest has looked it up stays within reach, as for every process that has it open.)
//! - In a [jail](crate::jail) there is nothing to get out to. Its root is an empty directory that cannot be
//!   written to, with the share and the directory of sockets in it; Landlock lets files of the share alone be
//!   opened.
//! - The one directory besides is `/proc/self/fd`, in a procfs that shows the jail's own process only and is
//!   mounted nowhere, so that not even its `..` leads to the host's. (Where the kernel does not let the jail
//!   have one, it is the host's procfs.) All that is ever looked up in it are the numbers of descriptors that
//!   are held for the guest.
//! - The capabilities that the workers have are those over the ids of the VM's own user namespace: files of
//!   others that happen to be in the share are theirs as little as any other user's.

mod attributes;
mod copies;
mod credentials;
mod directory;
pub(super) mod sys;
mod table;
mod version;

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use caisson_vmm_api::devices::{CachePolicy, FsConfig};
use fuse_backend_rs::{
    abi::fuse_abi::{ATTR_SUBMOUNT, CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV},
    api::filesystem::{
        Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
        SetattrValid, ZeroCopyReader, ZeroCopyWriter,
    },
};
use libc::{stat64, statvfs64};
use nix::sys::statfs::{self, FsType};

pub(super) use self::copies::RangeCopy;
use self::{
    attributes::{MAX_XATTR, visible, visible_names},
    credentials::{AsCaller, Unprivileged},
    sys::errno,
    table::{Inode, Key, ROOT, Table},
};
use super::worker::Workers;

/// The longest name in a directory (NAME_MAX).
const MAX_NAME: usize = 255;
/// What of the guest's flags for open(2) reaches the host's. `O_DIRECT` does not: it goes around the guest's
/// cache, and the host's has no part in its promises.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC;

/// One shared directory.
pub(super) struct Passthrough {
    table: Table,
    workers: Arc<Workers>,
    cache: CachePolicy,
    read_only: bool,
    /// The guest makes a mount of its own where the host has one.
    submounts: AtomicBool,
    /// The guest has mounted it, and not said that it no longer has.
    mounted: AtomicBool,
}

/// A name is one step, down.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        name if name.contains(&b'/') => Err(errno(libc::EINVAL)),
        name if name.len() > MAX_NAME => Err(errno(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// Whether a file that is opened with these flags is written, and at its end.
fn appends(flags: i32) -> bool {
    flags & libc::O_APPEND != 0 && flags & libc::O_ACCMODE != libc::O_RDONLY
}

fn key(stat: &stat64, mount: u64) -> Key {
    Key { device: stat.st_dev, inode: stat.st_ino, mount }
}

/// Whether a file is on one of the file systems that do nothing when a file is closed. Those of a network send what
/// was written by then, and say what came of it.
fn closes_silently(inode: &Inode) -> bool {
    const SILENT: [FsType; 6] = [
        statfs::BTRFS_SUPER_MAGIC,
        statfs::EXT4_SUPER_MAGIC,
        statfs::F2FS_SUPER_MAGIC,
        statfs::OVERLAYFS_SUPER_MAGIC,
        statfs::TMPFS_MAGIC,
        statfs::XFS_SUPER_MAGIC,
    ];
    statfs::fstatfs(inode.fd()).is_ok_and(|found| SILENT.contains(&found.filesystem_type()))
}

impl Passthrough {
    /// Shares `root`.
    pub(super) fn new(config: &FsConfig, root: OwnedFd, workers: Arc<Workers>) -> io::Result<Self> {
        let (stat, mount) = sys::stat(root.as_fd())?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
            return Err(errno(libc::ENOTDIR));
        }
        Ok(Self {
            table: Table::new(root, key(&stat, mount), config.descriptor_limit(workers.spare_descriptors())),
            workers,
            cache: config.cache,
            read_only: config.read_only,
            submounts: AtomicBool::new(false),
            mounted: AtomicBool::new(false),
        })
    }

    /// Whether the guest has it mounted, or holds anything of it.
    pub(super) fn live(&self) -> bool {
        self.mounted.load(Ordering::Relaxed) || self.table.live()
    }

    /// Forgets all that the guest held.
    pub(super) fn clear(&self) {
        self.mounted.store(false, Ordering::Relaxed);
        self.table.clear();
    }

    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn held(&self) -> (usize, usize) {
        self.table.held()
    }

    fn descriptors(&self) -> BorrowedFd<'_> {
        self.workers.descriptors()
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(errno(libc::EROFS)) } else { Ok(()) }
    }

    /// A directory, and a name in it that is fit to be used.
    fn place(&self, parent: u64, name: &CStr) -> io::Result<Arc<Inode>> {
        check_name(name)?;
        let parent = self.table.inode(parent)?;
        if parent.is_dir() { Ok(parent) } else { Err(errno(libc::ENOTDIR)) }
    }

    /// The same, for changing it.
    fn place_to_change(&self, parent: u64, name: &CStr) -> io::Result<Arc<Inode>> {
        let parent = self.place(parent, name)?;
        self.check_writable().map(|()| parent)
    }

    /// Tells the guest of a file.
    fn entry(&self, parent: &Inode, fd: OwnedFd) -> io::Result<Entry> {
        let (attr, mount) = sys::stat(fd.as_fd())?;
        let inode = self.table.look_up(parent, fd, key(&attr, mount), attr.st_mode & libc::S_IFMT)?;
        inode.version.tell(&attr);
        let submount = self.submounts.load(Ordering::Relaxed)
            && inode.is_dir()
            && !inode.passing
            && mount != parent.key.mount;
        // The host can't unmount what is held here. So the guest is to forget it as soon as it has no use for it: Linux
        // does with a name that is not valid for any time, and is not on a mount of its own.
        let timeout = if inode.passing { Duration::ZERO } else { self.cache.timeout() };
        Ok(Entry {
            inode: inode.id,
            generation: 0,
            attr,
            attr_flags: if submount { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: timeout,
            entry_timeout: timeout,
        })
    }

    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        self.table.check_room()?;
        self.entry(parent, sys::open_beneath(parent.fd(), name, libc::O_PATH, 0)?)
    }

    /// Opens a file that the guest holds to be read or written.
    fn open_file(&self, inode: &Inode, flags: i32) -> io::Result<OwnedFd> {
        match inode.kind {
            libc::S_IFREG => sys::reopen(self.descriptors(), inode.fd(), flags & OPEN_FLAGS),
            libc::S_IFDIR => Err(errno(libc::EISDIR)),
            _ => Err(errno(libc::ENXIO)),
        }
    }

    /// How the guest is to cache a file that it opens, and whether it is to say when it closes it.
    fn open_options(&self, inode: &Inode, flags: i32) -> OpenOptions {
        let unchanged = || sys::stat(inode.fd()).is_ok_and(|(stat, _)| inode.version.holds(&stat));
        let cache = match self.cache {
            CachePolicy::Never => OpenOptions::DIRECT_IO,
            CachePolicy::Auto if unchanged() => OpenOptions::KEEP_CACHE,
            CachePolicy::Auto => OpenOptions::empty(),
            CachePolicy::Always => OpenOptions::KEEP_CACHE,
        };
        let silent = match flags & libc::O_ACCMODE {
            // Whoever only reads has nothing to bring to the disk, and no error to learn of: a request less for
            // every program that starts and every file that it reads.
            libc::O_RDONLY => true,
            // What is written without being mapped was given to the host's file system at once.
            libc::O_WRONLY => closes_silently(inode),
            // The guest's kernel brings what was changed through a mapping to the host when it says so.
            _ => false,
        };
        if silent { cache | sys::NO_FLUSH } else { cache }
    }

    /// The same for a directory, which has no pages that could go around a cache.
    fn directory_options(&self) -> OpenOptions {
        match self.cache {
            CachePolicy::Always => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
            CachePolicy::Never | CachePolicy::Auto => OpenOptions::empty(),
        }
    }

    fn open_flags(&self, flags: u32) -> io::Result<i32> {
        let flags = flags.cast_signed();
        let changes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        if changes {
            self.check_writable()?;
        }
        Ok(flags)
    }

    /// Makes something as the caller, and tells the guest of it.
    fn make(
        &self,
        context: &Context,
        parent: &Inode,
        name: &CStr,
        umask: u32,
        make: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Entry> {
        // Better not to make it than to make it and be unable to say so.
        self.table.check_room()?;
        let caller = AsCaller::new(context.uid, context.gid, umask)?;
        make()?;
        drop(caller);
        self.find(parent, name)
    }

    fn attributes(&self, inode: &Inode) -> io::Result<(stat64, Duration)> {
        let (stat, _) = sys::stat(inode.fd())?;
        inode.version.tell(&stat);
        Ok((stat, self.cache.timeout()))
    }

    fn sync(&self, inode: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.table.handle(handle, inode)?;
        if data_only { handle.file.sync_data() } else { handle.file.sync_all() }
    }
}

/// Files, handles and names come from the guest: each is looked up, none is believed.
impl FileSystem for Passthrough {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A guest that mounts once more has forgotten what it held.
        self.clear();
        self.mounted.store(true, Ordering::Relaxed);
        self.submounts.store(capable.contains(FsOptions::SUBMOUNTS), Ordering::Relaxed);
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::DONT_MASK
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::POSIX_ACL
            | FsOptions::MAX_PAGES
            | FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT;
        if self.cache == CachePolicy::Always {
            wanted |= FsOptions::CACHE_SYMLINKS;
        }
        Ok(wanted)
    }

    fn destroy(&self) {
        self.clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.place(parent, name)?;
        self.find(&parent, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.table.forget(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.attributes(&*self.table.inode(inode)?)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let node = self.table.inode(inode)?;
        self.check_writable()?;
        let handle = handle.map(|handle| self.table.handle(handle, inode)).transpose()?;
        self.change(&node, handle.as_deref(), &attr, valid)?;
        self.attributes(&node)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.table.inode(inode)?;
        if inode.kind == libc::S_IFLNK { sys::readlink(inode.fd()) } else { Err(errno(libc::EINVAL)) }
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.place_to_change(parent, name)?;
        self.make(context, &parent, name, 0, || sys::symlink(target, parent.fd(), name))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let parent = self.place_to_change(parent, name)?;
        match (mode & libc::S_IFMT, device) {
            (libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | 0, _) => {}
            // An overlay's mark for a deleted file, which takes no privilege and opens nothing.
            (libc::S_IFCHR, 0) => {}
            _ => return Err(errno(libc::EPERM)),
        }
        self.make(context, &parent, name, umask, || sys::mknod(parent.fd(), name, mode, 0))
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        let parent = self.place_to_change(parent, name)?;
        self.make(context, &parent, name, umask, || sys::mkdir(parent.fd(), name, mode))
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.place_to_change(parent, name)?;
        sys::unlink(parent.fd(), name, 0)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.place_to_change(parent, name)?;
        sys::unlink(parent.fd(), name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let from = self.place_to_change(old_parent, old_name)?;
        let to = self.place_to_change(new_parent, new_name)?;
        let _caller = match flags & libc::RENAME_WHITEOUT {
            0 => None,
            // It makes a file.
            _ => Some(AsCaller::new(context.uid, context.gid, 0)?),
        };
        sys::rename((from.fd(), old_name), (to.fd(), new_name), flags)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.place_to_change(parent, name)?;
        let inode = self.table.inode(inode)?;
        sys::link(self.descriptors(), inode.fd(), (parent.fd(), name))?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let inode = self.table.inode(inode)?;
        let flags = self.open_flags(flags)?;
        self.table.check_room()?;
        let _unprivileged = Unprivileged::new(fuse_flags & FOPEN_IN_KILL_SUIDGID != 0);
        let file = self.open_file(&inode, flags)?.into();
        let handle = self.table.open(&inode, file, appends(flags))?;
        Ok((Some(handle), self.open_options(&inode, flags), None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let parent = self.place_to_change(parent, name)?;
        let flags = self.open_flags(args.flags)?;
        self.table.check_room()?;
        let caller = AsCaller::new(context.uid, context.gid, args.umask)?;
        let new = (flags & OPEN_FLAGS) | libc::O_CREAT | libc::O_EXCL;
        let made = sys::open_beneath(parent.fd(), name, new, args.mode & 0o7777);
        drop(caller);
        let (entry, file) = match made {
            // By the descriptor, as the name may be another file's by now.
            Ok(file) => {
                let fd = sys::reopen(self.descriptors(), file.as_fd(), libc::O_PATH)?;
                (self.entry(&parent, fd)?, Ok(file))
            }
            // Somebody was faster, on the host; to be opened as any other, which it may not be fit for.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && flags & libc::O_EXCL == 0 => {
                let entry = self.find(&parent, name)?;
                let _unprivileged = Unprivileged::new(args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0);
                (entry, self.table.inode(entry.inode).and_then(|inode| self.open_file(&inode, flags)))
            }
            Err(error) => return Err(error),
        };
        let inode = self.table.inode(entry.inode)?;
        match file.and_then(|file| self.table.open(&inode, file.into(), appends(flags))) {
            Ok(handle) => Ok((entry, Some(handle), self.open_options(&inode, flags), None)),
            Err(error) => {
                self.table.forget(entry.inode, 1);
                Err(error)
            }
        }
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let handle = self.table.handle(handle, inode)?;
        let mut file = sys::alias(&handle.file);
        to.write_from(&mut *file, usize::try_from(size).unwrap_or(usize::MAX), offset)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        from_cache: bool,
        _: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.table.handle(handle, inode)?;
        // The handle's own mode is not enough: below, another way to the file may be opened.
        self.check_writable()?;
        // Pages that were changed through a mapping are written by any handle of the file, and to their own
        // place.
        let placed = (from_cache && handle.appends)
            .then(|| self.open_file(&*self.table.inode(inode)?, libc::O_WRONLY).map(File::from))
            .transpose()?;
        let mut file = sys::alias(placed.as_ref().unwrap_or(&handle.file));
        let _unprivileged = Unprivileged::new(fuse_flags & WRITE_KILL_PRIV != 0);
        from.read_to(&mut *file, usize::try_from(size).unwrap_or(usize::MAX), offset)
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, _: u64) -> io::Result<()> {
        // What is reported at a close, on file systems that report at a close.
        let handle = self.table.handle(handle, inode)?;
        let copy = handle.file.try_clone()?;
        nix::unistd::close(copy).map_err(io::Error::from)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.table.close(handle, inode)
    }

    fn fsync(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.sync(inode, handle, data_only)
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let handle = self.table.handle(handle, inode)?;
        self.check_writable()?;
        sys::fallocate(&handle.file, mode, offset, len)
    }

    fn lseek(&self, _: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let handle = self.table.handle(handle, inode)?;
        let offset = i64::try_from(offset).map_err(|_| errno(libc::ENXIO))?;
        // All others the guest's kernel knows by itself.
        match whence.cast_signed() {
            whence @ (libc::SEEK_DATA | libc::SEEK_HOLE) => sys::seek(&handle.file, offset, whence),
            _ => Err(errno(libc::EINVAL)),
        }
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        sys::statvfs(self.table.inode(inode)?.fd())
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let inode = self.table.inode(inode)?;
        self.check_writable()?;
        match (visible(name), value.len() <= MAX_XATTR) {
            (true, true) => sys::set_xattr(inode.fd(), name, value, flags),
            (true, false) => Err(errno(libc::E2BIG)),
            (false, _) => Err(errno(libc::EOPNOTSUPP)),
        }
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let inode = self.table.inode(inode)?;
        if !visible(name) {
            return Err(errno(libc::EOPNOTSUPP));
        }
        let mut value = vec![0; usize::try_from(size).unwrap_or(MAX_XATTR).min(MAX_XATTR)];
        let len = sys::get_xattr(inode.fd(), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(u32::try_from(len).unwrap_or(u32::MAX)));
        }
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.table.inode(inode)?;
        let mut names = vec![0; MAX_XATTR];
        let len = sys::list_xattrs(inode.fd(), &mut names)?;
        names.truncate(len);
        let names = visible_names(&names);
        let len = u32::try_from(names.len()).unwrap_or(u32::MAX);
        match size {
            0 => Ok(ListxattrReply::Count(len)),
            size if size < len => Err(errno(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.table.inode(inode)?;
        self.check_writable()?;
        if visible(name) { sys::remove_xattr(inode.fd(), name) } else { Err(errno(libc::EOPNOTSUPP)) }
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.table.inode(inode)?;
        if !inode.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        self.table.check_room()?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let file = File::from(sys::reopen(self.descriptors(), inode.fd(), flags)?);
        Ok((Some(self.table.open(&inode, file, false)?), self.directory_options()))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.table.handle(handle, inode)?;
        let inode = self.table.inode(inode)?;
        directory::read(&handle, &inode, size, offset, |entry, _| add(entry))
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.table.handle(handle, inode)?;
        let parent = self.table.inode(inode)?;
        directory::read(&handle, &parent, size, offset, |entry, name| {
            // An entry without an inode is one that the guest looks up by itself, should it want to.
            let found = check_name(name).and_then(|()| self.find(&parent, name)).unwrap_or_default();
            let added = add(entry, found);
            if !matches!(added, Ok(1..)) && found.inode > ROOT {
                self.table.forget(found.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.sync(inode, handle, data_only)
    }

    fn releasedir(&self, _: &Context, inode: u64, _: u32, handle: u64) -> io::Result<()> {
        self.table.close(handle, inode)
    }

    fn access(&self, context: &Context, inode: u64, mask: u32) -> io::Result<()> {
        // The guest's kernel checks permissions itself; this is for those that ask all the same.
        let inode = self.table.inode(inode)?;
        let (stat, _) = sys::stat(inode.fd())?;
        let mask = mask & 0o7;
        if mask & 0o2 != 0 {
            self.check_writable()?;
        }
        let granted = match (context.uid, context.gid) {
            (0, _) if inode.is_dir() || stat.st_mode & 0o111 != 0 => 0o7,
            (0, _) => 0o6,
            (uid, _) if uid == stat.st_uid => stat.st_mode >> 6,
            (_, gid) if gid == stat.st_gid => stat.st_mode >> 3,
            _ => stat.st_mode,
        };
        if mask & !granted == 0 { Ok(()) } else { Err(errno(libc::EACCES)) }
    }
}
