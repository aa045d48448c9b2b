//! Makes a directory hold exactly a given tree, each entry replaced atomically.
//!
//! A container may have the storage mounted and be hostile: every path is resolved beneath the storage's root without
//! following any link.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use caisson_protocol::v1::{TreeEntry, tree_entry::Kind};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};

use super::StorageError;

/// A name that no entry may have.
const TEMPORARY: &str = ".caisson-new";
/// Directories inside of each other.
const MAX_DEPTH: usize = 32;

pub(super) fn sync(root: &Path, id: &str, entries: &[TreeEntry]) -> Result<(), StorageError> {
    let mut wanted = HashSet::new();
    for entry in entries {
        wanted.insert(check(entry)?);
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let root = nix::fcntl::open(root, flags, Mode::empty())
        .map_err(|errno| StorageError::io("open", id)(errno.into()))?;
    for entry in entries {
        put(root.as_fd(), entry).map_err(StorageError::io("write to", id))?;
    }
    remove_others(root.as_fd(), Path::new(""), &wanted, 0).map_err(StorageError::io("clean", id))
}

/// The entry's path, when it is a proper one.
fn check(entry: &TreeEntry) -> Result<PathBuf, StorageError> {
    let invalid = || StorageError::invalid("path", &entry.path);
    let path = Path::new(&entry.path);
    let plain = path.components().all(|part| matches!(part, Component::Normal(name) if name != TEMPORARY));
    // Doubled and trailing slashes vanish in components.
    let canonical = path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
    if !plain || !canonical || path.components().count() > MAX_DEPTH || entry.path.contains('\0') {
        return Err(invalid());
    }
    if entry.path.is_empty() || entry.kind.is_none() {
        return Err(invalid());
    }
    if entry.mode > 0o7777 {
        return Err(StorageError::invalid("mode", format!("{:o}", entry.mode)));
    }
    Ok(path.to_owned())
}

fn beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

fn put(root: BorrowedFd<'_>, entry: &TreeEntry) -> io::Result<()> {
    let path = Path::new(&entry.path);
    let parent = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().unwrap_or_default();
    let parent = beneath(root, parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let (owner, group) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    let mode = Mode::from_bits_truncate(entry.mode);
    // Nobody is to hear of a change that is none.
    if is_there(parent.as_fd(), name, entry).unwrap_or(false) {
        return Ok(());
    }
    // Left over from a call that was cut short.
    match unlinkat(&parent, TEMPORARY, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    match &entry.kind {
        Some(Kind::File(bytes)) => {
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mut file = File::from(openat(&parent, TEMPORARY, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
            file.write_all(bytes)?;
            fchown(&file, owner, group)?;
            fchmod(&file, mode)?;
        }
        Some(Kind::Symlink(target)) => {
            symlinkat(target.as_str(), &parent, TEMPORARY)?;
            fchownat(&parent, TEMPORARY, owner, group, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        Some(Kind::Directory(_)) => {
            match mkdirat(&parent, name, Mode::S_IRWXU) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let directory = openat(&parent, name, flags, Mode::empty())?;
            fchown(&directory, owner, group)?;
            return Ok(fchmod(&directory, mode)?);
        }
        None => return Ok(()),
    }
    match renameat(&parent, TEMPORARY, &parent, name) {
        Err(Errno::EISDIR) => {
            remove_tree(parent.as_fd(), name, 0)?;
            Ok(renameat(&parent, TEMPORARY, &parent, name)?)
        }
        result => Ok(result?),
    }
}

/// Whether a file or link is as it is to be.
fn is_there(parent: BorrowedFd<'_>, name: &OsStr, entry: &TreeEntry) -> io::Result<bool> {
    let found = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits());
    if (found.st_uid, found.st_gid) != (entry.uid, entry.gid) {
        return Ok(false);
    }
    match &entry.kind {
        Some(Kind::Symlink(target)) if kind == SFlag::S_IFLNK => {
            Ok(readlinkat(parent, name)?.as_bytes() == target.as_bytes())
        }
        Some(Kind::File(bytes)) if kind == SFlag::S_IFREG && found.st_mode & 0o7777 == entry.mode => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let mut held = Vec::new();
            // One byte more than there is to be tells one that is longer.
            let most = u64::try_from(bytes.len()).unwrap_or(u64::MAX).saturating_add(1);
            File::from(openat(parent, name, flags, Mode::empty())?).take(most).read_to_end(&mut held)?;
            Ok(held == *bytes)
        }
        _ => Ok(false),
    }
}

/// Removes what is beneath `directory` and not `wanted`.
fn remove_others(
    root: BorrowedFd<'_>,
    directory: &Path,
    wanted: &HashSet<PathBuf>,
    depth: usize,
) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::ELOOP.into());
    }
    let opened = beneath(root, directory, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    for (name, is_directory) in children(opened.try_clone()?)? {
        let name = OsStr::from_bytes(name.as_bytes());
        let path = directory.join(name);
        if !wanted.contains(&path) {
            remove_tree(opened.as_fd(), name, depth)?;
        } else if is_directory {
            remove_others(root, &path, wanted, depth + 1)?;
        }
    }
    Ok(())
}

fn remove_tree(parent: BorrowedFd<'_>, name: &OsStr, depth: usize) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) if depth <= 2 * MAX_DEPTH => {}
        Err(errno) => return Err(errno.into()),
    }
    // Writable for us, whatever its mode is: the agent has CAP_DAC_OVERRIDE.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty())?;
    for (child, _) in children(directory.try_clone()?)? {
        remove_tree(directory.as_fd(), OsStr::from_bytes(child.as_bytes()), depth + 1)?;
    }
    Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
}

fn children(directory: OwnedFd) -> io::Result<Vec<(CString, bool)>> {
    let mut children = Vec::new();
    for entry in Dir::from_fd(directory)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            let is_directory = entry.file_type() == Some(nix::dir::Type::Directory);
            children.push((name.to_owned(), is_directory));
        }
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn entry(path: &str, kind: Kind) -> TreeEntry {
        // Our own ids, so that unprivileged runs work.
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let mode = if matches!(kind, Kind::Directory(_)) { 0o755 } else { 0o640 };
        TreeEntry { path: path.into(), kind: Some(kind), mode, uid, gid }
    }

    fn file(path: &str, text: &str) -> TreeEntry {
        entry(path, Kind::File(text.into()))
    }

    #[test]
    fn a_projected_volume_is_swapped() {
        let root = tempfile::tempdir().unwrap();
        let generation = |name: &str, text: &str| {
            vec![
                entry(name, Kind::Directory(true)),
                file(&format!("{name}/key"), text),
                entry("..data", Kind::Symlink(name.into())),
                entry("key", Kind::Symlink("..data/key".into())),
            ]
        };
        sync(root.path(), "s", &generation("..one", "1")).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("key")).unwrap(), "1");
        sync(root.path(), "s", &generation("..two", "2")).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("key")).unwrap(), "2");
        assert!(!root.path().join("..one").exists());
        let mode = fs::metadata(root.path().join("key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let entries =
            |text: &str, target: &str| [file("file", text), entry("link", Kind::Symlink(target.into()))];
        let inodes =
            || ["file", "link"].map(|name| fs::symlink_metadata(root.path().join(name)).unwrap().ino());
        sync(root.path(), "s", &entries("text", "file")).unwrap();
        let before = inodes();
        sync(root.path(), "s", &entries("text", "file")).unwrap();
        assert_eq!(inodes(), before);
        sync(root.path(), "s", &entries("texts", "files")).unwrap();
        assert!(inodes().iter().zip(before).all(|(now, before)| *now != before));
        assert_eq!(fs::read_to_string(root.path().join("file")).unwrap(), "texts");
        let mode = TreeEntry { mode: 0o600, ..file("file", "texts") };
        sync(root.path(), "s", &[mode]).unwrap();
        assert_eq!(fs::metadata(root.path().join("file")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_link_inside_does_not_lead_out() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("victim"), "safe").unwrap();
        symlink(outside.path(), root.path().join("dir")).unwrap();
        assert!(sync(root.path(), "s", &[file("dir/victim", "owned")]).is_err());
        symlink(outside.path().join("victim"), root.path().join("victim")).unwrap();
        sync(root.path(), "s", &[file("victim", "mine")]).unwrap();
        assert_eq!(fs::read_to_string(outside.path().join("victim")).unwrap(), "safe");
        assert!(!root.path().join("dir").exists(), "what was not named is removed, not followed");
        assert_eq!(fs::read_to_string(root.path().join("victim")).unwrap(), "mine");
    }

    #[test]
    fn a_directory_gives_way_to_a_file() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("x/y/z")).unwrap();
        sync(root.path(), "s", &[file("x", "text")]).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("x")).unwrap(), "text");
    }

    #[test]
    fn improper_paths_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for bad in ["", "/etc/x", "../x", "a/../b", "a//b", "a/", "./a", "a\0b", TEMPORARY] {
            assert!(sync(root.path(), "s", &[file(bad, "")]).is_err(), "{bad:?}");
        }
    }
}
