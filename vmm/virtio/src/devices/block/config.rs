/// Bytes in a sector: the unit of every position and length in the protocol, whatever the logical block size.
pub(super) const SECTOR: u64 = 512;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// The most request queues that a disk may have.
pub const MAX_QUEUES: u16 = 8;
/// Bytes of a disk's id (VIRTIO_BLK_ID_BYTES).
pub const ID_BYTES: usize = 20;
/// The most ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;
/// The longest range to discard: 2 GiB, so that no single request keeps the host busy for long.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The longest range to write zeros to: 16 MiB, as it may have to be written out.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;

/// The configuration space (VIRTIO 1.3, section 5.2.4).
#[derive(Clone, Copy, Debug)]
pub(super) struct ConfigSpace {
    /// In sectors.
    pub(super) capacity: u64,
    pub(super) queues: u16,
    pub(super) writable: bool,
}

impl ConfigSpace {
    /// Sectors in a physical block, as a power of two: 4 KiB, what the host's file systems and page cache
    /// use.
    const PHYSICAL_BLOCK_EXP: u8 = 3;

    fn bytes(self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(field) = bytes.get_mut(at..at + value.len()) {
                field.copy_from_slice(value);
            }
        };
        put(0, &self.capacity.to_le_bytes());
        // seg_max: all of a chain but its header and its status.
        put(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes());
        put(20, &512u32.to_le_bytes());
        put(24, &[Self::PHYSICAL_BLOCK_EXP]);
        // min_io_size, in logical blocks.
        put(26, &(1u16 << Self::PHYSICAL_BLOCK_EXP).to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        if self.writable {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            // discard_sector_alignment
            put(44, &(1u32 << Self::PHYSICAL_BLOCK_EXP).to_le_bytes());
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            // write_zeroes_may_unmap
            put(56, &[1]);
        }
        bytes
    }

    /// Copies what there is from `offset` on.
    pub(super) fn read(self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }
}
