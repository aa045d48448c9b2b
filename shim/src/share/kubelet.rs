//! What a kubelet means by the directories that it has mounted into containers.
//!
//! Most are shared as they are. Some are better off in the guest: memory that a pod is given as a file system has to be
//! the guest's own, or else it would come on top of the guest's; and a program that watches its configuration
//! (inotify(7)) hears of no change that another kernel makes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{ShareError, at};

/// As in the kernel's magic.h.
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;
/// The directory of a pod's `emptyDir` volumes.
const EMPTY: &str = "kubernetes.io~empty-dir";
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
    /// An empty file system in memory.
    Memory {
        /// Its size in bytes.
        size: u64,
        /// Permission bits of its root.
        mode: u32,
        /// Who that belongs to.
        uid: u32,
        /// Its group.
        gid: u32,
    },
    /// A small tree of files, which changes as a whole.
    Written,
    /// Huge pages of this many bytes.
    HugePages(u64),
}

/// What the kubelet means by `source`; none when it is to be shared.
///
/// # Errors
/// When it can't be looked at.
pub fn special(source: &Path) -> Result<Option<Special>, ShareError> {
    let found = fs::metadata(source).map_err(at("look at", source))?;
    if !found.is_dir() {
        return Ok(None);
    }
    let system = rustix::fs::statfs(source).map_err(|errno| at("look at", source)(errno.into()))?;
    if system.f_type == HUGETLBFS {
        return Ok(Some(Special::HugePages(system.f_bsize.unsigned_abs())));
    }
    let Some(kind) = source.parent().and_then(Path::file_name).and_then(|name| name.to_str()) else {
        return Ok(None);
    };
    if WRITTEN.contains(&kind) {
        let swapped = fs::symlink_metadata(source.join(DATA)).is_ok_and(|link| link.is_symlink());
        return Ok(swapped.then_some(Special::Written));
    }
    // One that was asked for in memory is a mount of its own. With something in it, part of it has been shared already.
    let is_mount = source
        .parent()
        .and_then(|parent| fs::metadata(parent).ok())
        .is_some_and(|it| it.dev() != found.dev());
    if kind == EMPTY && system.f_type == TMPFS && is_mount && is_empty(source).map_err(at("list", source))? {
        let size = system.f_blocks.saturating_mul(system.f_bsize.unsigned_abs());
        let memory =
            Special::Memory { size, mode: found.mode() & 0o7777, uid: found.uid(), gid: found.gid() };
        return Ok(Some(memory));
    }
    Ok(None)
}

fn is_empty(directory: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(directory)?.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_the_kubelet_writes_anew_is_known_by_its_link() {
        let pod = tempfile::tempdir().unwrap();
        let volume = pod.path().join("kubernetes.io~configmap/config");
        fs::create_dir_all(volume.join("..2026")).unwrap();
        assert_eq!(special(&volume).unwrap(), None);
        symlink("..2026", volume.join(DATA)).unwrap();
        assert_eq!(special(&volume).unwrap(), Some(Special::Written));
        let elsewhere = pod.path().join("other");
        fs::create_dir(&elsewhere).unwrap();
        symlink("..2026", elsewhere.join(DATA)).unwrap();
        assert_eq!(special(&elsewhere).unwrap(), None);
        assert!(special(&pod.path().join("nothing")).is_err());
    }

    #[test]
    fn an_empty_directory_is_shared_on_whatever_it_is() {
        for place in ["/var/tmp", "/dev/shm"] {
            let pod = tempfile::tempdir_in(place).unwrap();
            let volume = pod.path().join("kubernetes.io~empty-dir/scratch");
            fs::create_dir_all(&volume).unwrap();
            assert_eq!(special(&volume).unwrap(), None);
        }
    }
}
