//! Building a container's root and turning into it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat};

use super::Blueprint;
use super::root::{Root, c_path};
use super::{devices, mounts};
use rustix::mount::MountAttrFlags;

use crate::container::sys::{FsContext, MountAttr};
use crate::container::{Error, sys};

/// What of the agent's view goes into the container's.
pub(super) struct Parts {
    rootfs: OwnedFd,
    sources: Vec<Option<OwnedFd>>,
    /// `/dev/null`, to cover files with.
    null: OwnedFd,
    nodes: devices::Nodes,
}

impl Parts {
    /// Opens them, and goes to the root file system's directory.
    pub(super) fn open(setup: &Blueprint) -> Result<Parts, Error> {
        let failed = || Error::apply("root.path", "open the root file system");
        let path = setup.spec.root.as_ref().map(|root| root.path.as_path()).unwrap_or(Path::new(""));
        let recursive = sys::OPEN_TREE_CLONE | sys::AT_RECURSIVE;
        let rootfs = c_path(path).and_then(|path| sys::open_tree(None, &path, recursive)).map_err(failed())?;
        // The working directory stays with us into the new mount namespace, whoever may walk the path to it there.
        std::env::set_current_dir(path).map_err(failed())?;
        let sources = (0..setup.spec.mounts.len()).map(|index| mounts::open_source(index, setup));
        let sources = sources.collect::<Result<_, _>>()?;
        let null = sys::open_tree(None, c"/dev/null", sys::OPEN_TREE_CLONE)
            .map_err(Error::system("open /dev/null"))?;
        let nodes = devices::Nodes::open(&setup.spec.linux())?;
        Ok(Parts { rootfs, sources, null, nodes })
    }
}

/// Puts the root and all mounts in place.
pub(super) fn build(setup: &Blueprint, parts: &Parts) -> Result<Root, Error> {
    let failed = || Error::apply("root.path", "put the root file system in place");
    let old = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let slash = nix::fcntl::open("/", old, Mode::empty()).map_err(|errno| failed()(errno.into()))?;
    sys::mount_setattr(slash.as_fd(), true, &MountAttr::propagation(libc::MS_SLAVE)).map_err(failed())?;
    sys::mount_setattr(parts.rootfs.as_fd(), true, &MountAttr::propagation(libc::MS_SLAVE))
        .map_err(failed())?;
    let here = nix::fcntl::open(".", old, Mode::empty()).map_err(|errno| failed()(errno.into()))?;
    sys::move_mount(parts.rootfs.as_fd(), here.as_fd()).map_err(failed())?;
    let root = Root::new(parts.rootfs.try_clone().map_err(failed())?);
    for (index, (mount, source)) in setup.spec.mounts.iter().zip(&parts.sources).enumerate() {
        mounts::make(index, mount, source.as_ref(), &root)?;
    }
    let linux = setup.spec.linux();
    // A /dev that is shared with somebody is theirs to fill.
    let own_dev = setup.spec.mounts.iter().any(|mount| {
        mount.destination == Path::new("/dev") && mount.kind.as_deref().is_some_and(|kind| kind != "bind")
    });
    if own_dev {
        devices::populate(&linux, &parts.nodes, &root)?;
    } else {
        devices::add_listed(&linux, &parts.nodes, &root)?;
    }
    make_working_directory(setup, &root)?;
    for (index, path) in linux.readonly_paths.iter().enumerate() {
        make_read_only(path, &root)
            .map_err(Error::apply(format!("linux.readonlyPaths[{index}]"), "cover"))?;
    }
    let mut null = Null { tree: &parts.null, placed: false };
    for (index, path) in linux.masked_paths.iter().enumerate() {
        mask(path, &root, &mut null).map_err(Error::apply(format!("linux.maskedPaths[{index}]"), "cover"))?;
    }
    Ok(root)
}

/// An image's working directory need not exist in it.
fn make_working_directory(setup: &Blueprint, root: &Root) -> Result<(), Error> {
    let Some(process) = &setup.spec.process else { return Ok(()) };
    match root.directory(&process.cwd) {
        Ok(_) => Ok(()),
        // A read-only root can not have it made, a path through procfs not resolved here: changing into it will tell.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EROFS | libc::ELOOP | libc::EEXIST | libc::ENOENT)
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(Error::apply("process.cwd", "make the working directory")(error)),
    }
}

fn missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

