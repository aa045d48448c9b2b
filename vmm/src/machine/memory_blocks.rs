//! The machine's side of the memory device: its region as KVM memory slots.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_virtio::{devices::mem::Blocks, memory::Discard};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

/// The region in chunks, each of them a KVM memory slot for as long as any block in it is plugged.
///
/// One slot for each block would be many (and adding one stops all vCPUs for a moment), one for the whole
/// region would leave all of it to the guest from the start. A chunk is as large as a memory block of a Linux
/// guest (128 MiB), or larger so that there are at most [`MAX_CHUNKS`](Self::MAX_CHUNKS).
pub(super) struct KvmBlocks {
    vm: Arc<VmFd>,
    discard: Arc<dyn Discard>,
    region: HostRegion,
    chunk_size: u64,
    /// How many bytes of each chunk are plugged.
    plugged: Mutex<Vec<u64>>,
}

/// Where the region is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostRegion {
    /// Guest physical address.
    pub(super) guest: u64,
    /// Its address in this process.
    pub(super) host: u64,
    /// Length in bytes.
    pub(super) len: u64,
    /// The number of the first of the KVM memory slots that it may use.
    pub(super) first_slot: u32,
}

impl KvmBlocks {
    /// The most memory slots that it uses.
    pub(super) const MAX_CHUNKS: u64 = 512;
    const MIN_CHUNK: u64 = 128 << 20;

    /// # Safety
    /// `region.host` is a readable and writable mapping of `region.len` bytes, which outlives the virtual
    /// machine, and no one else uses the slots from `region.first_slot` on.
    #[must_use]
    pub(super) unsafe fn new(vm: Arc<VmFd>, discard: Arc<dyn Discard>, region: HostRegion) -> Self {
        let chunk_size = region.len.div_ceil(Self::MAX_CHUNKS).next_power_of_two().max(Self::MIN_CHUNK);
        let chunks = usize::try_from(region.len.div_ceil(chunk_size)).unwrap_or_default();
        Self { vm, discard, region, chunk_size, plugged: Mutex::new(vec![0; chunks]) }
    }

    /// Adds or removes a chunk's slot.
    fn set_slot(&self, chunk: usize, present: bool) -> io::Result<()> {
        let offset = chunk as u64 * self.chunk_size;
        let len = self.chunk_size.min(self.region.len - offset);
        let slot = u32::try_from(chunk).map_err(|_| io::ErrorKind::InvalidInput)?;
        let region = kvm_userspace_memory_region {
            slot: self.region.first_slot + slot,
            flags: 0,
            guest_phys_addr: self.region.guest + offset,
            memory_size: if present { len } else { 0 },
            userspace_addr: self.region.host + offset,
        };
        // SAFETY: the range is inside the mapping that the caller of `new` vouched for.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(Into::into)
    }

    /// The chunks that a range touches, and how many bytes of each.
    fn chunks(&self, addr: u64, len: u64) -> io::Result<Vec<(usize, u64)>> {
        let offset = addr.checked_sub(self.region.guest).ok_or(io::ErrorKind::InvalidInput)?;
        let end = offset.checked_add(len).filter(|end| *end <= self.region.len);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        split(offset, end, self.chunk_size)
    }
}

/// Cuts a range at multiples of `chunk_size`: the number of each chunk, and how many bytes are in it.
fn split(start: u64, end: u64, chunk_size: u64) -> io::Result<Vec<(usize, u64)>> {
    let mut parts = Vec::new();
    let mut at = start;
    while at < end {
        let chunk = at / chunk_size;
        let next = ((chunk + 1) * chunk_size).min(end);
        parts.push((usize::try_from(chunk).map_err(|_| io::ErrorKind::InvalidInput)?, next - at));
        at = next;
    }
    Ok(parts)
}

impl Blocks for KvmBlocks {
    fn plug(&self, addr: u64, len: u64) -> io::Result<()> {
        let parts = self.chunks(addr, len)?;
        let mut plugged = self.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        let mut added = Vec::new();
        for (chunk, _) in parts.iter().filter(|(chunk, _)| plugged.get(*chunk) == Some(&0)) {
            if let Err(error) = self.set_slot(*chunk, true) {
                for chunk in added {
                    // Best effort: a slot that stays shows memory that is charged to the guest anyway.
                    let _ = self.set_slot(chunk, false);
                }
                return Err(error);
            }
            added.push(*chunk);
        }
        for (chunk, bytes) in parts {
            if let Some(sum) = plugged.get_mut(chunk) {
                *sum += bytes;
            }
        }
        Ok(())
    }

    fn unplug(&self, addr: u64, len: u64) -> io::Result<()> {
        let parts = self.chunks(addr, len)?;
        self.discard.discard(GuestAddress(addr), len)?;
        let mut plugged = self.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        for (chunk, bytes) in parts {
            let Some(sum) = plugged.get_mut(chunk) else { continue };
            *sum = sum.saturating_sub(bytes);
            if *sum == 0 {
                self.set_slot(chunk, false)?;
                // What was touched beside the plugged blocks goes with the slot.
                let start = chunk as u64 * self.chunk_size;
                let len = self.chunk_size.min(self.region.len - start);
                self.discard.discard(GuestAddress(self.region.guest + start), len)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_chunks() {
        assert_eq!(split(10, 10, 100).unwrap(), []);
        assert_eq!(split(10, 100, 100).unwrap(), [(0, 90)]);
        assert_eq!(split(90, 310, 100).unwrap(), [(0, 10), (1, 100), (2, 100), (3, 10)]);
    }
}
