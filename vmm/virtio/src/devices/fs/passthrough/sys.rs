//! The system calls: each on a descriptor, or on one name in a directory that is one. The only unsafe code
//! here, and so also the flag that the FUSE library has no name for.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    mem::{self, ManuallyDrop, MaybeUninit},
    ops::DerefMut,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use fuse_backend_rs::api::filesystem::OpenOptions;
use libc::{c_int, mode_t, stat64, statvfs64};

/// `FOPEN_NOFLUSH` (linux/fuse.h): no FLUSH when the file is closed. Kernels before 6.2 do not know it, and send it.
// SAFETY: the type says which bits have names there; all are only ever handed on as a number.
pub(super) const NO_FLUSH: OpenOptions = unsafe { OpenOptions::from_bits_unchecked(1 << 5) };

/// What a call returned, or errno.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The name of a descriptor in `/proc/self/fd`.
fn number(fd: BorrowedFd<'_>) -> io::Result<CString> {
    CString::new(fd.as_raw_fd().to_string()).map_err(io::Error::other)
}

/// An error by its number.
pub(super) fn errno(number: c_int) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Gives the calling thread a working directory (`descriptors`, so that extended attributes, whose calls know
/// no directory but that, are found by a descriptor's number) and a file mode creation mask (none) of its
/// own.
pub(in super::super) fn private_directory(descriptors: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers. The standard library shares neither between threads by contract.
    check(unsafe { libc::unshare(libc::CLONE_FS) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::fchdir(descriptors.as_raw_fd()) })?;
    umask(0);
    Ok(())
}

/// Sets the calling thread's file mode creation mask.
pub(super) fn umask(mask: u32) {
    // SAFETY: no pointers, never fails.
    unsafe { libc::umask(mask & 0o777) };
}

/// The calling thread's ids for file systems, after an attempt to set them. Raw calls, as those of the C
/// library may speak for all threads.
pub(super) fn set_fs_ids(uid: u32, gid: u32) -> (i64, i64) {
    // SAFETY: no pointers. An id that is not valid changes nothing and returns the current one.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
        (libc::syscall(libc::SYS_setfsuid, u32::MAX), libc::syscall(libc::SYS_setfsgid, u32::MAX))
    }
}

/// The process's own ids.
pub(super) fn own_ids() -> (u32, u32) {
    // SAFETY: no pointers, never fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Opens `name` in `dir`, and nothing else: no link is followed, neither symbolic nor magic, and no way leads
/// out.
pub(super) fn open_beneath(dir: BorrowedFd<'_>, name: &CStr, flags: c_int, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut how: libc::open_how = unsafe { mem::zeroed() };
    how.flags = u64::from((flags | libc::O_CLOEXEC | libc::O_NOFOLLOW).unsigned_abs());
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;
    let size = mem::size_of::<libc::open_how>();
    // SAFETY: the name is a C string, and the structure is as long as said.
    let fd =
        unsafe { libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), name.as_ptr(), &raw const how, size) };
    let fd = c_int::try_from(fd).map_err(|_| errno(libc::EMFILE))?;
    // SAFETY: a descriptor that was just made, and belongs to nobody yet.
    check(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens what `fd` names once more, with other flags.
pub(super) fn reopen(descriptors: BorrowedFd<'_>, fd: BorrowedFd<'_>, flags: c_int) -> io::Result<OwnedFd> {
    let name = number(fd)?;
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: the name is a C string.
    let fd = check(unsafe { libc::openat(descriptors.as_raw_fd(), name.as_ptr(), flags) })?;
    // SAFETY: a descriptor that was just made, and belongs to nobody yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file's attributes, and the id of the mount that it was found on.
pub(super) fn stat(fd: BorrowedFd<'_>) -> io::Result<(stat64, u64)> {
    let mut stat = MaybeUninit::<stat64>::zeroed();
    let mut more = MaybeUninit::<libc::statx>::zeroed();
    let (fd, empty) = (fd.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: the name is a C string, the structure is writable.
    check(unsafe { libc::fstatat64(fd, c"".as_ptr(), stat.as_mut_ptr(), empty) })?;
    // SAFETY: as above.
    check(unsafe { libc::statx(fd, c"".as_ptr(), empty, libc::STATX_MNT_ID, more.as_mut_ptr()) })?;
    // SAFETY: plain structures that were zeroed, and are now filled in.
    Ok(unsafe { (stat.assume_init(), more.assume_init().stx_mnt_id) })
}

/// The state of the file system that a file is on.
pub(super) fn statvfs(fd: BorrowedFd<'_>) -> io::Result<statvfs64> {
    let mut stat = MaybeUninit::<statvfs64>::zeroed();
    // SAFETY: the structure is writable.
    check(unsafe { libc::fstatvfs64(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: a plain structure that was zeroed, and is now filled in.
    Ok(unsafe { stat.assume_init() })
}

pub(super) fn mkdir(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: the name is a C string.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

pub(super) fn mknod(dir: BorrowedFd<'_>, name: &CStr, mode: mode_t, device: u64) -> io::Result<()> {
    // SAFETY: the name is a C string.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) }).map(drop)
}

pub(super) fn symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: both names are C strings.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }).map(drop)
}

pub(super) fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: c_int) -> io::Result<()> {
    // SAFETY: the name is a C string.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

/// One name in one directory.
pub(super) type Place<'a> = (BorrowedFd<'a>, &'a CStr);

pub(super) fn rename(from: Place<'_>, to: Place<'_>, flags: u32) -> io::Result<()> {
    let ((from_dir, from), (to_dir, to)) = (from, to);
    // SAFETY: both names are C strings.
    check(unsafe {
        libc::renameat2(from_dir.as_raw_fd(), from.as_ptr(), to_dir.as_raw_fd(), to.as_ptr(), flags)
    })
    .map(drop)
}

/// Gives what `fd` names another name. (By the descriptor itself it would take CAP_DAC_READ_SEARCH.)
pub(super) fn link(descriptors: BorrowedFd<'_>, fd: BorrowedFd<'_>, to: Place<'_>) -> io::Result<()> {
    let (from, (dir, name)) = (number(fd)?, to);
    // SAFETY: both names are C strings.
    check(unsafe {
        libc::linkat(
            descriptors.as_raw_fd(),
            from.as_ptr(),
            dir.as_raw_fd(),
            name.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    })
    .map(drop)
}

pub(super) fn readlink(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut target = vec![0; 4096];
    // SAFETY: the buffer is as long as said.
    let len = length(unsafe {
        libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), target.as_mut_ptr().cast(), target.len())
    })?;
    target.truncate(len);
    Ok(target)
}

pub(super) fn chmod(descriptors: BorrowedFd<'_>, fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let name = number(fd)?;
    // SAFETY: the name is a C string.
    check(unsafe { libc::fchmodat(descriptors.as_raw_fd(), name.as_ptr(), mode, 0) }).map(drop)
}

/// Changes a file's owner and group; [`u32::MAX`] keeps one as it is.
pub(super) fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: the name is a C string.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }).map(drop)
}

