//! Where memory is in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  memory, up to 3 GiB
//! 0xc000_0000  hole, for what is not memory
//! 0x1_0000_0000  memory beyond 3 GiB, then hotpluggable memory
//! ```

/// Size of a guest page, and of a host page on every host that this VMM runs on.
pub const PAGE_SIZE: u64 = 4096;

/// End of memory below the hole.
pub const LOW_END: u64 = 0xc000_0000;
/// Start of memory above the hole.
pub const ABOVE_4G: u64 = 1 << 32;

/// Hotpluggable memory starts at a multiple of this, which is also a multiple of any Linux memory block size
/// that a guest of this VMM can choose.
pub const HOTPLUG_ALIGN: u64 = 1 << 31;

/// The start and length of each region of boot memory.
#[must_use]
pub fn boot_regions(size: u64) -> Vec<(u64, u64)> {
    if size <= LOW_END { vec![(0, size)] } else { vec![(0, LOW_END), (ABOVE_4G, size - LOW_END)] }
}

/// Where hotpluggable memory starts on a machine with `size` bytes of boot memory.
#[must_use]
pub fn hotplug_start(size: u64) -> u64 {
    (ABOVE_4G + size.saturating_sub(LOW_END)).next_multiple_of(HOTPLUG_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_stays_out_of_the_hole() {
        assert_eq!(boot_regions(128 << 20), [(0, 128 << 20)]);
        assert_eq!(boot_regions(3 << 30), [(0, 3 << 30)]);
        assert_eq!(boot_regions(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn hotpluggable_memory_follows_boot_memory() {
        assert_eq!(hotplug_start(128 << 20), 4 << 30);
        assert_eq!(hotplug_start(4 << 30), 6 << 30);
        assert_eq!(hotplug_start(5 << 30), 6 << 30);
    }
}
