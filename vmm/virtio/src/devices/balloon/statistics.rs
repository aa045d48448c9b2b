use serde::Serialize;

/// Length of `struct virtio_balloon_stat`: a 16-bit tag and a 64-bit value, unaligned (VIRTIO 1.3, section
/// 5.5.6.3).
const ENTRY_LEN: usize = 10;

/// More bytes of statistics than any driver sends.
pub(super) const MAX_LEN: usize = 64 * ENTRY_LEN;

/// How the guest uses its memory, as its driver tells. A figure that it left out is `None`.
///
/// These are the guest's own words: good for sizing and for people, not for anything that must be true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Bytes swapped in since boot.
    pub swap_in: Option<u64>,
    /// Bytes swapped out since boot.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O since boot.
    pub major_faults: Option<u64>,
    /// Page faults that needed none since boot.
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    pub free_memory: Option<u64>,
    /// Bytes of memory that the guest sees.
    pub total_memory: Option<u64>,
    /// Bytes that a new workload could have without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of file caches that can be dropped.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated since boot.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated since boot.
    pub hugetlb_failures: Option<u64>,
    /// Processes that the guest's OOM killer ended since boot.
    pub oom_kills: Option<u64>,
}

impl Statistics {
    /// Reads what the driver wrote. Unknown tags and a torn last entry are passed over; of a tag that comes
    /// twice the last one counts.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut all = Self::default();
        for entry in bytes.chunks_exact(ENTRY_LEN) {
            let (tag, value) = entry.split_at(2);
            let (Ok(tag), Ok(value)) = (tag.try_into(), value.try_into()) else { continue };
            if let Some(field) = all.field(u16::from_le_bytes(tag)) {
                *field = Some(u64::from_le_bytes(value));
            }
        }
        all
    }

    /// The figure for a tag (VIRTIO_BALLOON_S_*).
    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kills,
            _ => return None,
        })
    }
}
