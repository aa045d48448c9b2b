//! Gives a path in a storage a mount point of its own.
//!
//! A container may have the storage mounted and be hostile: no link leads further than the storage's root, and what was
//! found is mounted by its descriptor.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use caisson_protocol::v1::{Part, Storage};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::MsFlags;
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, fchown};

use super::{StorageError, remove_point};

/// Names in a path.
const MAX_DEPTH: usize = 64;

/// What comes of a directory that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// It is made.
    Made,
    /// The part can't be had.
    Refused,
}

/// Mounts what is at the part's path below `whole` on its own directory or file, which is `directory`/id.
pub(super) fn mount(
    whole: &Path,
    missing: Missing,
    directory: &Path,
    storage: &Storage,
    part: &Part,
) -> Result<PathBuf, StorageError> {
    check(part)?;
    if storage.read_only || !storage.options.is_empty() {
        return Err(StorageError::invalid("options", &storage.id));
    }
    let found = find(whole, part, missing).map_err(StorageError::io("find the part", &storage.id))?;
    let target = directory.join(&storage.id);
    let make = || {
        let found = format!("/proc/self/fd/{}", found.as_raw_fd());
        if fs::metadata(&found)?.is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            File::create_new(&target)?;
        }
        let none = None::<&str>;
        let mounted = nix::mount::mount(Some(found.as_str()), &target, none, MsFlags::MS_BIND, none);
        mounted.map_err(|errno| {
            let _ = remove_point(&target);
            io::Error::from(errno)
        })
    };
    make().map_err(StorageError::io("mount", &storage.id))?;
    Ok(target)
}

fn check(part: &Part) -> Result<(), StorageError> {
    if part.path.is_empty() || !is_plain(&part.path) {
        return Err(StorageError::invalid("path", &part.path));
    }
    if !is_plain(&part.root) {
        return Err(StorageError::invalid("root", &part.root));
    }
    if part.mode > 0o7777 {
        return Err(StorageError::invalid("mode", format!("{:o}", part.mode)));
    }
    Ok(())
}

/// Whether a relative path is of names alone, and not too many.
fn is_plain(path: &str) -> bool {
    let names = Path::new(path).components();
    !path.contains('\0')
        && names.clone().count() <= MAX_DEPTH
        && names.into_iter().all(|name| matches!(name, Component::Normal(_)))
}

/// The directory that no link leads out of.
fn root(whole: &Path, part: &Part) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let whole = nix::fcntl::open(whole, flags, Mode::empty())?;
    if part.root.is_empty() {
        return Ok(whole);
    }
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    Ok(openat2(&whole, part.root.as_str(), OpenHow::new().flags(flags).resolve(resolve))?)
}

fn find(whole: &Path, part: &Part, missing: Missing) -> io::Result<OwnedFd> {
    let root = root(whole, part)?;
    let mut at = PathBuf::new();
    let mut parent = root.try_clone()?;
    for name in Path::new(&part.path) {
        at.push(name);
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
        parent = match openat2(&root, &at, how) {
            Err(Errno::ENOENT) if missing == Missing::Made => make(parent.as_fd(), name, part)?,
            found => found?,
        };
    }
    Ok(parent)
}

fn make(parent: BorrowedFd<'_>, name: &OsStr, part: &Part) -> io::Result<OwnedFd> {
    mkdirat(parent, name, Mode::S_IRWXU)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty())?;
    fchown(&directory, Some(Uid::from_raw(part.uid)), Some(Gid::from_raw(part.gid)))?;
    fchmod(&directory, Mode::from_bits_truncate(part.mode))?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn part(path: &str) -> Part {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Part { storage_id: "whole".into(), path: path.into(), mode: 0o770, uid, gid, root: String::new() }
    }

    fn find(whole: &Path, part: &Part) -> io::Result<OwnedFd> {
        super::find(whole, part, Missing::Made)
    }

    fn inode(found: &OwnedFd) -> u64 {
        nix::sys::stat::fstat(found).unwrap().st_ino
    }

    #[test]
    fn what_is_missing_is_made_and_what_is_there_is_found() {
        let whole = tempfile::tempdir().unwrap();
        let made = find(whole.path(), &part("a/b")).unwrap();
        let seen = fs::metadata(whole.path().join("a/b")).unwrap();
        assert_eq!((seen.ino(), seen.permissions().mode() & 0o7777), (inode(&made), 0o770));
        fs::write(whole.path().join("a/file"), "").unwrap();
        let file = fs::metadata(whole.path().join("a/file")).unwrap();
        assert_eq!(inode(&find(whole.path(), &part("a/file")).unwrap()), file.ino());
        assert!(find(whole.path(), &part("a/file/below")).is_err());
    }

    #[test]
    fn links_lead_no_further_than_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let whole = tempfile::tempdir().unwrap();
        fs::create_dir(whole.path().join("inside")).unwrap();
        symlink("inside", whole.path().join("link")).unwrap();
        let inside = fs::metadata(whole.path().join("inside")).unwrap();
        assert_eq!(inode(&find(whole.path(), &part("link")).unwrap()), inside.ino());
        symlink(outside.path(), whole.path().join("out")).unwrap();
        // The link's target is looked for inside, and a dangling link is in the way of a new directory.
        assert!(find(whole.path(), &part("out")).is_err());
        symlink("../../..", whole.path().join("up")).unwrap();
        let root = fs::metadata(whole.path()).unwrap();
        assert_eq!(inode(&find(whole.path(), &part("up")).unwrap()), root.ino());
    }

    #[test]
    fn links_lead_no_further_than_a_root_below() {
        let whole = tempfile::tempdir().unwrap();
        fs::create_dir_all(whole.path().join("volumes/0/sub")).unwrap();
        fs::create_dir(whole.path().join("other")).unwrap();
        symlink("../../other", whole.path().join("volumes/0/out")).unwrap();
        symlink("volumes", whole.path().join("link")).unwrap();
        let below = |root: &str, path: &str| {
            super::find(whole.path(), &Part { root: root.into(), ..part(path) }, Missing::Refused)
        };
        let sub = fs::metadata(whole.path().join("volumes/0/sub")).unwrap();
        assert_eq!(inode(&below("volumes/0", "sub").unwrap()), sub.ino());
        assert!(below("volumes/0", "out").is_err(), "its target is looked for in the volume");
        assert!(below("volumes/0", "new").is_err() && !whole.path().join("volumes/0/new").exists());
        assert!(below("link/0", "sub").is_err() && below("volumes/1", "sub").is_err());
    }

    #[test]
    fn improper_paths_are_refused() {
        for bad in ["", "/etc", "..", "a/../b", "./a", "a\0b", &"a/".repeat(MAX_DEPTH + 1)] {
            assert!(check(&part(bad)).is_err(), "{bad:?}");
            let refused = bad.is_empty() || check(&Part { root: bad.into(), ..part("a") }).is_err();
            assert!(refused, "{bad:?} as a root");
        }
        assert!(check(&Part { mode: 0o10000, ..part("a") }).is_err());
    }
}
