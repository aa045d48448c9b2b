use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

/// One queue in a snapshot: every field of [`QueueState`], in a form that serializes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// The largest size that the device offered.
    pub max_size: u16,
    /// Where the device goes on reading the available ring.
    pub next_avail: u16,
    /// Where the device goes on writing the used ring.
    pub next_used: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx_enabled: bool,
    /// The size that the driver chose.
    pub size: u16,
    /// The driver enabled the queue.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}

impl From<&Queue> for SavedQueue {
    fn from(queue: &Queue) -> Self {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = queue.state();
        Self {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

/// A saved queue comes from a file, so its sizes and alignments are checked again.
impl TryFrom<SavedQueue> for Queue {
    type Error = virtio_queue::Error;

    fn try_from(saved: SavedQueue) -> Result<Self, Self::Error> {
        Self::try_from(QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx_enabled,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::QueueT;

    use super::*;

    proptest! {
        #[test]
        fn survives_the_round_trip(
            log_size in 0u32..8, next_avail: u16, next_used: u16, event_idx: bool, ready: bool, page in 1u64..1 << 30,
        ) {
            let mut queue = Queue::new(256).unwrap();
            queue.set_size(1 << log_size);
            queue.set_next_avail(next_avail);
            queue.set_next_used(next_used);
            queue.set_event_idx(event_idx);
            queue.set_ready(ready);
            queue.try_set_desc_table_address(vm_memory::GuestAddress(page << 12)).unwrap();
            let restored = Queue::try_from(SavedQueue::from(&queue)).unwrap();
            prop_assert_eq!(restored, queue);
        }
    }

    #[test]
    fn refuses_a_size_beyond_the_maximum() {
        let mut saved = SavedQueue::from(&Queue::new(16).unwrap());
        saved.size = 32;
        assert!(Queue::try_from(saved).is_err());
    }
}
