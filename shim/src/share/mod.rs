//! The directory of the host that a pod's machine is served over virtio-fs.
//!
//! | module | owns |
//! |---|---|
//! | `disk` | root file systems on block devices, which are not shared but given as disks |
//! | `kubelet`, `tree` | volumes that the guest has copies of, or its own instead |
//! | `volumes` | those that are shared, each once |
//! | `ids` | host ids that a pod's files belong to, and nobody else's |
//! | `options` | mount options as containerd and the OCI specification write them |
//! | `mount`, `overlay` | mounts made of descriptions, attached nowhere yet |
//! | `sys` | the system calls |
//!
//! A pod's directory holds two views of it: `shared`, in which the shim makes mount points, and `share`, which is
//! `shared` mounted read-only: what the machine gets. `share` has shared propagation, so what is mounted there
//! later reaches the machine's process in its own mount namespace, and leaves it when it is unmounted.
//!
//! ```text
//! share/<container>/rootfs     the root file system
//! share/_volumes/<number>      a volume, for all containers that have it
//! ```
//!
//! # Whose files they are
//! The machine's process is root in a user namespace of its own and nothing on the host, so to change a file's owner it
//! has to be shown files as if they were its own ([`Owners::Mapped`]). A plain mount is id-mapped; an overlay cannot be,
//! so its layers are: what a container writes has the same owners on disk as with any other runtime. Not every kernel
//! (before 5.19) and file system can do it: [`mappable`] tells by trying. Where it cannot be had, files are shown with
//! the host's owners ([`Owners::Host`]), and the machine's process must not have a user namespace. A volume alone that
//! cannot be mapped can be had read-only, with owners that the guest sees as nobody ([`Placed::mapped`]): what was written
//! to it would belong to ids that the next machine gets.
//!
//! # Whatever happens
//! Every directory and mount is in the [journal](crate::journal) before it is made, so that [`Share::remove`] undoes a
//! container's, and [`Journal::undo`] all, with the shim dead too. All calls block on the file system: not for an
//! executor's threads.

mod disk;
mod ids;
mod kubelet;
mod mount;
mod options;
mod overlay;
mod sys;
#[cfg(test)]
mod tests;
mod tree;
mod volumes;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::id::Id;
use crate::journal::{CleanError, Journal, JournalError, Resource};
use mount::{HARD, Mapping};
use options::Options;
use volumes::{Source, Volumes};

pub use disk::{Disk, RawDisk, is_disk};
pub use ids::{BASE as ID_BASE, COUNT as ID_COUNT, IdRange};
pub use kubelet::{Memory, Owner, Special, special};
pub use mount::Mount;
pub use tree::read as read_tree;

/// In the pod's directory: where mount points are made.
const WRITABLE: &str = "shared";
/// In the pod's directory: what the machine gets.
const SERVED: &str = "share";
/// In the pod's directory: where overlays are put together.
const SCAFFOLD: &str = "scaffold";
/// In a container's directory.
const ROOTFS: &str = "rootfs";

/// Whose the files of a share are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// The host's. The machine's process must have no user namespace.
    Host,
    /// Those of a range: the file system's id 0 is shown as the range's first, and so on. The machine's process has a
    /// user namespace with the same range: `uid` and `gid` its first, `id_count` its count.
    Mapped(IdRange),
}

/// A bind mount of the OCI specification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// The directory or file on the host.
    pub source: PathBuf,
    /// As in the specification.
    pub options: Vec<String>,
    /// The pod's uid. Without it no volume is taken for the pod's own.
    pub pod: Option<String>,
}

/// What was added to a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where it is, relative to the share's root, both on the host and in the guest.
    pub path: PathBuf,
    /// A path below, of plain names, when what was asked for is a part of what was added. What is there when it is used
    /// counts, and the guest may have put a link there that leads elsewhere.
    pub part: Option<String>,
    /// Whether owners are shown as the share has them. False for a volume on a file system (or with one mounted below
    /// it) that cannot do it.
    pub mapped: bool,
}

