use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
};

use libc::{c_int, c_long};

use super::{JailError, step};

/// The descriptors that a process was started with.
///
/// Noted first of all, it tells later which ones the process has opened itself and so wants to keep. Of those
/// that it was started with it makes duplicates if it wants them: whatever else a careless parent left open
/// is closed.
#[derive(Debug)]
pub struct Inherited(BTreeSet<RawFd>);

impl Inherited {
    /// Notes what is open now.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn note() -> io::Result<Self> {
        open_descriptors().map(Self)
    }

    /// What has been opened since.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn opened_since(&self) -> io::Result<Vec<RawFd>> {
        Ok(open_descriptors()?.difference(&self.0).copied().collect())
    }
}

fn open_descriptors() -> io::Result<BTreeSet<RawFd>> {
    let names = fs::read_dir("/proc/self/fd")?.map(|entry| entry.map(|entry| entry.file_name()));
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let numbers = names.iter().filter_map(|name| name.to_str()?.parse().ok());
    // The directory itself was open while it was read, and is not any more.
    Ok(numbers.filter(|fd| is_open(*fd)).collect())
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes no argument, and fails on a number that is not open.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// Closes every descriptor but 0 to 2, those in `keep`, and `link`.
pub(super) fn close_all_but(keep: &[RawFd], link: RawFd) -> Result<(), JailError> {
    let mut kept: Vec<u32> =
        keep.iter().chain([&link]).filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut from = 3;
    for fd in kept {
        if from < fd {
            close_range(from, fd - 1)?;
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX)
}

/// Closes descriptors `first` to `last`, both included; see close_range(2).
pub(super) fn close_range(first: u32, last: u32) -> Result<(), JailError> {
    // SAFETY: no argument is a pointer. What is closed is, by the contract of `Jail::new`, used by nobody.
    let result = unsafe { libc::close_range(first, last, 0) };
    if result == 0 { Ok(()) } else { Err(step("closing descriptors")(std::io::Error::last_os_error())) }
}

/// The calling process's `/proc/self/fd`, to reach what is in it by name, but not to list.
///
/// # Errors
/// When procfs is not mounted.
pub fn own_descriptors() -> io::Result<OwnedFd> {
    let mut options = fs::File::options();
    options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
    options.open("/proc/self/fd").map(OwnedFd::from)
}

/// The same, in a procfs that shows nothing but the processes of this PID namespace and is mounted nowhere:
/// whoever gets hold of the descriptor finds no way from it to the host's processes and settings. Where the
/// kernel does not let a user namespace have a procfs of its own, it is the host's.
pub(super) fn private_descriptors() -> io::Result<OwnedFd> {
    private_procfs().and_then(|procfs| open_at(&procfs, c"self/fd")).or_else(|_| own_descriptors())
}

/// FSCONFIG_SET_STRING and FSCONFIG_CMD_CREATE (`linux/mount.h`).
const SET_STRING: c_int = 1;
const CREATE: c_int = 6;

fn private_procfs() -> io::Result<OwnedFd> {
    // SAFETY: a C string.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), CLOEXEC) })?;
    let fd = context.as_raw_fd();
    let (key, value) = (c"subset".as_ptr(), c"pid".as_ptr());
    // SAFETY: C strings, as this command takes them.
    succeeded(unsafe { libc::syscall(libc::SYS_fsconfig, fd, SET_STRING, key, value, 0) })?;
    let none = std::ptr::null::<u8>();
    // SAFETY: this command takes nothing.
    succeeded(unsafe { libc::syscall(libc::SYS_fsconfig, fd, CREATE, none, none, 0) })?;
    let flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: no pointers.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, fd, CLOEXEC, flags) })
}

/// FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
const CLOEXEC: c_int = 1;

fn open_at(dir: &OwnedFd, path: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: a C string.
    owned(unsafe { libc::openat(dir.as_raw_fd(), path.as_ptr(), flags) }.into())
}

fn succeeded(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(succeeded(result)?).map_err(io::Error::other)?;
    // SAFETY: a descriptor that was just made, and belongs to nobody yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
