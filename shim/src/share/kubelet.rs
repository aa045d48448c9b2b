//! What a kubelet means by the directories that it has mounted into containers.
//!
//! Most are shared as they are. Some are better off in the guest: memory that a pod is given as a file system has to be
//! the guest's own, or else it would come on top of the guest's; and a program that watches its configuration
//! (inotify(7)) hears of no change that another kernel makes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, fstat, open, openat2, statx};

use super::{ShareError, Volume, at};
use crate::mountinfo::{self, Mount};

/// As in the kernel's magic.h.
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;
/// The directory of the pods' directories.
const PODS: &str = "pods";
/// The directory of a pod's `emptyDir` volumes.
const EMPTY: &str = "kubernetes.io~empty-dir";
/// The directory of a pod's volumes.
const VOLUMES: &str = "volumes";
/// The directory of mounts of parts of them: `<volume>/<container>/<number>`.
const PARTS: &str = "volume-subpaths";
/// Those of volumes that the kubelet writes anew when they change.
const WRITTEN: [&str; 4] = [
    "kubernetes.io~secret",
    "kubernetes.io~configmap",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// In such a volume, the link that the kubelet swaps for another when it has written all.
pub(super) const DATA: &str = "..data";

/// A directory that is not shared as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Special {
    /// A file system in memory that only the pod's containers write to.
    Memory(Memory),
    /// A directory in such a one.
    MemoryPart {
        /// Where the whole is on this host.
        volume: PathBuf,
        /// What that is.
        whole: Memory,
        /// The path in it.
        path: PathBuf,
        /// The directory, as the kubelet has made it.
        owner: Owner,
    },
    /// A small tree of files, which changes as a whole, and whose its root is.
    Written(Owner),
    /// Huge pages of this many bytes.
    HugePages(u64),
}

/// A file system in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Its size in bytes.
    pub size: u64,
    /// Its root directory.
    pub root: Owner,
}

/// Whose a directory is, and who may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Permission bits.
    pub mode: u32,
    /// Who it belongs to.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl Owner {
    fn of(found: &fs::Metadata) -> Owner {
        Owner { mode: found.mode() & 0o7777, uid: found.uid(), gid: found.gid() }
    }
}

/// Whether it is an `emptyDir` volume of the pod with this uid: `pods/<uid>/volumes/kubernetes.io~empty-dir/<name>`. Those
/// of others are the host's like anything else of it.
pub(super) fn is_empty_dir(source: &Path, pod: &str) -> bool {
    let mut above = source.ancestors().skip(1).map(Path::file_name);
    [EMPTY, VOLUMES, pod, PODS].into_iter().all(|name| above.next() == Some(Some(name.as_ref())))
}

/// A part of the pod's own `emptyDir` volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Where the whole is on this host.
    pub(super) volume: PathBuf,
    /// The path in it, of plain names.
    pub(super) path: String,
}

/// What `source` is a part of: the kubelet mounts a `subPath` of a volume aside. None when that is no `emptyDir` of this
/// pod, or when one does not come to the same file by way of the volume.
pub(super) fn part_of_empty_dir(source: &Path, pod: &str) -> Option<Part> {
    let aside = source.ancestors().nth(2)?;
    let parts = aside.parent().filter(|parts| parts.file_name().is_some_and(|name| name == PARTS))?;
    let volume = parts.with_file_name(VOLUMES).join(EMPTY).join(aside.file_name()?);
    if !is_empty_dir(&volume, pod) {
        return None;
    }
    let table = mountinfo::read().ok()?;
    let (device, within) = place(&table, &volume)?;
    let (parts_device, part) = place(&table, source)?;
    let path = part.strip_prefix(within).ok().filter(|_| device == parts_device)?.to_str()?.to_owned();
    let (found, whole) = (fs::metadata(source).ok()?, open(&volume, OFlags::PATH, Mode::empty()).ok()?);
    let plain = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let reached = fstat(openat2(whole, &path, OFlags::PATH, Mode::empty(), plain).ok()?).ok()?;
    ((reached.st_dev, reached.st_ino) == (found.dev(), found.ino())).then_some(Part { volume, path })
}

