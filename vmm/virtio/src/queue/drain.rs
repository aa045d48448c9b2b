use super::{Descriptors, DeviceQueue};
use crate::{DeviceError, memory::GuestMem};

/// What working off a queue left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing: the driver notifies when there is more.
    All,
    /// Perhaps something. The driver was not asked to notify, so the device has to come back by itself, after
    /// other devices had their turn.
    NotAll,
}

impl DeviceQueue {
    /// Pops chains, at most as many as the queue has entries, completes each with the number of bytes that `handle` says
    /// were written to it, and notifies the driver. A queue that the driver left disabled has none.
    ///
    /// # Errors
    /// As [`pop`](Self::pop), [`complete`](Self::complete) and [`kick`](Self::kick), or when `handle` gives up.
    pub fn drain(
        &mut self,
        mut handle: impl FnMut(&GuestMem, Descriptors) -> Result<u32, DeviceError>,
    ) -> Result<Drained, DeviceError> {
        if !self.is_ready() {
            return Ok(Drained::All);
        }
        let mem = self.mem().clone();
        let mut budget = self.size();
        let drained = loop {
            self.disable_notification()?;
            while budget > 0
                && let Some(chain) = self.pop()?
            {
                let (head, descriptors) = chain.into_parts();
                let written = handle(&mem, descriptors)?;
                self.complete(head, written)?;
                budget -= 1;
            }
            if budget == 0 {
                break Drained::NotAll;
            }
            if !self.enable_notification()? {
                break Drained::All;
            }
        };
        self.kick()?;
        Ok(drained)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::mock::{Buffer, CountingInterrupt, MockQueue};

    fn memory() -> GuestMem {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap())
    }

    #[test]
    fn completes_every_chain_with_one_interrupt() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 8);
        let interrupt = CountingInterrupt::new();
        let mut queue = DeviceQueue::new(mock.device_side(), 0, mem.clone(), interrupt.clone(), false);
        let heads: Vec<_> = (0..3).map(|i| mock.add(&[Buffer::writable(0x4000, i)])).collect();
        let drained = queue.drain(|_, _| Ok(5)).unwrap();
        assert_eq!(drained, Drained::All);
        assert_eq!(mock.used(), heads.iter().map(|&head| (head, 5)).collect::<Vec<_>>());
        assert_eq!(interrupt.take_queue(), 1);
        queue.drain(|_, _| Ok(5)).unwrap();
        assert_eq!(interrupt.take_queue(), 0, "nothing was done");
    }

    /// A driver that makes a chain available for each that is completed cannot keep the loop for itself.
    #[test]
    fn a_driver_that_never_stops_gets_one_round() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 8);
        let mut queue = mock.device_queue();
        mock.add(&[Buffer::writable(0x4000, 1)]);
        let mut rounds = 0;
        let drained = queue.drain(|_, _| {
            rounds += 1;
            mock.add(&[Buffer::writable(0x4000, 1)]);
            Ok(0)
        });
        assert_eq!((drained.unwrap(), rounds), (Drained::NotAll, 8));
    }

    #[test]
    fn a_disabled_queue_is_empty_and_a_broken_one_an_error() {
        let mem = memory();
        let mock = MockQueue::new(&mem, 0, 8);
        let mut disabled = mock.device_side();
        virtio_queue::QueueT::set_ready(&mut disabled, false);
        let mut queue = DeviceQueue::new(mock.device_side(), 3, mem.clone(), CountingInterrupt::new(), false);
        mock.set_available(9);
        assert!(matches!(
            queue.drain(|_, _| Ok(0)),
            Err(DeviceError::AvailableIndex { queue: 3, available: 9, next: 0 })
        ));
        let mut queue = DeviceQueue::new(disabled, 3, mem.clone(), CountingInterrupt::new(), false);
        assert_eq!(queue.drain(|_, _| Ok(0)).unwrap(), Drained::All);
    }
}
