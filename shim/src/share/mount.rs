//! Mounts made of containerd's descriptions, attached nowhere yet.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::mount::MountFlags;

use super::ids::IdRange;
use super::options::{Options, Propagation};
use super::overlay::Overlay;
use super::{Owners, ShareError, sys};

/// Nothing in a share is a device, gains privileges or is executed as far as the host is concerned. What the guest makes
/// of its files is the guest's business.
pub(super) const HARD: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// A mount as containerd describes it (its `types.Mount`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// `overlay`, `bind`, or a file system's name.
    pub kind: String,
    /// A directory, a device, or a name that nobody cares about.
    pub source: String,
    /// Where in the root file system, below what was mounted before; empty: the root itself.
    pub target: String,
    /// Options, each maybe several separated by commas.
    pub options: Vec<String>,
}

/// How file owners are shown, with what that takes.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) range: IdRange,
    pub(super) namespace: OwnedFd,
}

impl Mapping {
    /// Of these owners; none when they are the host's.
    pub(super) fn of(owners: Owners) -> Result<Option<Mapping>, ShareError> {
        let Owners::Mapped(range) = owners else { return Ok(None) };
        let namespace = sys::user_namespace(range).map_err(ShareError::UserNamespace)?;
        Ok(Some(Mapping { range, namespace }))
    }
}

/// Makes `mount`, for a root file system. `scaffold` is an empty directory that nothing else uses meanwhile.
pub(super) fn make(mount: &Mount, mapping: Option<&Mapping>, scaffold: &Path) -> Result<OwnedFd, ShareError> {
    let options = Options::parse(mount.options.iter().map(String::as_str))?;
    if mount.kind == "bind" || options.bind {
        return bind(Path::new(&mount.source), &options, mapping);
    }
    let tree = apart(|| match mount.kind.as_str() {
        "overlay" => Overlay::parse(&options)?.assemble(&options, mapping, scaffold),
        kind => new_file_system(kind, &mount.source, &options, scaffold),
    })?;
    let read_only = if options.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    // An overlay cannot be mapped; its layers are.
    let owners = mapping.filter(|_| mount.kind != "overlay").map(|mapping| mapping.namespace.as_fd());
    let change = sys::Change { set: HARD | read_only, owners, ..Default::default() };
    sys::change(tree.as_fd(), false, change).map_err(|error| refused(error, owners, &mount.source))?;
    Ok(tree)
}

/// A copy of a directory's mount.
fn bind(source: &Path, options: &Options, mapping: Option<&Mapping>) -> Result<OwnedFd, ShareError> {
    let tree = clone(source, options)?;
    let owners = mapping.map(|mapping| mapping.namespace.as_fd());
    let change = sys::Change { owners, ..Default::default() };
    sys::change(tree.as_fd(), options.recursive, change).map_err(|error| refused(error, owners, source))?;
    Ok(tree)
}

/// A copy of the mount of a directory or file, with all attributes but for its owners.
pub(super) fn clone(source: &Path, options: &Options) -> Result<OwnedFd, ShareError> {
    let at = |action| move |error| ShareError::Io { action, path: source.to_owned(), source: error };
    let tree = sys::clone_tree(source, options.recursive).map_err(at("copy the mount of"))?;
    let propagation = match options.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
    };
    let read_only = |yes| if yes { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let all =
        sys::Change { set: HARD | read_only(options.recursive_read_only), propagation, ..Default::default() };
    sys::change(tree.as_fd(), true, all).map_err(at("set the attributes of the mount of"))?;
    let top = sys::Change { set: read_only(options.read_only), ..Default::default() };
    sys::change(tree.as_fd(), false, top).map_err(at("set the attributes of the mount of"))?;
    Ok(tree)
}

/// Says that owners could not be mapped, if that was asked for.
fn refused(source: io::Error, owners: Option<BorrowedFd<'_>>, path: impl AsRef<Path>) -> ShareError {
    let path = path.as_ref().to_owned();
    if owners.is_some() {
        ShareError::Unmappable { path, source }
    } else {
        ShareError::Io { action: "set the attributes of the mount of", path, source }
    }
}

/// Runs `make` on a thread that has left the host's mounts: whatever it mounts and does not return is gone with it, even
/// if the process is killed meanwhile.
fn apart(make: impl FnOnce() -> Result<OwnedFd, ShareError> + Send) -> Result<OwnedFd, ShareError> {
    thread::scope(|scope| {
        let started = thread::Builder::new().name("mount".into()).spawn_scoped(scope, || {
            sys::leave_mount_namespace().map_err(ShareError::Thread)?;
            make()
        });
        let ended = started.map_err(ShareError::Thread)?.join();
        ended.unwrap_or_else(|_| Err(ShareError::Thread(io::Error::other("it panicked"))))
    })
}

fn new_file_system(
    kind: &str,
    source: &str,
    options: &Options,
    scaffold: &Path,
) -> Result<OwnedFd, ShareError> {
    if options.data.iter().any(|option| option == "loop") {
        let why = "disk images are given to the virtual machine as disks";
        return Err(ShareError::Option { option: "loop".into(), why });
    }
    mount_here(source, scaffold, kind, options)?;
    sys::clone_tree(scaffold, false).map_err(|source| ShareError::Io {
        action: "copy the mount of",
        path: scaffold.to_owned(),
        source,
    })
}

/// mount(2), in the calling thread's own namespace.
pub(super) fn mount_here(
    source: &str,
    target: &Path,
    kind: &str,
    options: &Options,
) -> Result<(), ShareError> {
    let data = options.data.join(",");
    let mut flags = options.flags;
    flags.set(MountFlags::RDONLY, options.read_only);
    let mounted = CString::new(data.as_str()).map_err(io::Error::from).and_then(|data| {
        rustix::mount::mount(source, target, kind, flags, Some(data.as_c_str())).map_err(io::Error::from)
    });
    mounted.map_err(|error| ShareError::Mount {
        kind: kind.to_owned(),
        mounted: source.to_owned(),
        options: data,
        source: error,
    })
}

/// The directory that both paths are below, for a mount that shows them together.
pub(super) fn common_parent(one: &Path, other: &Path) -> PathBuf {
    let same = one.components().zip(other.components()).take_while(|(one, other)| one == other);
    same.map(|(component, _)| component).collect()
}
