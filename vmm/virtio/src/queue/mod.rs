//! A queue as its device uses it: [`DeviceQueue`].
//!
//! | module | owns |
//! |---|---|
//! | `chain` | a descriptor chain, from `pop` until it is given back |
//! | `drain` | the loop for chains that complete at once |
//! | `saved` | a queue in a snapshot |

mod chain;
mod drain;
mod saved;

use std::{
    fmt,
    num::Wrapping,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use self::{
    chain::{Chain, Head},
    drain::Drained,
    saved::SavedQueue,
};
pub use crate::descriptors::Descriptors;
use crate::{DeviceError, Interrupt, memory::GuestMem};

/// Length of the header of the available and the used ring, and of an element of the used ring (VIRTIO 1.3, section
/// 2.7).
const RING_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// A queue of an active device, with all that it takes to work it off: the rings, the memory that they are in, and the
/// interrupt of its driver.
///
/// A chain is popped, walked once, and given back once: by [`complete`](Self::complete), or by
/// [`undo_pop`](Self::undo_pop) when it has to wait. [`kick`](Self::kick) then notifies the driver, if it wants to know.
///
/// ```
/// # use std::sync::Arc;
/// # use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use caisson_virtio::{DeviceError, queue::DeviceQueue};
///
/// /// Fills what the driver offers with a byte.
/// fn fill(queue: &mut DeviceQueue, byte: u8) -> Result<(), DeviceError> {
///     while let Some(chain) = queue.pop()? {
///         let (head, _readable, writable) = chain.into_buffers()?;
///         let written = writable.copy_from(0, &vec![byte; writable.len()]);
///         queue.complete(head, u32::try_from(written).unwrap_or(u32::MAX))?;
///     }
///     queue.kick()
/// }
/// ```
pub struct DeviceQueue {
    queue: Queue,
    index: usize,
    mem: GuestMem,
    interrupt: Arc<dyn Interrupt>,
    event_idx: bool,
    /// The used index as of the last [`kick`](Self::kick).
    last_signalled_used: Wrapping<u16>,
}

impl fmt::Debug for DeviceQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceQueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl DeviceQueue {
    /// The queue with this index, as the driver set it up in `mem`. `interrupt` notifies the driver; `event_idx` says
    /// that VIRTIO_F_EVENT_IDX was negotiated.
    #[must_use]
    pub fn new(
        mut queue: Queue,
        index: usize,
        mem: GuestMem,
        interrupt: Arc<dyn Interrupt>,
        event_idx: bool,
    ) -> Self {
        queue.set_event_idx(event_idx);
        let last_signalled_used = Wrapping(queue.next_used());
        Self { queue, index, mem, interrupt, event_idx, last_signalled_used }
    }

    /// Whether the driver enabled it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// How many entries it has.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The memory that its buffers are in.
    #[must_use]
    pub fn mem(&self) -> &GuestMem {
        &self.mem
    }

    /// The queue for a snapshot: what was popped and not given back is not in it.
    #[must_use]
    pub fn state(&self) -> SavedQueue {
        SavedQueue::from(&self.queue)
    }

    /// Where the driver puts the next chain.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when it cannot be read.
    pub fn available_index(&self) -> Result<u16, DeviceError> {
        Ok(self.queue.avail_idx(self.memory(), Ordering::Acquire).map_err(|error| self.ring(error))?.0)
    }

    /// Whether there is no chain to pop.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn is_empty(&self) -> Result<bool, DeviceError> {
        Ok(self.pending()? == 0)
    }

    /// How many chains there are to pop.
    fn pending(&self) -> Result<u16, DeviceError> {
        if !self.queue.ready() {
            return Ok(0);
        }
        let (available, next) = (self.available_index()?, self.queue.next_avail());
        let pending = available.wrapping_sub(next);
        if pending > self.queue.size() {
            return Err(DeviceError::AvailableIndex { queue: self.index, available, next });
        }
        Ok(pending)
    }

    /// The next chain, or `None` when the driver has made no more available. A queue that it left disabled has none.
    ///
    /// # Errors
    /// [`DeviceError::AvailableIndex`] when the driver moved its index back, or beyond the chains that the queue can
    /// hold; [`DeviceError::Ring`] when the ring cannot be read.
    pub fn pop(&mut self) -> Result<Option<Chain>, DeviceError> {
        if self.pending()? == 0 {
            return Ok(None);
        }
        let mem = self.mem.clone();
        let popped = match self.queue.iter(mem.clone()) {
            Ok(mut chains) => chains.next(),
            Err(error) => return Err(self.ring(error)),
        };
        match popped {
            Some(chain) => Ok(Some(Chain::new(chain, mem, self.index))),
            // An entry was announced a moment ago. A caller that goes on until there are no more would never finish.
            None => Err(self.ring(QueueError::InvalidAvailRingIndex)),
        }
    }

    /// Puts the chain that was popped last back, to be popped again. Several go back in any order.
    pub fn undo_pop(&mut self, head: Head) {
        drop(head);
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `written` bytes written to it.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when the used ring cannot be written.
    pub fn complete(&mut self, head: Head, written: u32) -> Result<(), DeviceError> {
        self.queue.add_used(self.mem.as_ref(), head.index(), written).map_err(|error| self.ring(error))
    }

    /// Gives several chains back in one step, for a driver that must see all of them or none.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_together(&mut self, chains: Vec<(Head, u32)>) -> Result<(), DeviceError> {
        let mut chains = chains;
        let Some((last, written)) = chains.pop() else { return Ok(()) };
        let mut next = Wrapping(self.queue.next_used());
        for (head, written) in chains {
            self.write_used(next.0, &head, written).map_err(|error| self.ring(error))?;
            next += 1;
        }
        // The last one's store of the index, with release ordering, is what makes all of them visible.
        self.queue.set_next_used(next.0);
        self.complete(last, written)
    }

    /// Writes an element of the used ring that the index does not cover yet.
    fn write_used(&self, used: u16, head: &Head, written: u32) -> Result<(), QueueError> {
        if head.index() >= self.queue.size() {
            return Err(QueueError::InvalidDescriptorIndex);
        }
        let slot = u64::from(used.checked_rem(self.queue.size()).unwrap_or_default());
        let address = self.queue.used_ring().checked_add(RING_HEADER + USED_ELEMENT * slot);
        let address = GuestAddress(address.ok_or(QueueError::AddressOverflow)?);
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head.index()).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        self.mem.write_slice(&element, address).map_err(QueueError::GuestMemory)
    }

    /// Notifies the driver of what was completed since the last call, if there is something and it wants to know.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when its wish cannot be read.
    pub fn kick(&mut self) -> Result<(), DeviceError> {
        let new = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.last_signalled_used, new);
        if old != new && self.driver_wants_interrupt(old, new).map_err(|error| self.ring(error))? {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for used entries from `old` up to `new` (section 2.7.7.1).
    fn driver_wants_interrupt(&self, old: Wrapping<u16>, new: Wrapping<u16>) -> Result<bool, QueueError> {
        if !self.event_idx {
            return Ok(true);
        }
        // The driver writes its wish and then looks at the index; the device writes the index and then looks at the
        // wish.
        fence(Ordering::SeqCst);
        let address = self.queue.avail_ring().checked_add(RING_HEADER + 2 * u64::from(self.queue.size()));
        let address = GuestAddress(address.ok_or(QueueError::AddressOverflow)?);
        let used_event: u16 = self.mem.load(address, Ordering::Relaxed).map_err(QueueError::GuestMemory)?;
        Ok(new - Wrapping(u16::from_le(used_event)) - Wrapping(1) < new - old)
    }

    /// Asks the driver to notify when it makes a chain available. Returns whether there is one already.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when the ring cannot be accessed.
    pub fn enable_notification(&mut self) -> Result<bool, DeviceError> {
        self.queue.enable_notification(self.mem.as_ref()).map_err(|error| self.ring(error))
    }

    /// Asks the driver to notify when it makes one more chain available than it has, although there are some to pop: with
    /// event indices [`enable_notification`](Self::enable_notification) asks for the chain after the last popped one, which
    /// is available already then, and a driver does not notify of others (section 2.7.10). Returns the available index, as
    /// it was when the driver could read the wish: a chain that came before is not notified of.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when the ring cannot be accessed.
    pub fn notify_of_next(&mut self) -> Result<u16, DeviceError> {
        self.enable_notification()?;
        if self.event_idx {
            let available = self.available_index()?;
            self.wish_for(available).map_err(|error| self.ring(error))?;
            // The device writes its wish and then looks at the index; the driver writes the index and then looks at the
            // wish.
            fence(Ordering::SeqCst);
        }
        self.available_index()
    }

    /// Writes `avail_event`: the driver notifies when it makes the chain with this index available.
    fn wish_for(&self, index: u16) -> Result<(), QueueError> {
        let end =
            USED_ELEMENT.checked_mul(self.queue.size().into()).and_then(|len| len.checked_add(RING_HEADER));
        let address = end.and_then(|len| self.queue.used_ring().checked_add(len));
        let address = GuestAddress(address.ok_or(QueueError::AddressOverflow)?);
        self.mem.store(index.to_le(), address, Ordering::Relaxed).map_err(QueueError::GuestMemory)
    }

    /// Tells the driver that it need not notify.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when the ring cannot be accessed.
    pub fn disable_notification(&mut self) -> Result<(), DeviceError> {
        self.queue.disable_notification(self.mem.as_ref()).map_err(|error| self.ring(error))
    }

    /// What the driver did wrong on this queue, as an error.
    #[must_use]
    pub fn driver_error(&self, what: &'static str) -> DeviceError {
        DeviceError::Driver { queue: self.index, what }
    }

    fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.mem
    }

    fn ring(&self, source: QueueError) -> DeviceError {
        match (source, self.queue.avail_idx(self.memory(), Ordering::Acquire)) {
            (QueueError::InvalidAvailRingIndex, Ok(available)) => DeviceError::AvailableIndex {
                queue: self.index,
                available: available.0,
                next: self.queue.next_avail(),
            },
            (source, _) => DeviceError::Ring { queue: self.index, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Buffer, CountingInterrupt, MockQueue};

    fn memory() -> GuestMem {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap())
    }

    fn head(queue: &mut DeviceQueue) -> Head {
        queue.pop().unwrap().unwrap().into_parts().0
    }

    #[test]
    fn queue_refuses_an_available_index_that_jumps_or_goes_back() {
        for (first, then) in [(17, None), (2, Some(0)), (2, Some(19))] {
            let mock = MockQueue::new(&memory(), 0, 16);
            let mut queue = mock.device_queue();
            assert!(queue.pop().unwrap().is_none());
            mock.set_available(first);
            if let Some(then) = then {
                (0..first).for_each(|_| drop(head(&mut queue)));
                mock.set_available(then);
            }
            let available = then.unwrap_or(first);
            let error = queue.pop().unwrap_err();
            assert!(
                matches!(error, DeviceError::AvailableIndex { queue: 0, available: a, .. } if a == available),
                "{error:?}"
            );
        }
    }

    #[test]
    fn queue_pops_again_what_was_put_back() {
        let mut mock = MockQueue::new(&memory(), 0, 16);
        let mut queue = mock.device_queue();
        let heads: Vec<_> = (0..3).map(|_| mock.add(&[Buffer::writable(0x4000, 1)])).collect();
        let before = queue.state();
        let popped: Vec<_> = (0..3).map(|_| head(&mut queue)).collect();
        popped.into_iter().for_each(|head| queue.undo_pop(head));
        assert_eq!(queue.state(), before, "nothing of it is in a snapshot");
        for expected in heads {
            assert_eq!(head(&mut queue).index(), expected);
        }
        assert!(queue.is_empty().unwrap());
    }

    #[test]
    fn queue_shows_chains_that_belong_together_in_one_step() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 4);
        let mut queue = mock.device_queue();
        for round in 0..3 {
            let heads: Vec<_> = (0..3).map(|_| mock.add(&[Buffer::writable(0x4000, 9)])).collect();
            let chains = (0..3).map(|len| (head(&mut queue), len)).collect();
            queue.complete_together(chains).unwrap();
            let expected: Vec<_> = heads.into_iter().zip(0..3).collect();
            assert_eq!(mock.used(), expected, "round {round}");
        }
    }

    #[test]
    fn queue_does_not_give_back_a_head_that_it_does_not_have() {
        let mut mock = MockQueue::new(&memory(), 0, 4);
        let mut queue = mock.device_queue();
        assert!(matches!(queue.complete(Head::restored(4), 0), Err(DeviceError::Ring { queue: 0, .. })));
        let chains = vec![(Head::restored(4), 0), (Head::restored(0), 0)];
        assert!(matches!(queue.complete_together(chains), Err(DeviceError::Ring { queue: 0, .. })));
        assert_eq!(mock.used(), []);
    }

    #[test]
    fn queue_is_notified_of_the_next_chain_though_others_are_there() {
        for event_idx in [false, true] {
            let mem = memory();
            let mut mock = MockQueue::new(&mem, 0, 4);
            let mut queue =
                DeviceQueue::new(mock.device_side(), 0, mem.clone(), CountingInterrupt::new(), event_idx);
            for _ in 0..3 {
                mock.add(&[Buffer::writable(0x4000, 1)]);
            }
            queue.enable_notification().unwrap();
            assert_eq!(mock.available_event(), 0, "a driver that adds a fourth need not notify");
            assert_eq!(queue.notify_of_next().unwrap(), 3);
            assert_eq!(mock.available_event(), if event_idx { 3 } else { 0 });
        }
    }

    #[test]
    fn queue_kicks_only_for_what_was_completed_and_is_wanted() {
        for event_idx in [false, true] {
            let mem = memory();
            let mut mock = MockQueue::new(&mem, 0, 4);
            let interrupt = CountingInterrupt::new();
            let mut queue =
                DeviceQueue::new(mock.device_side(), 0, mem.clone(), interrupt.clone(), event_idx);
            mock.set_used_event(2);
            queue.kick().unwrap();
            assert_eq!(interrupt.take_queue(), 0, "nothing was completed");
            for wanted in [false, false, true, false] {
                mock.add(&[Buffer::writable(0x4000, 1)]);
                let head = head(&mut queue);
                queue.complete(head, 1).unwrap();
                queue.kick().unwrap();
                assert_eq!(interrupt.take_queue(), usize::from(wanted || !event_idx));
            }
            // Several at once, in one step, with the wanted one among them.
            mock.set_used_event(5);
            for _ in 0..3 {
                mock.add(&[Buffer::writable(0x4000, 1)]);
            }
            let chains = (0..3).map(|_| (head(&mut queue), 1)).collect();
            queue.complete_together(chains).unwrap();
            queue.kick().unwrap();
            assert_eq!(interrupt.take_queue(), 1);
        }
    }
}
