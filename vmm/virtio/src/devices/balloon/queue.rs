//! What happens to a descriptor chain on each of the balloon's queues.

use vm_memory::{Bytes, GuestAddress};

use super::{BalloonMetrics, Statistics, statistics};
use crate::{
    DeviceError, DeviceQueue, Drained,
    memory::{Discard, GuestMem},
    queue::{Descriptors, Head},
};

/// Pages in the balloon have this size whatever the guest's pages have (VIRTIO 1.3, section 5.5.6).
const PAGE_SIZE: u64 = 4096;

/// The most pages that one chain may name. Linux sends 256.
const MAX_PAGES: usize = 1024;

/// The most descriptors that one chain may have, be they ever so empty. Linux sends 1, or 32 when reporting.
const MAX_DESCRIPTORS: usize = 256;

/// The page numbers of one chain.
#[derive(Debug, Default)]
pub(super) struct PageList {
    pages: Vec<u32>,
}

impl PageList {
    /// Reads the page numbers of a chain, in place of those of the last one.
    ///
    /// # Errors
    /// With what the driver did, when the chain is not a bounded list of readable page numbers in guest
    /// memory.
    pub(super) fn read(&mut self, mem: &GuestMem, chain: Descriptors) -> Result<(), &'static str> {
        const MAX_BYTES: usize = MAX_PAGES * size_of::<u32>();
        let mut bytes = [0; MAX_BYTES];
        let len = read_chain(mem, chain, &mut bytes)?;
        let (numbers, _) = bytes.get(..len).ok_or("chain too long")?.as_chunks();
        self.pages.clear();
        self.pages.extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
        Ok(())
    }

    /// How many pages there are.
    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Gives the pages back, in as few ranges as possible.
    pub(super) fn discard(&mut self, discard: &dyn Discard, metrics: &BalloonMetrics) {
        metrics.inflated_pages.add(self.pages.len() as u64);
        self.pages.sort_unstable();
        self.pages.dedup();
        // Page numbers that follow one another are one range.
        for run in self.pages.chunk_by(|a, b| b - a == 1) {
            let Some(&first) = run.first() else { continue };
            let len = run.len() as u64 * PAGE_SIZE;
            if discard.discard(GuestAddress(u64::from(first) * PAGE_SIZE), len).is_err() {
                metrics.discard_failures.inc();
            }
        }
    }
}

/// Gives back the ranges of free memory that a chain's descriptors are (section 5.5.6.7).
///
/// # Errors
/// With what the driver did, when there are too many of them.
pub(super) fn discard_reported(
    chain: Descriptors,
    discard: &dyn Discard,
    metrics: &BalloonMetrics,
) -> Result<(), &'static str> {
    for (count, descriptor) in chain.enumerate() {
        if count == MAX_DESCRIPTORS {
            return Err("report of too many descriptors");
        }
        if !descriptor.is_write_only() {
            return Err("report in a readable descriptor");
        }
        // Only whole pages: the rest of a page that is reported in part may be in use.
        let range = descriptor.addr().0.checked_next_multiple_of(PAGE_SIZE).zip(
            descriptor.addr().0.checked_add(u64::from(descriptor.len())).map(|end| end - end % PAGE_SIZE),
        );
        match range {
            Some((start, end)) if start < end => match discard.discard(GuestAddress(start), end - start) {
                Ok(()) => metrics.reported_bytes.add(end - start),
                Err(_) => metrics.discard_failures.inc(),
            },
            Some(_) => {}
            None => metrics.discard_failures.inc(),
        }
    }
    Ok(())
}

/// Reads statistics and keeps the buffer that they came in, to be given back when somebody asks for more.
pub(super) fn take_statistics(
    queue: &mut DeviceQueue,
    held: &mut Option<Head>,
    statistics: &mut Statistics,
) -> Result<Drained, DeviceError> {
    if !queue.is_ready() {
        return Ok(Drained::All);
    }
    loop {
        while let Some(chain) = queue.pop()? {
            let (head, descriptors) = chain.into_parts();
            // There is one buffer, and it belongs to the device until it gives it back (section 5.5.6.3).
            if held.replace(head).is_some() {
                return Err(queue.driver_error("second statistics buffer"));
            }
            let mut bytes = [0; statistics::MAX_LEN];
            let len =
                read_chain(queue.mem(), descriptors, &mut bytes).map_err(|what| queue.driver_error(what))?;
            *statistics = Statistics::parse(bytes.get(..len).unwrap_or_default());
        }
        // A driver with EVENT_IDX says nothing of the next answer unless it is asked to.
        if !queue.enable_notification()? {
            return Ok(Drained::All);
        }
    }
}

/// Copies all of a chain; returns how much that was.
///
/// # Errors
/// With what the driver did, when it does not fit `to`, is not readable or not in guest memory.
fn read_chain(mem: &GuestMem, chain: Descriptors, to: &mut [u8]) -> Result<usize, &'static str> {
    let mut filled = 0_usize;
    for (count, descriptor) in chain.enumerate() {
        if count == MAX_DESCRIPTORS {
            return Err("chain of too many descriptors");
        }
        if descriptor.is_write_only() {
            return Err("writable descriptor where one is read");
        }
        let len = usize::try_from(descriptor.len()).map_err(|_| "chain too long")?;
        let part = to.get_mut(filled..).and_then(|rest| rest.get_mut(..len)).ok_or("chain too long")?;
        mem.read_slice(part, descriptor.addr()).map_err(|_| "buffer outside guest memory")?;
        filled += len;
    }
    Ok(filled)
}
