//! What shared directories are served with: threads, and in a jail the one directory that can be reached.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_virtio::devices::fs::Workers;

use crate::{
    jail::{self, own_descriptors},
    seccomp::Thread,
};

/// Threads that serve shared directories, those of all of a machine's devices together.
const WORKERS: usize = 2;

/// What serves a machine's shared directories.
#[derive(Debug)]
pub enum Shares {
    /// Any directory that is open, by threads that start with the first of them.
    Open(Mutex<Option<Arc<Workers>>>),
    /// A jail that was made without a share: none can be served.
    None,
    /// A jail's own share, and nothing else.
    Jailed {
        /// The directory.
        root: OwnedFd,
        /// Its threads, which run already: a jailed process can't make any that may do what these may.
        workers: Arc<Workers>,
    },
}

impl Default for Shares {
    fn default() -> Self {
        Self::Open(Mutex::default())
    }
}

impl Shares {
    /// A jail's share. `descriptors` is the process's own `/proc/self/fd`. To be called right after the jail
    /// was entered, before the calling thread gives up what the share takes.
    ///
    /// # Errors
    /// When the threads can't be started.
    pub fn jailed(root: OwnedFd, descriptors: OwnedFd) -> io::Result<Self> {
        Ok(Self::Jailed { root, workers: start(descriptors)? })
    }

    /// The directory to serve, `given` or the jail's own, and the threads to do it.
    pub(super) fn serve(&self, given: Option<OwnedFd>) -> io::Result<(OwnedFd, Arc<Workers>)> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        match (self, given) {
            (Self::Open(workers), Some(directory)) => Ok((directory, started(workers)?)),
            (Self::Open(_), None) => refused("no directory is named, and there is no jail with a share"),
            (Self::None, _) => refused("the jail was made without a share"),
            (Self::Jailed { root, workers }, None) => Ok((root.try_clone()?, workers.clone())),
            (Self::Jailed { .. }, Some(_)) => refused("in a jail its own share alone can be served"),
        }
    }
}

fn start(descriptors: OwnedFd) -> io::Result<Arc<Workers>> {
    Workers::start(WORKERS, descriptors, || jail::confine_thread_or_abort(Thread::Fs))
}

fn started(workers: &Mutex<Option<Arc<Workers>>>) -> io::Result<Arc<Workers>> {
    let mut workers = workers.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(workers) = &*workers {
        return Ok(workers.clone());
    }
    let started = start(own_descriptors()?)?;
    Ok(workers.insert(started).clone())
}