/// A file system's device, and where a path leads to in it.
fn place(table: &[u8], path: &Path) -> Option<(Vec<u8>, PathBuf)> {
    let mount = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?.stx_mnt_id;
    within(table, mount, &fs::canonicalize(path).ok()?)
}

/// What the kubelet means by a volume; none when it is to be shared.
///
/// # Errors
/// When it can't be looked at.
pub fn special(volume: &Volume) -> Result<Option<Special>, ShareError> {
    let source = volume.source.as_path();
    let found = fs::metadata(source).map_err(at("look at", source))?;
    if !found.is_dir() {
        return Ok(None);
    }
    let system = rustix::fs::statfs(source).map_err(|errno| at("look at", source)(errno.into()))?;
    if system.f_type == HUGETLBFS {
        return Ok(Some(Special::HugePages(system.f_bsize.unsigned_abs())));
    }
    let kind = source.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    if kind.is_some_and(|kind| WRITTEN.contains(&kind)) {
        let swapped = fs::symlink_metadata(source.join(DATA)).is_ok_and(|link| link.is_symlink());
        return Ok(swapped.then(|| Special::Written(Owner::of(&found))));
    }
    match &volume.pod {
        Some(pod) if system.f_type == TMPFS => memory(source, &found, pod),
        _ => Ok(None),
    }
}

/// The pod's memory volume, or a part of one, which is a mount of its own on the host (`subPath`).
fn memory(source: &Path, found: &fs::Metadata, pod: &str) -> Result<Option<Special>, ShareError> {
    let table = mountinfo::read().map_err(at("read", Path::new(mountinfo::PATH)))?;
    let id = statx(CWD, source, AtFlags::empty(), StatxFlags::MNT_ID)
        .map_err(|errno| at("look at", source)(errno.into()))?
        .stx_mnt_id;
    let real = fs::canonicalize(source).map_err(at("look at", source))?;
    let Some((volume, path)) = locate(&table, id, &real, pod) else { return Ok(None) };
    let root = fs::metadata(&volume).map_err(at("look at", &volume))?;
    if root.dev() != found.dev() {
        // Something else is mounted over it.
        return Ok(None);
    }
    let system = rustix::fs::statfs(&volume).map_err(|errno| at("look at", &volume)(errno.into()))?;
    let size = system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs());
    let whole = Memory { size, root: Owner::of(&root) };
    Ok(Some(if path.as_os_str().is_empty() {
        Special::Memory(whole)
    } else {
        Special::MemoryPart { volume, whole, path, owner: Owner::of(found) }
    }))
}

/// The pod's `emptyDir` volume that a directory belongs to, and its path in there. `mount` is the mount that the directory is
/// on; the volume is where the whole of the same file system is mounted.
fn locate(table: &[u8], mount: u64, directory: &Path, pod: &str) -> Option<(PathBuf, PathBuf)> {
    let (device, inside) = within(table, mount, directory)?;
    let is_volume =
        |line: &Mount| line.device == device && line.root == Path::new("/") && is_empty_dir(&line.point, pod);
    let volume = mountinfo::parse(table).find(is_volume)?;
    Some((volume.point, inside.strip_prefix("/").ok()?.to_owned()))
}

