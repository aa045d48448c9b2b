//! System calls that nix does not wrap, or not on descriptors. All descriptors made here are close-on-exec.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long, c_uint};

pub(crate) const OPEN_TREE_CLONE: c_uint = 1;
pub(crate) const AT_RECURSIVE: c_uint = 0x8000;
const OPEN_TREE_CLOEXEC: c_uint = 0o2_000_000;
const AT_EMPTY_PATH: c_uint = 0x1000;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;
const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;

/// The kernel's verdict as a result.
pub(crate) fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn at(dir: Option<BorrowedFd<'_>>) -> c_int {
    dir.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd())
}

/// open_tree(2). Without a directory, from the working directory; an empty path is the directory itself.
pub(crate) fn open_tree(dir: Option<BorrowedFd<'_>>, path: &CStr, flags: c_uint) -> io::Result<OwnedFd> {
    let flags = flags | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH;
    // SAFETY: `path` is a string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, at(dir), path.as_ptr(), flags) })
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
    let flags = AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
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
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (mount.as_raw_fd(), target.as_raw_fd());
    // SAFETY: both strings are static.
    check(unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, c"".as_ptr(), flags) })?;
    Ok(())
}

/// A file system that is being configured, fsopen(2).
#[derive(Debug)]
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    pub(crate) fn open(kind: &CStr) -> io::Result<FsContext> {
        // SAFETY: `kind` is a string that outlives the call.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) }).map(FsContext)
    }

    /// Sets a parameter, or a flag when there is no value.
    pub(crate) fn set(&self, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
        let (command, value) = match value {
            Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
            None => (FSCONFIG_SET_FLAG, std::ptr::null()),
        };
        // SAFETY: `key` and `value` are strings that outlive the call, or `value` is null for a flag.
        check(unsafe {
            libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key.as_ptr(), value, 0 as c_int)
        })?;
        Ok(())
    }

    /// Makes the file system and a detached mount of it.
    pub(crate) fn mount(self, attributes: u64) -> io::Result<OwnedFd> {
        let null = std::ptr::null::<libc::c_char>();
        // SAFETY: this command takes neither key nor value.
        check(unsafe {
            libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0 as c_int)
        })?;
        // SAFETY: no pointers.
        owned(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
    }
}

/// openat2(2).
pub(crate) fn openat2(dir: BorrowedFd<'_>, path: &CStr, flags: c_int, resolve: u64) -> io::Result<OwnedFd> {
    // SAFETY: all-zero is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((flags | libc::O_CLOEXEC).cast_unsigned());
    how.resolve = resolve;
    loop {
        // SAFETY: path and structure outlive the call, and the structure's size is given.
        let result = owned(unsafe {
            libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path.as_ptr(), &how, size_of_val(&how))
        });
        match result {
            // A rename elsewhere raced with "..": the kernel asks to try again.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            other => return other,
        }
    }
}

/// pidfd_open(2).
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0 as c_uint) })
}

/// pidfd_send_signal(2).
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, 0 as c_uint)
    })?;
    Ok(())
}

/// setns(2), on an nsfs file or a pidfd.
pub(crate) fn setns(fd: BorrowedFd<'_>, flags: c_int) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::setns(fd.as_raw_fd(), flags) }.into())?;
    Ok(())
}

/// unshare(2).
pub(crate) fn unshare(flags: c_int) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(flags) }.into())?;
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

/// prctl(2) without pointers.
pub(crate) fn prctl(option: c_int, argument: u64, second: u64) -> io::Result<c_int> {
    // SAFETY: only used with options that take integers.
    let result = check(unsafe { libc::prctl(option, argument, second, 0_u64, 0_u64) }.into())?;
    Ok(c_int::try_from(result).unwrap_or(c_int::MAX))
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

/// prctl(2) PR_CAP_AMBIENT.
pub(crate) fn prctl_ambient(operation: c_int, capability: u64) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, u64::from(operation.cast_unsigned()), capability)?;
    Ok(())
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3: two words a set.
const CAPABILITY_HEADER: CapabilityHeader = CapabilityHeader { version: 0x2008_0522, pid: 0 };

/// The calling thread's permitted capabilities.
pub(crate) fn permitted() -> io::Result<u64> {
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: header and data have the layout of version 3 and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capget, &CAPABILITY_HEADER, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Sets the calling thread's effective, permitted and inheritable capabilities.
pub(crate) fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let word = |set: u64, shift: u32| u32::try_from((set >> shift) & 0xffff_ffff).unwrap_or(0);
    let data = [0, 32].map(|shift| CapabilityData {
        effective: word(effective, shift),
        permitted: word(permitted, shift),
        inheritable: word(inheritable, shift),
    });
    // SAFETY: header and data have the layout of version 3 and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &CAPABILITY_HEADER, data.as_ptr()) })?;
    Ok(())
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
pub(crate) fn prlimit(pid: u32, resource: c_int, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    let old = std::ptr::null_mut::<libc::rlimit64>();
    // SAFETY: the structure outlives the call; a null old limit is allowed.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, &limit, old) })?;
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

/// Terminal ioctls with an integer argument.
pub(crate) fn ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: c_int) -> io::Result<c_int> {
    // SAFETY: only used with requests that take an integer.
    let result = check(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }.into())?;
    Ok(c_int::try_from(result).unwrap_or(0))
}

/// Unlocks a pseudo-terminal and opens its other side without a look at any path.
pub(crate) fn open_terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlocked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) }.into())?;
    let peer = ioctl(master, libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)?;
    owned(peer.into())
}

/// Sets a terminal's size in characters.
pub(crate) fn resize(terminal: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) }.into())?;
    Ok(())
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
    owned(bpf(command, attr)?)
}
