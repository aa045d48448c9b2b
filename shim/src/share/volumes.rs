//! What of a pod's volumes is in its share: each directory and file of the host once, whichever of its containers have it.
//!
//! In the guest, each mount in the share is a file system of its own, with inodes of its own. By way of two mounts of one
//! directory, one container would not find the locks that another one holds there nor the sockets that it listens on
//! (flock(2), unix(7)), and would see what it writes a moment later.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::mount::MountFlags;

use super::Placed;
use super::options::{Options, Propagation};
use crate::id::Id;

/// Where they are in the share. No container can be called that.
pub(super) const DIRECTORY: &str = "_volumes";

/// What makes one mount as good as another, but for whether it can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    device: u64,
    inode: u64,
    /// What may be done there on the host: two mounts of one directory may differ in that.
    mounted: StatVfsMountFlags,
    recursive: bool,
    recursive_read_only: bool,
    propagation: Propagation,
    flags: MountFlags,
}

impl Source {
    pub(super) fn new(found: &Metadata, mounted: StatVfsMountFlags, options: &Options) -> Source {
        Source {
            device: found.dev(),
            inode: found.ino(),
            mounted,
            recursive: options.recursive,
            recursive_read_only: options.recursive_read_only,
            propagation: options.propagation,
            flags: options.flags,
        }
    }
}

#[derive(Debug)]
struct Volume {
    /// The file that it is of can't be another's while it is mounted.
    source: Source,
    writable: bool,
    placed: Placed,
    users: BTreeSet<Id>,
    /// All of it is there.
    complete: bool,
}

/// A pod's.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    list: Vec<Volume>,
    count: usize,
}

impl Volumes {
    /// One that is there already. The guest keeps a container from writing that is only to read; the host keeps the guest
    /// from it when no container may write.
    pub(super) fn find(&mut self, source: &Source, writable: bool, user: &Id) -> Option<Placed> {
        let fits = |volume: &&mut Volume| {
            volume.complete && volume.source == *source && (volume.writable || !writable)
        };
        let found = self.list.iter_mut().find(fits)?;
        found.users.insert(user.clone());
        Some(found.placed.clone())
    }

    /// A place for one that is about to be made.
    pub(super) fn begin(&mut self, source: Source, writable: bool, mapped: bool, user: &Id) -> Placed {
        let placed = Placed { path: Path::new(DIRECTORY).join(self.count.to_string()), part: None, mapped };
        self.count = self.count.saturating_add(1);
        let users = BTreeSet::from([user.clone()]);
        self.list.push(Volume { source, writable, placed: placed.clone(), users, complete: false });
        placed
    }

    /// It was made.
    pub(super) fn complete(&mut self, placed: &Placed) {
        for volume in self.list.iter_mut().filter(|volume| volume.placed == *placed) {
            volume.complete = true;
        }
    }

    /// The places of those that only `user` has. They are no one else's any more.
    pub(super) fn only_of(&mut self, user: &Id) -> Vec<PathBuf> {
        let own = |volume: &&mut Volume| volume.users.len() == 1 && volume.users.contains(user);
        let ending = |volume: &mut Volume| {
            volume.complete = false;
            volume.placed.path.clone()
        };
        self.list.iter_mut().filter(own).map(ending).collect()
    }

    /// `user` has none any more.
    pub(super) fn leave(&mut self, user: &Id) {
        for volume in &mut self.list {
            volume.users.remove(user);
        }
        self.list.retain(|volume| !volume.users.is_empty());
    }
}
