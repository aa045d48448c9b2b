//! Paths inside a container's root, always resolved on descriptors: no symbolic link, ".." or magic link of the
//! container's making leads out of it.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};
use rustix::fs::{OFlags, ResolveFlags};

use crate::container::sys;

/// A directory that paths do not lead out of.
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

const CONFINED: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

impl Root {
    pub(super) fn new(directory: OwnedFd) -> Root {
        Root(directory)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// What a path refers to, symbolic links followed, as an O_PATH descriptor.
    pub(super) fn resolve(&self, path: &Path) -> io::Result<OwnedFd> {
        sys::openat2(self.0.as_fd(), &c_path(path)?, OFlags::PATH, CONFINED)
    }

    /// The same, but a symbolic link anywhere on the path is an error.
    pub(super) fn resolve_plain(&self, path: &Path) -> io::Result<OwnedFd> {
        sys::openat2(self.0.as_fd(), &c_path(path)?, OFlags::PATH, CONFINED | ResolveFlags::NO_SYMLINKS)
    }

    /// Opens a file.
    pub(super) fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        sys::openat2(self.0.as_fd(), &c_path(path)?, flags, CONFINED)
    }

    /// A directory, made with its parents (0755) if it is not there.
    pub(super) fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.resolve(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent, name) = self.parent(path)?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.resolve(path)
    }

    /// A file, made empty and with its parents if there is nothing.
    pub(super) fn file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.resolve(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent, name) = self.parent(path)?;
        match mknodat(&parent, name, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.resolve(path)
    }

    /// The directory that a path's last component is in, made if it is not there, and that component.
    pub(super) fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.directory(parent)?, name))
    }
}

/// A path as the kernel takes it.
pub(super) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root(dir: &Path) -> Root {
        Root::new(fs::File::open(dir).unwrap().into())
    }

    #[test]
    fn no_link_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink("../../../../outside", inside.join("relative")).unwrap();
        symlink(&outside, inside.join("absolute")).unwrap();
        symlink("/proc/self/cwd", inside.join("magic")).unwrap();
        let root = root(&inside);
        for path in ["/relative/x", "/absolute/x", "/magic/x", "/../outside/x"] {
            let _ = root.directory(Path::new(path));
            let _ = root.file(Path::new(path));
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert!(root.resolve(Path::new("/../..")).is_ok(), "the root is its own parent");
        assert!(root.resolve_plain(Path::new("/relative")).is_err());
    }

    #[test]
    fn what_is_missing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let root = root(dir.path());
        root.directory(Path::new("/a/b/c")).unwrap();
        root.file(Path::new("/d/e/file")).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
        assert!(dir.path().join("d/e/file").is_file());
        assert!(root.file(Path::new("/")).is_ok(), "exists");
    }
}
