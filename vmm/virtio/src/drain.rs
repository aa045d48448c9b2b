//! The loop by which a device works off a queue whose chains it completes at once.

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{DeviceError, Interrupt, buffers::pop_chain};
use crate::memory::GuestMem;

/// What [`drain`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing: the driver notifies when there is more.
    All,
    /// Perhaps something. The driver was not asked to notify, so the device has to come back by itself, after
    /// other devices had their turn.
    NotAll,
}

/// Takes chains from a queue, at most as many as it has entries, and completes each with the number of bytes
/// that `handle` says were written to it. A queue that the driver left disabled has none.
///
/// # Errors
/// When the ring is broken, or `handle` gives up.
pub fn drain<F>(
    queue: &mut Queue,
    index: usize,
    mem: &GuestMem,
    interrupt: &dyn Interrupt,
    mut handle: F,
) -> Result<Drained, DeviceError>
where
    F: FnMut(DescriptorChain<&GuestMemoryMmap<()>>) -> Result<u32, DeviceError>,
{
    if !queue.ready() {
        return Ok(Drained::All);
    }
    let ring = |source| DeviceError::Ring { queue: index, source };
    let mem: &GuestMemoryMmap<()> = mem;
    let budget = queue.size();
    let mut done = 0;
    let drained = loop {
        queue.disable_notification(mem).map_err(ring)?;
        while done < budget
            && let Some(chain) = pop_chain(queue, mem).map_err(ring)?
        {
            let head = chain.head_index();
            let written = handle(chain)?;
            queue.add_used(mem, head, written).map_err(ring)?;
            done += 1;
        }
        if done == budget {
            break Drained::NotAll;
        }
        if !queue.enable_notification(mem).map_err(ring)? {
            break Drained::All;
        }
    };
    if done > 0 && queue.needs_notification(mem).map_err(ring)? {
        interrupt.signal_queue(index);
    }
    Ok(drained)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::mock::{Buffer, CountingInterrupt, MockQueue};

    fn memory() -> GuestMem {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap())
    }

    #[test]
    fn completes_every_chain_with_one_interrupt() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 8);
        let mut queue = mock.device_side();
        let interrupt = CountingInterrupt::new();
        let heads: Vec<_> = (0..3).map(|i| mock.add(&[Buffer::writable(0x4000, i)])).collect();
        let drained = drain(&mut queue, 0, &mem, &*interrupt, |_| Ok(5)).unwrap();
        assert_eq!(drained, Drained::All);
        assert_eq!(mock.used(), heads.iter().map(|&head| (head, 5)).collect::<Vec<_>>());
        assert_eq!(interrupt.take_queue(), 1);
        drain(&mut queue, 0, &mem, &*interrupt, |_| Ok(5)).unwrap();
        assert_eq!(interrupt.take_queue(), 0, "nothing was done");
    }

    /// A driver that makes a chain available for each that is completed cannot keep the loop for itself.
    #[test]
    fn a_driver_that_never_stops_gets_one_round() {
        let mem = memory();
        let mut mock = MockQueue::new(&mem, 0, 8);
        let mut queue = mock.device_side();
        mock.add(&[Buffer::writable(0x4000, 1)]);
        let mut rounds = 0;
        let drained = drain(&mut queue, 0, &mem, &*CountingInterrupt::new(), |_| {
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
        let interrupt = CountingInterrupt::new();
        let mut queue = mock.device_side();
        mock.set_available(9);
        assert!(matches!(
            drain(&mut queue, 3, &mem, &*interrupt, |_| Ok(0)),
            Err(DeviceError::Ring { queue: 3, .. })
        ));
        queue.set_ready(false);
        assert_eq!(drain(&mut queue, 3, &mem, &*interrupt, |_| Ok(0)).unwrap(), Drained::All);
    }
}
