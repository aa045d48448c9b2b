//! File systems that the host names: virtio-fs shares, disks, tmpfs, and overlays of them.

mod device;
mod mount;
mod part;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use caisson_protocol::limits::{MAX_ID, MAX_STORAGES};
use caisson_protocol::v1::{Part, Storage, StorageInfo, TreeEntry, storage::Source};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use thiserror::Error;

use crate::guest::GuestError;
use crate::guest::devices;
use crate::state::lock;
use part::Missing;

/// The mounts of this process's namespace.
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// The most paths that are looked at again, for hosts that never remove them.
const MAX_RELEASED: usize = 256;

/// Why a storage can not be had, or not be taken away.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StorageError {
    /// A field is malformed.
    #[error("{field}: {value:?} is not valid")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: String,
    },
    /// The id is taken.
    #[error("storage {0} exists")]
    Exists(String),
    /// There is no such storage.
    #[error("there is no storage {0}")]
    NotFound(String),
    /// Something still uses it.
    #[error("storage {0} is in use")]
    Busy(String),
    /// Too many of them.
    #[error("there are {MAX_STORAGES} storages already")]
    Limit,
    /// Its block device is not there.
    #[error(transparent)]
    Device(#[from] GuestError),
    /// The kernel refused.
    #[error("{action} storage {id}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which storage.
        id: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl StorageError {
    fn invalid(field: &'static str, value: impl Into<String>) -> StorageError {
        StorageError::Invalid { field, value: value.into() }
    }

    fn io(action: &'static str, id: &str) -> impl FnOnce(io::Error) -> StorageError {
        let id = id.to_owned();
        move |source| StorageError::Io { action, id, source }
    }
}

/// The storages of the guest.
#[derive(Debug)]
pub struct Storages {
    directory: PathBuf,
    mounted: Mutex<BTreeMap<String, Mounted>>,
    /// Paths in shares that the host was to remove when they were last looked at.
    released: Mutex<Vec<PathBuf>>,
}

#[derive(Debug)]
struct Mounted {
    storage: Storage,
    path: PathBuf,
    is_mount: bool,
    /// Container that it belongs to, empty: the sandbox.
    owner: String,
    /// Order of mounting, so that teardown can go backwards.
    order: u64,
}

impl Mounted {
    fn is_tmpfs(&self) -> bool {
        matches!(self.storage.source, Some(Source::Tmpfs(_)))
    }

    fn is_share(&self) -> bool {
        matches!(self.storage.source, Some(Source::VirtioFs(_)))
    }
}

/// Removes a mount point that nothing is mounted on.
fn remove_point(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(path),
        result => result,
    }
}

impl Storages {
    /// No storages yet; their mount points will be under `root`.
    pub fn new(root: &Path) -> Storages {
        Storages { directory: root.join("storage"), mounted: Mutex::default(), released: Mutex::default() }
    }

    /// Makes a storage; `owner` is a container's id, or empty. Returns its mount point, or the node of a disk that
    /// is not to be mounted.
    ///
    /// # Errors
    /// When it is malformed or taken, or does not mount; nothing is left behind.
    pub fn mount(&self, storage: &Storage, owner: &str) -> Result<PathBuf, StorageError> {
        check_id(&storage.id)?;
        // Held throughout: two of the same id must not race, and an overlay's parts must not go away.
        let mut mounted = lock(&self.mounted);
        if mounted.len() >= MAX_STORAGES {
            return Err(StorageError::Limit);
        }
        if mounted.contains_key(&storage.id) {
            return Err(StorageError::Exists(storage.id.clone()));
        }
        let source = storage.source.as_ref().ok_or_else(|| StorageError::invalid("source", ""))?;
        if let Source::Overlay(overlay) = source {
            let parts = overlay.lowers.iter().chain(Some(&overlay.upper).filter(|upper| !upper.is_empty()));
            for part in parts {
                let exists = mounted.get(part).is_some_and(|part| part.is_mount);
                exists.then_some(()).ok_or_else(|| StorageError::NotFound(part.clone()))?;
            }
        }
        let (path, is_mount) = match (source, device::unmounted(source)?) {
            (_, Some(node)) => (node, false),
            (Source::Part(part), _) => {
                let whole =
                    mounted.get(&part.storage_id).filter(|whole| whole.is_tmpfs() || whole.is_share());
                let whole = whole.ok_or_else(|| StorageError::NotFound(part.storage_id.clone()))?;
                let missing = if whole.is_tmpfs() { Missing::Made } else { Missing::Refused };
                (part::mount(&whole.path, missing, &self.directory, storage, part)?, true)
            }
            _ => (self.mount_at(storage, source)?, true),
        };
        let order = mounted.values().map(|mounted| mounted.order).max().unwrap_or(0).saturating_add(1);
        let entry = Mounted {
            storage: storage.clone(),
            path: path.clone(),
            is_mount,
            owner: owner.to_owned(),
            order,
        };
        mounted.insert(storage.id.clone(), entry);
        Ok(path)
    }

