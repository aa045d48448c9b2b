//! System calls that neither nix nor rustix wraps, and mounts by descriptor with this crate's conventions. All descriptors
//! made here are close-on-exec.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long, c_uint};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit};
use rustix::pty::OpenptFlags;
use rustix::thread::{CapabilitySet, CapabilitySets};

pub(crate) const OPEN_TREE_CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE;
pub(crate) const AT_RECURSIVE: OpenTreeFlags = OpenTreeFlags::AT_RECURSIVE;

/// The kernel's verdict as a result.
pub(crate) fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// open_tree(2). Without a directory, from the working directory; an empty path is the directory itself.
pub(crate) fn open_tree(
    dir: Option<BorrowedFd<'_>>,
    path: &CStr,
    flags: OpenTreeFlags,
) -> io::Result<OwnedFd> {
    let flags = flags | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(dir.unwrap_or(CWD), path, flags)?)
}

/// Changes to a mount's attributes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE or 0.
    pub(crate) propagation: u64,
    /// For MOUNT_ATTR_IDMAP.
    pub(crate) userns: Option<RawFd>,
}

impl MountAttr {
    pub(crate) fn set(set: u64) -> MountAttr {
        MountAttr { set, ..MountAttr::default() }
    }

    pub(crate) fn propagation(propagation: u64) -> MountAttr {
        MountAttr { propagation, ..MountAttr::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.set == 0 && self.clear == 0 && self.propagation == 0 && self.userns.is_none()
    }
}

/// mount_setattr(2) of the mount whose root `mount` is.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> io::Result<()> {
    if attr.is_empty() {
        return Ok(());
    }
    let raw = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: attr.clear,
        propagation: attr.propagation,
        userns_fd: attr.userns.and_then(|fd| u64::try_from(fd).ok()).unwrap_or(0),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure outlives the call and its size is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw,
            size_of_val(&raw),
        )
    })?;
    Ok(())
}

/// move_mount(2) of a detached mount onto what `target` refers to.
pub(crate) fn move_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, c"", target, c"", flags)?)
}

/// A file system that is being configured, fsopen(2).
#[derive(Debug)]
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    pub(crate) fn open(kind: &CStr) -> io::Result<FsContext> {
        Ok(FsContext(rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?))
    }

    /// Sets a parameter, or a flag when there is no value.
    pub(crate) fn set(&self, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(self.0.as_fd(), key, value)?,
            None => rustix::mount::fsconfig_set_flag(self.0.as_fd(), key)?,
        }
        Ok(())
    }

    /// Makes the file system and a detached mount of it.
    pub(crate) fn mount(self, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
        rustix::mount::fsconfig_create(self.0.as_fd())?;
        Ok(rustix::mount::fsmount(self.0.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
    }
}

/// openat2(2).
pub(crate) fn openat2(
    dir: BorrowedFd<'_>,
    path: &CStr,
    flags: OFlags,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    loop {
        match rustix::fs::openat2(dir, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // A rename elsewhere raced with "..": the kernel asks to try again.
            Err(rustix::io::Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
}

/// pidfd_open(2).
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    Ok(rustix::process::pidfd_open(process(pid)?, PidfdFlags::empty())?)
}

fn process(pid: u32) -> io::Result<Pid> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// pidfd_send_signal(2). A container may be sent real-time signals, for which rustix has no values.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, 0 as c_uint)
    })?;
    Ok(())
}

/// Forks a child of this process's parent. Returns 0 in the child.
///
/// # Safety
/// The calling process must be single-threaded.
pub(crate) unsafe fn fork_sibling() -> io::Result<c_long> {
    // SAFETY: without CLONE_VM and a new stack this is a fork; the caller vouches that no thread holds a lock.
    check(unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::c_ulong::from(libc::CLONE_PARENT.cast_unsigned()),
            0_u64,
            0_u64,
            0_u64,
            0_u64,
        )
    })
}

/// Leaves the session keyring behind for a new one. Kernels without keyrings have nothing to leave.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name asks for an anonymous keyring.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, null) }) {
        Err(error) if error.raw_os_error() != Some(libc::ENOSYS) => Err(error),
        _ => Ok(()),
    }
}

/// The calling thread's permitted capabilities.
pub(crate) fn permitted() -> io::Result<u64> {
    Ok(rustix::thread::capabilities(None)?.permitted.bits())
}

/// Sets the calling thread's effective, permitted and inheritable capabilities.
pub(crate) fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let [effective, permitted, inheritable] =
        [effective, permitted, inheritable].map(CapabilitySet::from_bits_retain);
    Ok(rustix::thread::set_capabilities(None, CapabilitySets { effective, permitted, inheritable })?)
}

/// Installs a seccomp filter for the calling thread.
pub(crate) fn seccomp(program: &[libc::sock_filter], flags: c_uint) -> io::Result<()> {
    const SECCOMP_SET_MODE_FILTER: c_uint = 1;
    let len =
        libc::c_ushort::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program outlives the call, which only reads it.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program) })?;
    Ok(())
}

/// prlimit(2), setting only. RLIM_INFINITY is `u64::MAX`.
pub(crate) fn prlimit(pid: u32, resource: Resource, soft: u64, hard: u64) -> io::Result<()> {
    let [current, maximum] = [soft, hard].map(|limit| (limit != u64::MAX).then_some(limit));
    rustix::process::prlimit(Some(process(pid)?), resource, Rlimit { current, maximum })?;
    Ok(())
}

/// sched_setattr(2).
pub(crate) fn sched_setattr(pid: u32, attr: &SchedAttr) -> io::Result<()> {
    // SAFETY: the structure outlives the call and states its size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, attr, 0 as c_uint) })?;
    Ok(())
}

/// `struct sched_attr`, first version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// ioprio_set(2) of one process.
pub(crate) fn ioprio_set(pid: u32, priority: c_int) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, priority) })?;
    Ok(())
}

/// close_range(2) from `first` on.
pub(crate) fn close_from(first: c_uint) -> io::Result<()> {
    // SAFETY: the callers own no Rust descriptor in that range any more, or exec right after.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, c_uint::MAX, 0 as c_uint) })?;
    Ok(())
}

/// Unlocks a pseudo-terminal and opens its other side without a look at any path.
pub(crate) fn open_terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    rustix::pty::unlockpt(master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    Ok(rustix::pty::ioctl_tiocgptpeer(master, flags)?)
}

/// Sets a terminal's size in characters.
pub(crate) fn resize(terminal: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// How often bpf(2) is asked again. The verifier gives up with EAGAIN when a signal arrives, as SIGCHLD does often here.
const BPF_TRIES: usize = 100;

/// bpf(2) with one of the attribute structures of [`super::cgroup`].
pub(crate) fn bpf<T>(command: c_int, attr: &mut T) -> io::Result<c_long> {
    let mut call = || {
        // SAFETY: the attributes outlive the call and their size is given; pointers in them are the caller's to keep.
        check(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) })
    };
    for _ in 1..BPF_TRIES {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            result => return result,
        }
    }
    call()
}

/// bpf(2) with a command that makes a descriptor.
pub(crate) fn bpf_fd<T>(command: c_int, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(bpf(command, attr)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
