//! Network namespaces: which one it is, and work inside it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};

use super::NetworkError;

/// A network namespace, told apart from a later one at the same path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceId {
    /// Where it is mounted, or a process's `/proc/PID/ns/net`.
    pub path: PathBuf,
    /// The device of its file: nsfs, of which there is one.
    pub device: u64,
    /// The number of its file.
    pub inode: u64,
}

/// A network namespace that is open.
#[derive(Debug)]
pub(super) struct Namespace {
    file: OwnedFd,
    pub(super) id: NamespaceId,
}

impl Namespace {
    /// Opens the namespace at `path`.
    pub(super) fn open(path: &Path) -> Result<Namespace, NetworkError> {
        let failed = |source| NetworkError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let id = NamespaceId { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
        Ok(Namespace { file: file.into(), id })
    }

    /// Opens the namespace again, if it is still there.
    pub(super) fn find(id: &NamespaceId) -> Result<Option<Namespace>, NetworkError> {
        match Namespace::open(&id.path) {
            // What CNI leaves for a moment when it unmounts the namespace is an ordinary, empty file.
            Ok(found) => Ok((found.id == *id).then_some(found)),
            Err(NetworkError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Its descriptor.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether it is the one that the node's own processes are in.
    pub(super) fn is_hosts(&self) -> bool {
        ["/proc/1/ns/net", "/proc/thread-self/ns/net"].iter().any(|own| {
            fs::metadata(own).is_ok_and(|own| (own.dev(), own.ino()) == (self.id.device, self.id.inode))
        })
    }

    /// Runs `work` inside, on a thread that ends with it, with an executor of its own: no other work ever runs there,
    /// and a socket stays where it was made.
    pub(super) fn within<T: Send>(
        &self,
        work: impl AsyncFnOnce() -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        let inside = || {
            rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| NetworkError::Enter { path: self.id.path.clone(), source: error.into() })?;
            let executor = tokio::runtime::Builder::new_current_thread().enable_io().build();
            executor.map_err(NetworkError::Thread)?.block_on(work())
        };
        thread::scope(|scope| {
            let started = thread::Builder::new().name("netns".into()).spawn_scoped(scope, inside);
            let ended = started.map_err(NetworkError::Thread)?.join();
            ended.unwrap_or_else(|_| Err(NetworkError::Thread(io::Error::other("it panicked"))))
        })
    }
}
