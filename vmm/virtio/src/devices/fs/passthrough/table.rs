//! What the guest holds: files that it has looked up, and files that it has open.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{sys, version::LastTold};

/// The node id of the root (fuse(4)).
pub(super) const ROOT: u64 = 1;

/// Which file it is: the same one twice is one inode, but seen through another mount it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) mount: u64,
}

/// A file that the guest has looked up. As its descriptor is open, its key is not used again.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) key: Key,
    /// `S_IFMT` of its mode; a file's type never changes.
    pub(super) kind: u32,
    /// On something that is mounted inside of what the host has put into the share.
    pub(super) passing: bool,
    /// Of a regular file, as the guest was told last.
    pub(super) version: LastTold,
    fd: OwnedFd,
}

impl Inode {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }
}

/// A file or directory that the guest has open.
#[derive(Debug)]
pub(super) struct Handle {
    inode: u64,
    pub(super) file: File,
    /// Writes go to the file's end, wherever they say.
    pub(super) appends: bool,
    /// Held while a directory is read: its position is a part of the descriptor.
    pub(super) position: Mutex<()>,
}

struct Held {
    inode: Arc<Inode>,
    /// How often the guest was told of it and has not said to forget.
    lookups: u64,
}

#[derive(Default)]
struct Maps {
    inodes: BTreeMap<u64, Held>,
    keys: BTreeMap<Key, u64>,
    handles: BTreeMap<u64, Arc<Handle>>,
    last_inode: u64,
    last_handle: u64,
}

/// All of it, for one shared directory.
pub(super) struct Table {
    root: Arc<Inode>,
    limit: usize,
    maps: Mutex<Maps>,
}

impl Table {
    pub(super) fn new(root: OwnedFd, key: Key, limit: usize) -> Self {
        let version = LastTold::default();
        let root = Arc::new(Inode { id: ROOT, key, kind: libc::S_IFDIR, passing: false, version, fd: root });
        let maps = Maps { last_inode: ROOT, ..Maps::default() };
        Self { root, limit, maps: Mutex::new(maps) }
    }

    /// Nothing under the lock can panic between two changes that belong together.
    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room(&self, maps: &Maps) -> io::Result<()> {
        if maps.inodes.len().saturating_add(maps.handles.len()) < self.limit {
            Ok(())
        } else {
            Err(sys::errno(libc::ENFILE))
        }
    }

    /// Whether one more descriptor may be held, before it is opened.
    pub(super) fn check_room(&self) -> io::Result<()> {
        self.room(&self.lock())
    }

    /// # Errors
    /// ESTALE for one that the guest was not told of, or has forgotten.
    pub(super) fn inode(&self, id: u64) -> io::Result<Arc<Inode>> {
        if id == ROOT {
            return Ok(self.root.clone());
        }
        let held = self.lock().inodes.get(&id).map(|held| held.inode.clone());
        held.ok_or_else(|| sys::errno(libc::ESTALE))
    }

    /// Whether what is on this mount, below `parent`, may have to go away at any moment: something is mounted in a
    /// directory of the host's that is itself mounted in the share.
    fn is_passing(&self, parent: &Inode, mount: u64) -> bool {
        parent.passing || (mount != parent.key.mount && parent.key.mount != self.root.key.mount)
    }

    /// Remembers a file below `parent` and counts that the guest is told of it.
    pub(super) fn look_up(&self, parent: &Inode, fd: OwnedFd, key: Key, kind: u32) -> io::Result<Arc<Inode>> {
        if key == self.root.key {
            return Ok(self.root.clone());
        }
        let mut maps = self.lock();
        let known = maps.keys.get(&key).copied();
        if let Some(held) = known.and_then(|id| maps.inodes.get_mut(&id)) {
            held.lookups = held.lookups.saturating_add(1);
            return Ok(held.inode.clone());
        }
        self.room(&maps)?;
        let id = maps.last_inode.checked_add(1).ok_or_else(|| sys::errno(libc::ENFILE))?;
        maps.last_inode = id;
        let (passing, version) = (self.is_passing(parent, key.mount), LastTold::default());
        let inode = Arc::new(Inode { id, key, kind, passing, version, fd });
        maps.keys.insert(key, id);
        maps.inodes.insert(id, Held { inode: inode.clone(), lookups: 1 });
        Ok(inode)
    }

    /// The guest forgets `count` of the times that it was told of an inode. More than there were are all of
    /// them.
    pub(super) fn forget(&self, id: u64, count: u64) {
        let mut maps = self.lock();
        let Some(held) = maps.inodes.get_mut(&id) else { return };
        held.lookups = held.lookups.saturating_sub(count);
        if held.lookups == 0 {
            let key = held.inode.key;
            maps.keys.remove(&key);
            maps.inodes.remove(&id);
        }
    }

    /// Remembers an open file.
    pub(super) fn open(&self, inode: &Inode, file: File, appends: bool) -> io::Result<u64> {
        let mut maps = self.lock();
        self.room(&maps)?;
        let id = maps.last_handle.checked_add(1).ok_or_else(|| sys::errno(libc::ENFILE))?;
        maps.last_handle = id;
        let handle = Handle { inode: inode.id, file, appends, position: Mutex::default() };
        maps.handles.insert(id, Arc::new(handle));
        Ok(id)
    }

    /// # Errors
    /// EBADF for one that is not open, or of another inode.
    pub(super) fn handle(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let handle = self.lock().handles.get(&id).cloned();
        handle.filter(|handle| handle.inode == inode).ok_or_else(|| sys::errno(libc::EBADF))
    }

    /// # Errors
    /// As [`handle`](Self::handle).
    pub(super) fn close(&self, id: u64, inode: u64) -> io::Result<()> {
        self.handle(id, inode)?;
        self.lock().handles.remove(&id);
        Ok(())
    }

    /// Whether the guest holds anything but the root.
    pub(super) fn live(&self) -> bool {
        let maps = self.lock();
        !maps.inodes.is_empty() || !maps.handles.is_empty()
    }

    /// Forgets everything; ids are not used again all the same.
    pub(super) fn clear(&self) {
        let mut maps = self.lock();
        maps.handles.clear();
        maps.inodes.clear();
        maps.keys.clear();
    }

    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn held(&self) -> (usize, usize) {
        let maps = self.lock();
        (maps.inodes.len(), maps.handles.len())
    }
}
