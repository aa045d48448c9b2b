//! Filling the driver's buffers.

use std::io;

use vm_memory::Bytes;

use super::{Entropy, RngMetrics};
use crate::{
    DeviceError, DeviceQueue, Drained, memory::GuestMem, queue::Descriptors, rate_limiter::RateLimiter,
};

/// The most bytes that one chain gets. Linux asks for a cache line's worth, `dd if=/dev/hwrng` for 512 at a
/// time.
pub const MAX_CHUNK: usize = 1024;

/// The most descriptors of a chain that are looked at.
const MAX_DESCRIPTORS: usize = 64;

/// Why a request could not be served.
enum FillError {
    /// The driver broke the protocol.
    Driver(&'static str),
    /// The source has failed.
    Source(io::Error),
}

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
    /// Unlike the common loop ([`DeviceQueue::drain`]) it asks the limiter *before* it takes a chain, so
    /// that a request which has to wait stays in the ring, where a snapshot finds it.
    pub(super) fn serve(&mut self, queue: &mut DeviceQueue) -> Result<Drained, DeviceError> {
        let mut left = queue.size();
        let drained = loop {
            queue.disable_notification()?;
            match self.serve_some(queue, &mut left)? {
                Drained::All if queue.enable_notification()? => {}
                drained => break drained,
            }
        };
        queue.kick()?;
        Ok(drained)
    }

    fn serve_some(&mut self, queue: &mut DeviceQueue, left: &mut u16) -> Result<Drained, DeviceError> {
        while *left > 0 {
            if queue.is_empty()? {
                return Ok(Drained::All);
            }
            // Charged by the most that a request can have, as its buffers are not known yet.
            if !self.limiter.admit(MAX_CHUNK as u64).map_err(DeviceError::Backend)? {
                self.metrics.throttled.inc();
                return Ok(Drained::NotAll);
            }
            let Some(chain) = queue.pop()? else { return Ok(Drained::All) };
            let (head, descriptors) = chain.into_parts();
            let written = self.fill(queue.mem(), descriptors).map_err(|error| match error {
                FillError::Driver(what) => queue.driver_error(what),
                FillError::Source(error) => DeviceError::Backend(error),
            })?;
            queue.complete(head, written)?;
            *left -= 1;
        }
        Ok(Drained::NotAll)
    }

    /// Fills a chain's buffers as far as one request goes; returns how many bytes that were.
    fn fill(&mut self, mem: &GuestMem, chain: Descriptors) -> Result<u32, FillError> {
        let driver = FillError::Driver;
        let mut random = [0; MAX_CHUNK];
        let mut rest = &mut random[..];
        let mut written = 0;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            if !descriptor.is_write_only() {
                return Err(driver("readable descriptor where one is written"));
            }
            let len = rest.len().min(usize::try_from(descriptor.len()).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(len);
            self.entropy.fill(now).map_err(FillError::Source)?;
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