    fn mount_at(&self, storage: &Storage, source: &Source) -> Result<PathBuf, StorageError> {
        let target = self.directory.join(&storage.id);
        fs::create_dir_all(&target).map_err(StorageError::io("make the mount point of", &storage.id))?;
        match mount::mount(&self.directory, storage, source) {
            Ok(()) => Ok(target),
            Err(error) => {
                let _ = fs::remove_dir(&target);
                Err(error)
            }
        }
    }

    /// Takes a storage away; one that does not exist is fine.
    ///
    /// # Errors
    /// When an overlay or a process uses it.
    pub fn unmount(&self, id: &str) -> Result<(), StorageError> {
        let mut mounted = lock(&self.mounted);
        let Some(entry) = mounted.get(id) else { return Ok(()) };
        let uses = |other: &Mounted| match &other.storage.source {
            Some(Source::Overlay(overlay)) => {
                overlay.upper == id || overlay.lowers.iter().any(|lower| lower == id)
            }
            Some(Source::Part(part)) => part.storage_id == id,
            _ => false,
        };
        if mounted.values().any(uses) {
            return Err(StorageError::Busy(id.to_owned()));
        }
        if entry.is_mount {
            match umount2(&entry.path, MntFlags::UMOUNT_NOFOLLOW) {
                // EINVAL: it is not mounted any more, someone undid it.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(Errno::EBUSY) => return Err(StorageError::Busy(id.to_owned())),
                Err(errno) => return Err(StorageError::io("unmount", id)(errno.into())),
            }
            remove_point(&entry.path).map_err(StorageError::io("remove the mount point of", id))?;
        }
        mounted.remove(id);
        Ok(())
    }

    /// Takes all storages of `owner` away, last ones first; of everyone, if `None`. Goes on after an error.
    ///
    /// # Errors
    /// The first one.
    pub fn unmount_all(&self, owner: Option<&str>) -> Result<(), StorageError> {
        let mut ids: Vec<(u64, String)> = lock(&self.mounted)
            .values()
            .filter(|mounted| owner.is_none_or(|owner| mounted.owner == owner))
            .map(|mounted| (mounted.order, mounted.storage.id.clone()))
            .collect();
        ids.sort_unstable_by(|left, right| right.cmp(left));
        let mut result = Ok(());
        for (_, id) in ids {
            result = result.and(self.unmount(&id));
        }
        result
    }

