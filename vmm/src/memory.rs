//! Guest memory.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

/// The guest's memory as every device sees it: a fixed set of regions, shared by reference.
///
/// The set never changes while the machine runs. Memory that may be plugged later (virtio-mem) is one region that
/// is reserved at boot and populated on demand, so no device ever holds a stale view.
pub type GuestMem = Arc<GuestMemoryMmap<()>>;
