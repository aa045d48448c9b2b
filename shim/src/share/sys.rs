//! System calls on mounts that are not attached anywhere, and on user namespaces.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::ids::IdRange;

/// A copy of the mount at `path`, and with `recursive` of all below it, attached nowhere: gone with its descriptor.
pub(super) fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// Attaches a mount at `path`, whose last component may not be a link.
pub(super) fn attach(tree: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    Ok(rustix::mount::move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Attaches a mount at what `target` is open on.
pub(super) fn attach_at(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", target, "", flags)?)
}

/// What is to change of a mount: mount_setattr(2).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Change<'a> {
    /// `MOUNT_ATTR_*` flags to set.
    pub(super) set: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, or 0: as it is.
    pub(super) propagation: u64,
    /// The user namespace that the owners of files are shown to.
    pub(super) owners: Option<BorrowedFd<'a>>,
}

/// Changes the mount whose root `tree` is, and with `recursive` all below it: all of them, or none.
pub(super) fn change(tree: BorrowedFd<'_>, recursive: bool, change: Change<'_>) -> io::Result<()> {
    let id_map = if change.owners.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 };
    let owners = change.owners.map(|namespace| namespace.as_raw_fd());
    let attributes = libc::mount_attr {
        attr_set: change.set | id_map,
        attr_clr: 0,
        propagation: change.propagation,
        userns_fd: owners.and_then(|descriptor| u64::try_from(descriptor).ok()).unwrap_or_default(),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string constant, and the kernel reads `attributes` of the given size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A user namespace in which the ids from 0 on are those of `range`. Nobody is in it.
pub(super) fn user_namespace(range: IdRange) -> io::Result<OwnedFd> {
    let (ready, child_ready) = pipe_with(PipeFlags::CLOEXEC)?;
    let (child_go, go) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: the child makes system calls on its own stack alone, none of which needs a lock or memory that another
    // thread may have held at this moment, and ends without returning.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: this is the child.
        0 => unsafe { hold_user_namespace(child_ready.as_raw_fd(), go.as_raw_fd(), child_go.as_raw_fd()) },
        child => child,
    };
    // Ours of the child's ends would keep a child that dies from being noticed.
    drop((child_ready, child_go));
    let namespace = map_user_namespace(child, ready, range);
    // The child ends as this closes, if it has not yet.
    drop(go);
    // SAFETY: no status is asked for. Someone who reaps all children of the process may come first, which is as good.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    namespace
}

/// The child's part of [`user_namespace`]: makes it, says so with a byte, and waits for the pipe to close.
///
/// # Safety
/// To be called in a process that was just forked.
unsafe fn hold_user_namespace(ready: i32, go: i32, wait: i32) -> ! {
    let mut byte = 0u8;
    // SAFETY: system calls on descriptors and on a byte of our own.
    unsafe {
        libc::close(go);
        if libc::unshare(libc::CLONE_NEWUSER) == 0 {
            libc::write(ready, (&raw const byte).cast(), 1);
            libc::read(wait, (&raw mut byte).cast(), 1);
        }
        libc::_exit(0)
    }
}

fn map_user_namespace(child: i32, ready: OwnedFd, range: IdRange) -> io::Result<OwnedFd> {
    use io::Read;
    // The end of the file instead: the child was refused, and is gone.
    File::from(ready).read_exact(&mut [0]).map_err(|_| io::Error::other("no user namespace is to be had"))?;
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{child}/{map}"), format!("0 {} {}", range.first, range.count))?;
    }
    Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
}

/// Makes the first id of `range` the calling thread's for files alone, and keeps all capabilities. For good: the
/// thread is to end soon.
pub(super) fn act_as(range: IdRange) -> io::Result<()> {
    let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
    // SAFETY: these take numbers alone. They tell of no failure, so a second call with an invalid id asks for the first
    // one's result.
    let now = unsafe {
        libc::setfsgid(range.first);
        libc::setfsuid(range.first);
        (libc::setfsgid(u32::MAX), libc::setfsuid(u32::MAX))
    };
    if now != (range.first.cast_signed(), range.first.cast_signed()) {
        return Err(refused());
    }
    // The change has taken away the capabilities that go with root's files (capabilities(7)).
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective = sets.permitted;
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Gives the calling thread a mount namespace of its own, from which nothing gets out. For good.
pub(super) fn leave_mount_namespace() -> io::Result<()> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::UnshareFlags;
    // SAFETY: the table of descriptors stays shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}