fn make_read_only(path: &Path, root: &Root) -> io::Result<()> {
    let target = match root.resolve(path) {
        Err(error) if missing(&error) => return Ok(()),
        other => other?,
    };
    let tree = sys::open_tree(Some(target.as_fd()), c"", sys::OPEN_TREE_CLONE | sys::AT_RECURSIVE)?;
    sys::mount_setattr(tree.as_fd(), true, &MountAttr::set(libc::MOUNT_ATTR_RDONLY))?;
    sys::move_mount(tree.as_fd(), target.as_fd())
}

/// The agent's own null device; one that the image brought could be anything.
struct Null<'a> {
    tree: &'a OwnedFd,
    placed: bool,
}

impl Null<'_> {
    /// Only a mount that is in place can be copied, so the first one goes itself.
    fn cover(&mut self, target: BorrowedFd<'_>) -> io::Result<()> {
        if !self.placed {
            self.placed = true;
            return sys::move_mount(self.tree.as_fd(), target);
        }
        let copy = sys::open_tree(Some(self.tree.as_fd()), c"", sys::OPEN_TREE_CLONE)?;
        sys::move_mount(copy.as_fd(), target)
    }
}

fn mask(path: &Path, root: &Root, null: &mut Null<'_>) -> io::Result<()> {
    let target = match root.resolve(path) {
        Err(error) if missing(&error) => return Ok(()),
        other => other?,
    };
    if fstat(&target)?.st_mode & libc::S_IFMT != libc::S_IFDIR {
        return null.cover(target.as_fd());
    }
    sys::move_mount(empty_directory()?.as_fd(), target.as_fd())
}

/// A file system that has nothing and takes nothing, as a mount that is nowhere yet.
pub(crate) fn empty_directory() -> io::Result<OwnedFd> {
    let context = FsContext::open(c"tmpfs")?;
    context.set(c"nr_inodes", Some(c"1"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    context.mount(attributes)
}

/// Makes the built root this process's own and leaves the agent's behind.
pub(super) fn enter(root: Root, setup: &Blueprint, procfs: BorrowedFd<'_>) -> Result<(), Error> {
    let failed = || Error::apply("root.path", "change into the root file system");
    change_root(root.as_fd(), procfs).map_err(failed())?;
    drop(root);
    let slash = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| failed()(errno.into()))?;
    let linux = setup.spec.linux();
    if let Some((flag, recursive)) = mounts::propagation(&linux.rootfs_propagation) {
        sys::mount_setattr(slash.as_fd(), recursive, &MountAttr::propagation(flag))
            .map_err(Error::apply("linux.rootfsPropagation", "set the propagation"))?;
    }
    if setup.spec.root.as_ref().is_some_and(|root| root.readonly) {
        sys::mount_setattr(slash.as_fd(), false, &MountAttr::set(libc::MOUNT_ATTR_RDONLY))
            .map_err(Error::apply("root.readonly", "make the root read-only"))?;
    }
    Ok(())
}

/// Makes a mounted directory this process's root and leaves the old one behind. The process has a mount namespace of
/// its own, whose mounts `procfs` lists.
pub(crate) fn change_root(root: BorrowedFd<'_>, procfs: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::fchdir(root)?;
    match nix::unistd::pivot_root(".", ".") {
        // The old root now lies over the new one.
        Ok(()) => nix::mount::umount2(".", nix::mount::MntFlags::MNT_DETACH)?,
        // The kernel's first root, an initramfs, has nothing beneath it to be pivoted on.
        Err(nix::errno::Errno::EINVAL) => replace_first_root(root, procfs)?,
        Err(errno) => return Err(errno.into()),
    }
    Ok(nix::unistd::chdir("/")?)
}

/// Moves the new root over the first one, unmounts everything else, and changes into the new one.
fn replace_first_root(root: BorrowedFd<'_>, procfs: BorrowedFd<'_>) -> io::Result<()> {
    let table = fs::read_to_string(format!("/proc/self/fd/{}/self/mountinfo", procfs.as_raw_fd()))?;
    let slash = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    sys::move_mount(root, slash.as_fd())?;
    // Until the change of root, paths still begin beneath the new one. Field five is the mount point; what was below
    // the container's old place is not found any more.
    let points: Vec<_> =
        table.lines().filter_map(|line| line.split(' ').nth(4)).filter(|at| *at != "/").collect();
    for point in points.iter().rev() {
        // In a user namespace the agent's mounts are locked together, and stay out of reach instead.
        let _ = nix::mount::umount2(*point, nix::mount::MntFlags::MNT_DETACH);
    }
    nix::unistd::fchdir(root)?;
    nix::unistd::chroot(".")?;
    Ok(())
}