    /// Unmounts what the kernel has mounted in these parts of shares, to show what the host has mounted there. It does so in
    /// this namespace when something looks into them, and keeps such a file system with every name and inode that was ever
    /// looked up in it, though the host has unmounted it: what the host serves stays open there.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] for a path that is none of a share's, [`StorageError::NotFound`], and
    /// [`StorageError::Io`] when the table of mounts cannot be read.
    pub fn release(&self, parts: &[Part]) -> Result<(), StorageError> {
        let roots = parts.iter().map(|part| {
            let inside = Path::new(&part.root).components().all(|name| matches!(name, Component::Normal(_)));
            if part.root.is_empty() || !inside {
                return Err(StorageError::invalid("released.root", &part.root));
            }
            Ok(self.path(&part.storage_id)?.join(&part.root))
        });
        let roots = roots.collect::<Result<Vec<_>, _>>()?;
        let table = fs::read_to_string(MOUNTINFO).map_err(StorageError::io("list the mounts of", "share"))?;
        for point in mount_points_in(&table, &roots) {
            // With all that is below, which therefore may be gone already.
            let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        let mut released = lock(&self.released);
        // The host removes these paths after this. The kernel forgets what was there when it is next looked for in vain.
        released.retain(|path| {
            !fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        });
        released.extend(roots);
        let surplus = released.len().saturating_sub(MAX_RELEASED);
        released.drain(..surplus);
        Ok(())
    }

    /// Where a storage is.
    ///
    /// # Errors
    /// When there is no such storage.
    pub fn path(&self, id: &str) -> Result<PathBuf, StorageError> {
        let mounted = lock(&self.mounted);
        mounted
            .get(id)
            .map(|mounted| mounted.path.clone())
            .ok_or_else(|| StorageError::NotFound(id.to_owned()))
    }

    /// Whether a storage is on the device in `slot`.
    pub fn uses_slot(&self, slot: u32) -> bool {
        let disk = devices::block_device(slot).ok();
        lock(&self.mounted).values().any(|mounted| match &mounted.storage.source {
            Some(Source::Block(block)) => disk.is_some() && device::name(block).ok() == disk,
            Some(Source::VirtioFs(share)) => devices::is_share(slot, &share.tag),
            _ => false,
        })
    }

    /// All storages, by id.
    pub fn list(&self) -> Vec<StorageInfo> {
        let info = |mounted: &Mounted| StorageInfo {
            storage: Some(mounted.storage.clone()),
            path: mounted.path.to_string_lossy().into_owned(),
            container_id: mounted.owner.clone(),
        };
        lock(&self.mounted).values().map(info).collect()
    }

    /// Makes a tmpfs storage hold exactly `entries`.
    ///
    /// # Errors
    /// When it is no tmpfs, an entry is malformed, or the kernel refuses; what was done stays.
    pub fn sync_tree(&self, id: &str, entries: &[TreeEntry]) -> Result<(), StorageError> {
        let path = {
            let mounted = lock(&self.mounted);
            let entry = mounted.get(id).ok_or_else(|| StorageError::NotFound(id.to_owned()))?;
            if !entry.is_tmpfs() {
                return Err(StorageError::invalid("storage_id", id));
            }
            entry.path.clone()
        };
        tree::sync(&path, id, entries)
    }
}

/// The mount points of a table (proc_pid_mountinfo(5)) that are these paths, or below them. The host's shim names the
/// outermost of them, without a character that the table would escape.
fn mount_points_in<'a>(table: &'a str, roots: &[PathBuf]) -> impl Iterator<Item = &'a Path> {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    points.filter(move |point| roots.iter().any(|root| point.starts_with(root)))
}

/// # Errors
/// When `id` is not `[A-Za-z0-9_.-]{1,128}`, or is "." or "..".
pub fn check_id(id: &str) -> Result<(), StorageError> {
    let valid = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if !valid || id.is_empty() || id.len() > MAX_ID || id == "." || id == ".." {
        return Err(StorageError::invalid("id", id));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_release_is_of_what_is_mounted_in_a_part() {
        let table = "21 1 0:19 / /proc rw - proc proc rw\n\
                     30 1 0:30 / /run/storage/share rw - virtiofs share rw\n\
                     31 30 0:31 / /run/storage/share/one/rootfs rw - virtiofs share rw\n\
                     32 30 0:31 / /run/storage/share/volumes/1 rw - virtiofs share rw\n\
                     33 30 0:32 / /run/storage/share/one-more/rootfs rw - virtiofs share rw\nshort line\n";
        let roots = ["one", "volumes/1"].map(|root| Path::new("/run/storage/share").join(root));
        let found: Vec<_> = mount_points_in(table, &roots).collect();
        assert_eq!(
            found,
            ["one/rootfs", "volumes/1"].map(|point| Path::new("/run/storage/share").join(point))
        );
        let storages = Storages::new(Path::new("/nowhere"));
        for root in ["", "/etc", "../share", "one/../.."] {
            let part = Part { root: root.into(), ..Part::default() };
            assert!(matches!(storages.release(&[part]), Err(StorageError::Invalid { .. })), "{root:?}");
        }
        let unknown = Part { storage_id: "share".into(), root: "one".into(), ..Part::default() };
        assert!(matches!(storages.release(&[unknown]), Err(StorageError::NotFound(_))));
    }

    #[test]
    fn there_are_so_many_storages() {
        let storages = Storages::new(Path::new("/nowhere"));
        for number in 0..MAX_STORAGES {
            let id = number.to_string();
            let storage = Storage { id: id.clone(), ..Storage::default() };
            let entry =
                Mounted { storage, path: PathBuf::new(), is_mount: false, owner: String::new(), order: 0 };
            lock(&storages.mounted).insert(id, entry);
        }
        let one_more = Storage { id: "more".to_owned(), ..Storage::default() };
        assert!(matches!(storages.mount(&one_more, ""), Err(StorageError::Limit)));
        storages.unmount("7").unwrap();
        // There would be room now, if it were a storage of some kind.
        assert!(matches!(storages.mount(&one_more, ""), Err(StorageError::Invalid { .. })));
    }
}
