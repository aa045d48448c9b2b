//! A pod's directory: the place of its record, its share and its sockets, and the lock that says who owns the pod.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::id::Id;
use crate::journal::{CleanError, Journal, JournalError};

/// Where the pods of this machine have their directories. Below `/run`, so that no restart of it leaves any behind.
pub const ROOT: &str = "/run/caisson";

/// A pod's directory, owned by this process until it is dropped.
#[derive(Debug)]
pub struct PodDirectory {
    path: PathBuf,
    /// Open and locked.
    handle: File,
}

/// Why a pod's directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The kernel refused.
    #[error("{action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process owns the pod.
    #[error("pod directory {0:?} belongs to a shim that lives")]
    Owned(PathBuf),
    /// What an earlier owner left cannot be undone.
    #[error("undo what is left in {path:?}")]
    Leftovers {
        /// The directory.
        path: PathBuf,
        /// What is left, and why.
        source: CleanError,
    },
}

impl PodDirectory {
    /// The directory of a pod. The sign in the middle is in no identifier, so two pods never share one.
    pub fn path_of(root: &Path, namespace: &Id, pod: &Id) -> PathBuf {
        root.join(format!("{namespace}+{pod}"))
    }

    /// Makes the directory. What a dead owner left in its place is undone first.
    ///
    /// # Errors
    /// When the pod has an owner that lives, or something of a dead one can't be undone.
    pub fn create(root: &Path, namespace: &Id, pod: &Id) -> Result<PodDirectory, DirectoryError> {
        let path = Self::path_of(root, namespace, pod);
        let mut builder = DirBuilder::new();
        builder.mode(0o711).recursive(true).create(root).map_err(|source| io_error("make", root, source))?;
        loop {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result.map_err(|source| io_error("make", &path, source))?,
            }
            let Some(directory) = Self::lock(path.clone())? else { continue };
            if !directory.is_empty()? {
                directory.clean()?;
                continue;
            }
            return Ok(directory);
        }
    }

    /// The directory of a pod whose owner is dead, if there is one.
    ///
    /// # Errors
    /// When its owner lives, or it can't be opened.
    pub fn adopt(root: &Path, namespace: &Id, pod: &Id) -> Result<Option<PodDirectory>, DirectoryError> {
        Self::lock(Self::path_of(root, namespace, pod))
    }

    /// Opens and locks it; `None` when it is gone by then.
    fn lock(path: PathBuf) -> Result<Option<PodDirectory>, DirectoryError> {
        let handle = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(|source| io_error("open", &path, source))?,
        };
        match rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(DirectoryError::Owned(path)),
            result => result.map_err(|errno| io_error("lock", &path, errno.into()))?,
        }
        // Between the two, its owner may have removed it, and another one may have made a new one.
        let ours = handle.metadata().map_err(|source| io_error("look at", &path, source))?;
        match fs::metadata(&path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                Ok(Some(PodDirectory { path, handle }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(io_error("look at", &path, source)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Something in it by a path that is short however long the pod's name is: a unix socket's path is limited to 107
    /// bytes (unix(7)). It holds within this process.
    pub fn short_path(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd()).into()
    }

    /// Opens the pod's record.
    ///
    /// # Errors
    /// When there is something else in its place.
    pub fn journal(&self) -> Result<Journal, JournalError> {
        Journal::open(&self.path)
    }

    /// Undoes everything of the record, and removes the directory.
    ///
    /// # Errors
    /// When something remains, which another try then finds.
    pub fn clean(self) -> Result<(), DirectoryError> {
        let leftovers = |source| DirectoryError::Leftovers { path: self.path.clone(), source };
        self.journal().map_err(CleanError::from).and_then(Journal::undo).map_err(leftovers)?;
        fs::remove_dir(&self.path).map_err(|source| io_error("remove", &self.path, source))
    }

    fn is_empty(&self) -> Result<bool, DirectoryError> {
        let failed = |source| io_error("read", &self.path, source);
        Ok(fs::read_dir(&self.path).map_err(failed)?.next().is_none())
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> DirectoryError {
    DirectoryError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Resource;

    fn id(text: &str) -> Id {
        text.parse().unwrap()
    }

    #[test]
    fn one_owner_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let (namespace, pod) = (id("k8s.io"), id("p"));
        let owner = PodDirectory::create(root.path(), &namespace, &pod).unwrap();
        let second = PodDirectory::create(root.path(), &namespace, &pod);
        assert!(matches!(second, Err(DirectoryError::Owned(_))));
        assert!(matches!(PodDirectory::adopt(root.path(), &namespace, &pod), Err(DirectoryError::Owned(_))));
        owner.clean().unwrap();
        assert!(PodDirectory::adopt(root.path(), &namespace, &pod).unwrap().is_none());
    }

    #[test]
    fn the_next_owner_undoes_what_a_dead_one_left() {
        let root = tempfile::tempdir().unwrap();
        let (namespace, pod) = (id("default"), id("p"));
        let dead = PodDirectory::create(root.path(), &namespace, &pod).unwrap();
        let left = dead.path().join("socket");
        dead.journal().unwrap().record(Resource::File(left.clone())).unwrap();
        fs::write(&left, "").unwrap();
        drop(dead);
        let next = PodDirectory::create(root.path(), &namespace, &pod).unwrap();
        assert!(!left.exists());
        next.clean().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_long_name_has_a_short_path() {
        let root = tempfile::tempdir().unwrap();
        let long = id(&"p".repeat(76));
        let directory = PodDirectory::create(root.path(), &long, &long).unwrap();
        assert!(directory.path().as_os_str().len() > 107);
        std::os::unix::net::UnixListener::bind(directory.short_path("vsock")).unwrap();
        assert!(directory.path().join("vsock").exists());
    }
}
