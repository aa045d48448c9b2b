//! Guest memory: how it is laid out, what backs it, and how pages of it go back to the host.

mod discard;
mod ram;
mod save;

pub mod layout;

use std::{io, sync::Arc};

pub use ram::{GuestRam, RamConfig, RamError, Range, Slot};

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// The guest's memory as every device sees it: a fixed set of regions, shared by reference.
///
/// The set never changes while the machine runs. Memory that may be plugged later (virtio-mem) is one region
/// that is reserved at boot and populated on demand, so no device ever holds a stale view.
pub type GuestMem = Arc<GuestMemoryMmap<()>>;

/// Gives pages of guest memory back to the host.
///
/// What that takes depends on what backs a page: dropping a private page of a mapped file (a template's
/// memory) would bring the file's bytes back, so such a page is replaced rather than dropped. Only the owner
/// of the mappings knows, hence devices (balloon, virtio-mem) ask for it here.
pub trait Discard: Send + Sync {
    /// Frees `len` bytes from `addr`; afterwards the guest reads zeros there. Both are multiples of the page
    /// size (4 KiB).
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when the range is not page-aligned or not guest memory; otherwise the
    /// host's error.
    fn discard(&self, addr: GuestAddress, len: u64) -> io::Result<()>;
}