/// Why something cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It cannot be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel refused.
    #[error("{action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A mount option that cannot be honoured.
    #[error("mount option {option:?}: {why}")]
    Option {
        /// The option.
        option: String,
        /// Why not.
        why: &'static str,
    },
    /// A file system cannot be mounted.
    #[error("mount {kind} from {mounted:?} with {options:?}")]
    Mount {
        /// Its type.
        kind: String,
        /// What it is mounted from.
        mounted: String,
        /// With what options.
        options: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A root file system, or a volume to be written to, whose owners cannot be shown as [`Owners::Mapped`] wants it.
    #[error("the file system of {path:?} has no id-mapped mounts: a machine cannot write to it")]
    Unmappable {
        /// What was to be mounted.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A root file system of no mounts.
    #[error("the root file system has no mounts")]
    NoRootfs,
    /// A device as a volume: the host's drivers are not the guest's.
    #[error("{0:?} is a device, and cannot be shared as a file")]
    Device(PathBuf),
    /// All ranges of ids are taken.
    #[error("no range of ids is free for another pod")]
    NoIds,
    /// A user namespace to map owners with cannot be made.
    #[error("make a user namespace")]
    UserNamespace(#[source] io::Error),
    /// A thread to mount on cannot be had.
    #[error("start a thread with a mount namespace of its own")]
    Thread(#[source] io::Error),
}

/// A pod's share.
#[derive(Debug)]
pub struct Share {
    writable: PathBuf,
    served: PathBuf,
    scaffold: PathBuf,
    mapping: Option<Mapping>,
    volumes: Mutex<Volumes>,
}

/// Whether the mounts of a root file system can be had with mapped owners, by doing it and taking it back. `scaffold` is
/// an empty directory.
///
/// # Errors
/// When they cannot be had at all.
pub fn mappable(mounts: &[Mount], range: IdRange, scaffold: &Path) -> Result<bool, ShareError> {
    let mapping = match Mapping::of(Owners::Mapped(range)) {
        Err(ShareError::UserNamespace(_)) => return Ok(false),
        mapping => mapping?,
    };
    for mount in mounts {
        match mount::make(mount, mapping.as_ref(), scaffold) {
            Err(ShareError::Unmappable { .. }) => return Ok(false),
            // An overlay over mapped layers is refused as a whole by kernels that do not know of them.
            Err(ShareError::Mount { .. }) if mount.kind == "overlay" => {
                mount::make(mount, None, scaffold)?;
                return Ok(false);
            }
            made => drop(made?),
        }
    }
    Ok(true)
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ShareError + 'a {
    move |source| ShareError::Io { action, path: path.to_owned(), source }
}

impl Share {
    /// Makes an empty share in `pod`, the pod's own directory.
    ///
    /// # Errors
    /// When the kernel refuses; what was made by then is in the journal.
    pub fn make(journal: &mut Journal, pod: &Path, owners: Owners) -> Result<Share, ShareError> {
        let mapping = Mapping::of(owners)?;
        let [writable, served, scaffold] = [WRITABLE, SERVED, SCAFFOLD].map(|name| pod.join(name));
        for directory in [&writable, &served, &scaffold] {
            make_directory(journal, directory)?;
        }
        journal.record(Resource::Mount(served.clone()))?;
        let view = sys::clone_tree(&writable, false).map_err(at("copy the mount of", &writable))?;
        let set = HARD | libc::MOUNT_ATTR_RDONLY;
        let change = sys::Change { set, propagation: libc::MS_PRIVATE, owners: None };
        sys::change(view.as_fd(), false, change).map_err(at("set the attributes of", &served))?;
        sys::attach(view.as_fd(), &served).map_err(at("attach a mount at", &served))?;
        mount_change(&served, MountPropagationFlags::SHARED)
            .map_err(|error| at("share the mount at", &served)(error.into()))?;
        Ok(Share { writable, served, scaffold, mapping, volumes: Mutex::default() })
    }

    /// The directory to be served.
    pub fn path(&self) -> &Path {
        &self.served
    }

    /// Mounts a container's root file system from containerd's description, one mount on the other.
    ///
    /// # Errors
    /// When it cannot be had; [`remove`](Self::remove) then takes away what there is of it.
    pub fn add_rootfs(
        &self,
        journal: &mut Journal,
        container: &Id,
        mounts: &[Mount],
    ) -> Result<Placed, ShareError> {
        if mounts.is_empty() {
            return Err(ShareError::NoRootfs);
        }
        let path = self.in_container(journal, container, ROOTFS)?;
        make_directory(journal, &self.writable.join(&path))?;
        let root = self.served.join(&path);
        for mount in mounts {
            let tree = mount::make(mount, self.mapping.as_ref(), &self.scaffold)?;
            if mount.target.is_empty() || mount.target == "/" {
                self.attach(journal, &tree, &root)?;
            } else {
                attach_within(&tree, &root, Path::new(&mount.target))?;
            }
        }
        Ok(Placed { path, part: None, mapped: self.mapping.is_some() })
    }

    /// Shares a directory or file of the host, as a mount of a container's specification wants it. A volume that
    /// another container has already is not shared once more, and a part of the pod's own is had by way of the whole.
    ///
    /// # Errors
    /// When there is no such file, when it is a device, and for options that no machine can honour;
    /// [`remove`](Self::remove) then takes away what there is of it.
    pub fn add_volume(
        &self,
        journal: &mut Journal,
        container: &Id,
        volume: &Volume,
    ) -> Result<Placed, ShareError> {
        let options = Options::parse(volume.options.iter().map(String::as_str))?;
        // What is mounted below the whole is no business of one who has to have everything read-only.
        let own = volume.pod.as_deref().filter(|_| !options.recursive_read_only);
        match own.and_then(|pod| kubelet::part_of_empty_dir(&volume.source, pod)) {
            None => {
                let own = own.is_some_and(|pod| kubelet::is_empty_dir(&volume.source, pod));
                self.add_whole(journal, container, &volume.source, options, own)
            }
            Some(part) => {
                let placed = self.add_whole(journal, container, &part.volume, options, true)?;
                Ok(Placed { part: Some(part.path), ..placed })
            }
        }
    }

    /// Nobody but the pod writes to its `own` empty directories, so there is nothing on the host to be kept from it.
    fn add_whole(
        &self,
        journal: &mut Journal,
        container: &Id,
        path: &Path,
        mut options: Options,
        own: bool,
    ) -> Result<Placed, ShareError> {
        let found = fs::metadata(path).map_err(at("look at", path))?;
        if found.file_type().is_block_device() || found.file_type().is_char_device() {
            return Err(ShareError::Device(path.to_owned()));
        }
        options.read_only &= !own;
        let mounted = rustix::fs::statvfs(path).map_err(|errno| at("look at", path)(errno.into()))?.f_flag;
        let (source, writable) = (Source::new(&found, mounted, &options), !options.read_only);
        if let Some(placed) = self.volumes().find(&source, writable, container) {
            return Ok(placed);
        }
        let tree = mount::clone(path, &options)?;
        let mapped = match self.map(&tree, options.recursive) {
            Ok(all) => all,
            Err(source) if writable => {
                return Err(ShareError::Unmappable { path: path.to_owned(), source });
            }
            Err(error) => {
                tracing::warn!(volume = ?path, %error, "in the machine its files are nobody's");
                false
            }
        };
        let directory = self.writable.join(volumes::DIRECTORY);
        if !directory.exists() {
            make_directory(journal, &directory)?;
        }
        let placed = self.volumes().begin(source, writable, mapped, container);
        let point = self.writable.join(&placed.path);
        if found.is_dir() {
            make_directory(journal, &point)?;
        } else {
            journal.record(Resource::File(point.clone()))?;
            fs::File::create_new(&point).map_err(at("make", &point))?;
        }
        self.attach(journal, &tree, &self.served.join(&placed.path))?;
        self.volumes().complete(&placed);
        Ok(placed)
    }

    fn volumes(&self) -> MutexGuard<'_, Volumes> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The paths in the share that a container alone has. No other container gets what is there from now on.
    pub fn only_of(&self, container: &Id) -> Vec<PathBuf> {
        let mut own = self.volumes().only_of(container);
        own.push(container.as_str().into());
        own
    }

    /// Takes everything away that a container alone has. None of it need be there.
    ///
    /// # Errors
    /// When some of it remains, which the journal then still holds.
    pub fn remove(&self, journal: &mut Journal, container: &Id) -> Result<(), CleanError> {
        let own = self.only_of(container);
        let own: Vec<_> =
            own.iter().flat_map(|path| [self.writable.join(path), self.served.join(path)]).collect();
        journal.undo_where(|resource| match resource {
            Resource::Directory(path) | Resource::File(path) | Resource::Mount(path) => {
                own.iter().any(|own| path.starts_with(own))
            }
            _ => false,
        })?;
        self.volumes().leave(container);
        Ok(())
    }

    /// The path of something in a container's directory, which is made if missing.
    fn in_container(&self, journal: &mut Journal, container: &Id, name: &str) -> Result<PathBuf, ShareError> {
        let directory = self.writable.join(container.as_str());
        if !directory.exists() {
            make_directory(journal, &directory)?;
        }
        Ok(Path::new(container.as_str()).join(name))
    }

    /// Shows owners as the share has them: with all that is mounted below, or else of the top alone. Returns whether all
    /// is so.
    ///
    /// # Errors
    /// When not even the top can be.
    fn map(&self, tree: &OwnedFd, recursive: bool) -> io::Result<bool> {
        let Some(mapping) = &self.mapping else { return Ok(true) };
        let change = sys::Change { owners: Some(mapping.namespace.as_fd()), ..Default::default() };
        match sys::change(tree.as_fd(), recursive, change) {
            Ok(()) => Ok(true),
            // A file system below that cannot do it must not keep the rest from it.
            Err(_) if recursive => sys::change(tree.as_fd(), false, change).map(|()| false),
            Err(error) => Err(error),
        }
    }

    fn attach(&self, journal: &mut Journal, tree: &OwnedFd, path: &Path) -> Result<(), ShareError> {
        journal.record(Resource::Mount(path.to_owned()))?;
        sys::attach(tree.as_fd(), path).map_err(at("attach a mount at", path))
    }
}

/// Attaches a mount below the root of an image, whose links lead no further than this root. It has no line of its own in
/// the journal: it goes with the mount at the root, which has.
fn attach_within(tree: &OwnedFd, root: &Path, target: &Path) -> Result<(), ShareError> {
    let open = || {
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(root, target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
    };
    let shown = root.join(target.strip_prefix("/").unwrap_or(target));
    let point = open().map_err(|error| at("open", &shown)(error.into()))?;
    sys::attach_at(tree.as_fd(), point.as_fd()).map_err(at("attach a mount at", &shown))
}

/// Writes a directory down and makes it, with a mode that the umask has no say in.
fn make_directory(journal: &mut Journal, path: &Path) -> Result<(), ShareError> {
    journal.record(Resource::Directory(path.to_owned()))?;
    fs::create_dir(path).map_err(at("make", path))?;
    fs::set_permissions(path, Permissions::from_mode(0o755)).map_err(at("set the mode of", path))
}