/// Sets the times of access and of change.
pub(super) fn utimens(
    descriptors: BorrowedFd<'_>,
    fd: BorrowedFd<'_>,
    times: &[libc::timespec; 2],
) -> io::Result<()> {
    let name = number(fd)?;
    // SAFETY: the name is a C string, and there are two times.
    check(unsafe { libc::utimensat(descriptors.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) }).map(drop)
}

/// Opens a new file in `dir` that has no name.
pub(super) fn open_unnamed(dir: BorrowedFd<'_>, flags: c_int, mode: u32) -> io::Result<OwnedFd> {
    open_beneath(dir, c".", flags | libc::O_TMPFILE, mode)
}

/// All that is known of a file.
pub(super) fn statx(fd: BorrowedFd<'_>, flags: c_int, mask: u32) -> io::Result<libc::statx> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | (flags & libc::AT_STATX_SYNC_TYPE);
    // SAFETY: the name is a C string, the structure is writable.
    check(unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, mask, stat.as_mut_ptr()) })?;
    // SAFETY: a plain structure that was zeroed, and is now filled in.
    Ok(unsafe { stat.assume_init() })
}

/// Brings everything of the file system that a file is on to its disk.
pub(super) fn sync_file_system(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) }).map(drop)
}

/// Copies at most `len` bytes between two positions; how many it were.
pub(super) fn copy_range(from: (&File, u64), to: (&File, u64), len: usize) -> io::Result<usize> {
    let (mut start, mut target) = (offset(from.1)?, offset(to.1)?);
    let (from, to) = (from.0.as_raw_fd(), to.0.as_raw_fd());
    // SAFETY: both positions are writable.
    length(unsafe { libc::copy_file_range(from, &raw mut start, to, &raw mut target, len, 0) })
}

/// A length or position, as the kernel takes it.
fn offset(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| errno(libc::EINVAL))
}

pub(super) fn truncate(file: &File, len: u64) -> io::Result<()> {
    let len = i64::try_from(len).map_err(|_| errno(libc::EFBIG))?;
    // SAFETY: no pointers.
    check(unsafe { libc::ftruncate64(file.as_raw_fd(), len) }).map(drop)
}

pub(super) fn fallocate(file: &File, mode: u32, start: u64, len: u64) -> io::Result<()> {
    let mode = c_int::try_from(mode).map_err(|_| errno(libc::EOPNOTSUPP))?;
    // SAFETY: no pointers.
    check(unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset(start)?, offset(len)?) }).map(drop)
}

pub(super) fn seek(file: &File, to: i64, whence: c_int) -> io::Result<u64> {
    // SAFETY: no pointers.
    let at = unsafe { libc::lseek64(file.as_raw_fd(), to, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

/// The same file once more, for those who want it exclusively though its position does not matter to them.
pub(super) fn alias(file: &File) -> impl DerefMut<Target = File> + use<'_> {
    // SAFETY: the descriptor stays open for as long as `file` is borrowed, and is not closed by this copy.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}

/// Reads entries of a directory into `buffer`; how many bytes of it they take.
pub(super) fn getdents(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the buffer is as long as said.
    let len = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len()) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Reads an extended attribute, at most `size` bytes; with 0, how long it is, as the length of nothing.
pub(super) fn get_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    let file = number(fd)?;
    // SAFETY: both names are C strings, and the buffer is as long as said.
    length(unsafe { libc::getxattr(file.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })
}

pub(super) fn list_xattrs(fd: BorrowedFd<'_>, names: &mut [u8]) -> io::Result<usize> {
    let file = number(fd)?;
    // SAFETY: the name is a C string, and the buffer is as long as said.
    length(unsafe { libc::listxattr(file.as_ptr(), names.as_mut_ptr().cast(), names.len()) })
}

pub(super) fn set_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    let file = number(fd)?;
    let flags = c_int::try_from(flags).map_err(|_| errno(libc::EINVAL))?;
    // SAFETY: both names are C strings, and the value is as long as said.
    check(unsafe { libc::setxattr(file.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
        .map(drop)
}

pub(super) fn remove_xattr(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let file = number(fd)?;
    // SAFETY: both names are C strings.
    check(unsafe { libc::removexattr(file.as_ptr(), name.as_ptr()) }).map(drop)
}