/// The device of the file system that a mount is of, and the path in there of a directory or file on the mount.
fn within(table: &[u8], mount: u64, path: &Path) -> Option<(Vec<u8>, PathBuf)> {
    let own = mountinfo::parse(table).find(|line| line.id == mount)?;
    let below = path.strip_prefix(&own.point).ok()?;
    // The mount of a file alone has nothing below.
    let inside = if below.as_os_str().is_empty() { own.root } else { own.root.join(below) };
    Some((own.device, inside))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn of_pod(source: &Path) -> Volume {
        Volume { source: source.to_owned(), pod: Some("1".to_owned()), ..Volume::default() }
    }

    #[test]
    fn what_the_kubelet_writes_anew_is_known_by_its_link() {
        let pod = tempfile::tempdir().unwrap();
        let volume = pod.path().join("kubernetes.io~configmap/config");
        fs::create_dir_all(volume.join("..2026")).unwrap();
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(special(&of_pod(&volume)).unwrap(), None);
        symlink("..2026", volume.join(DATA)).unwrap();
        assert!(matches!(
            special(&of_pod(&volume)).unwrap(),
            Some(Special::Written(Owner { mode: 0o750, .. }))
        ));
        let elsewhere = pod.path().join("other");
        fs::create_dir(&elsewhere).unwrap();
        symlink("..2026", elsewhere.join(DATA)).unwrap();
        assert_eq!(special(&of_pod(&elsewhere)).unwrap(), None);
        assert!(special(&of_pod(&pod.path().join("nothing"))).is_err());
    }

    #[test]
    fn an_empty_directory_is_shared_on_whatever_it_is() {
        for place in ["/var/tmp", "/dev/shm"] {
            let pod = tempfile::tempdir_in(place).unwrap();
            let volume = pod.path().join("pods/1/volumes/kubernetes.io~empty-dir/scratch");
            fs::create_dir_all(&volume).unwrap();
            assert_eq!(special(&of_pod(&volume)).unwrap(), None);
        }
    }

    const TABLE: &str = "\
        21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
        30 21 0:50 / /k/pods/1/volumes/kubernetes.io~empty-dir/my\\040data rw shared:9 - tmpfs tmpfs rw,size=64k\n\
        31 21 0:50 /a/b\\040c /k/pods/1/volume-subpaths/my\\040data/user/0 rw shared:9 - tmpfs tmpfs rw\n\
        32 21 0:51 / /elsewhere rw - tmpfs tmpfs rw\n\
        33 21 0:52 / /k/pods/1/volumes/kubernetes.io~empty-dir/disk rw - ext4 /dev/sdb rw\n";

    #[test]
    fn a_part_of_a_memory_volume_is_known_by_its_file_system() {
        let of = |mount, path: &str| locate(TABLE.as_bytes(), mount, Path::new(path), "1");
        let volume = "/k/pods/1/volumes/kubernetes.io~empty-dir/my data";
        assert_eq!(of(30, volume), Some((volume.into(), "".into())));
        assert_eq!(of(30, &format!("{volume}/x/y")), Some((volume.into(), "x/y".into())));
        let part = "/k/pods/1/volume-subpaths/my data/user/0";
        assert_eq!(of(31, part), Some((volume.into(), "a/b c".into())));
        assert_eq!(of(31, &format!("{part}/d")), Some((volume.into(), "a/b c/d".into())));
        assert_eq!(of(32, "/elsewhere"), None);
        assert_eq!(of(99, "/elsewhere"), None);
        assert_eq!(of(21, "/elsewhere/../x"), None);
        assert_eq!(locate(b"nonsense\n1 2\n\n", 1, Path::new("/"), "1"), None);
    }

    #[test]
    fn what_is_another_pods_is_not_the_pods_own() {
        let own = |path: &str, pod: &str| is_empty_dir(Path::new(path), pod);
        let volume = "/k/pods/1/volumes/kubernetes.io~empty-dir/data";
        assert!(own(volume, "1"));
        assert!(!own(volume, "2"));
        assert!(!own(&format!("{volume}/below"), "1"));
        assert!(!own("/k/1/volumes/kubernetes.io~empty-dir/data", "1"));
        assert!(!own("/k/pods/volumes/kubernetes.io~empty-dir/data", ""));
        assert!(!own("kubernetes.io~empty-dir/data", "1"));
        let part = Path::new("/k/pods/1/volume-subpaths/my data/user/0");
        assert_eq!(locate(TABLE.as_bytes(), 31, part, "2"), None);
    }
}
