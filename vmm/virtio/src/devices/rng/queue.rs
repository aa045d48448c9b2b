//! Filling the driver's buffers.

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::{Entropy, RngMetrics};
use crate::{
    DeviceError, Drained, Interrupt, buffers::pop_chain, memory::GuestMem, rate_limiter::RateLimiter,
};

/// The most bytes that one chain gets. Linux asks for a cache line's worth, `dd if=/dev/hwrng` for 512 at a
/// time.
pub const MAX_CHUNK: usize = 1024;

/// The most descriptors of a chain that are looked at.
const MAX_DESCRIPTORS: usize = 64;

/// What the device serves requests with.
pub(super) struct Source<'a, E> {
    pub(super) entropy: &'a mut E,
    pub(super) limiter: &'a mut RateLimiter,
    pub(super) metrics: &'a RngMetrics,
}

impl<E: Entropy> Source<'_, E> {
    /// Answers requests: until there are none, as many as the queue has entries, or until the limiter says
    /// stop.
    ///
    /// Unlike the common loop ([`crate::drain`]) it asks the limiter *before* it takes a chain, so
    /// that a request which has to wait stays in the ring, where a snapshot finds it.
    pub(super) fn serve(
        &mut self,
        queue: &mut Queue,
        mem: &GuestMem,
        interrupt: &dyn Interrupt,
    ) -> Result<Drained, DeviceError> {
        let ring = |source| DeviceError::Ring { queue: 0, source };
        let mem: &GuestMemoryMmap<()> = mem;
        let mut done = 0;
        let drained = loop {
            queue.disable_notification(mem).map_err(ring)?;
            match self.serve_some(queue, mem, &mut done)? {
                Drained::All if queue.enable_notification(mem).map_err(ring)? => {}
                drained => break drained,
            }
        };
        if done > 0 && queue.needs_notification(mem).map_err(ring)? {
            interrupt.signal_queue(0);
        }
        Ok(drained)
    }

    fn serve_some(
        &mut self,
        queue: &mut Queue,
        mem: &GuestMemoryMmap<()>,
        done: &mut u16,
    ) -> Result<Drained, DeviceError> {
        let ring = |source| DeviceError::Ring { queue: 0, source };
        while *done < queue.size() {
            let available = queue.avail_idx(mem, std::sync::atomic::Ordering::Acquire).map_err(ring)?;
            if available.0 == queue.next_avail() {
                return Ok(Drained::All);
            }
            // Charged by the most that a request can have, as its buffers are not known yet.
            if !self.limiter.admit(MAX_CHUNK as u64).map_err(DeviceError::Backend)? {
                self.metrics.throttled.inc();
                return Ok(Drained::NotAll);
            }
            let Some(chain) = pop_chain(queue, mem).map_err(ring)? else { return Ok(Drained::All) };
            let head = chain.head_index();
            let written = self.fill(mem, chain)?;
            queue.add_used(mem, head, written).map_err(ring)?;
            *done += 1;
        }
        Ok(Drained::NotAll)
    }

    /// Fills a chain's buffers as far as one request goes; returns how many bytes that were.
    fn fill(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        chain: DescriptorChain<&GuestMemoryMmap<()>>,
    ) -> Result<u32, DeviceError> {
        let driver = |what| DeviceError::Driver { queue: 0, what };
        let mut random = [0; MAX_CHUNK];
        let mut rest = &mut random[..];
        let mut written = 0;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            if !descriptor.is_write_only() {
                return Err(driver("readable descriptor where one is written"));
            }
            let len = rest.len().min(usize::try_from(descriptor.len()).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(len);
            self.entropy.fill(now).map_err(DeviceError::Backend)?;
            mem.write_slice(now, descriptor.addr()).map_err(|_| driver("buffer outside guest memory"))?;
            // At most MAX_CHUNK.
            written += u32::try_from(len).unwrap_or_default();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        if written == 0 {
            return Err(driver("request for no bytes"));
        }
        self.metrics.requests.inc();
        self.metrics.bytes.add(u64::from(written));
        Ok(written)
    }
}
