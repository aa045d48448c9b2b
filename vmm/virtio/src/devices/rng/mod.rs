//! Entropy device (VIRTIO 1.3, section 5.4): random bytes from the host's generator.
//!
//! The driver offers writable buffers, the device fills the first [`MAX_CHUNK`] bytes of each chain and says
//! how many that were, so neither memory nor time on the host side depends on what the guest asks for. A rate
//! limiter keeps a guest from having the host's CPU make random numbers all day; what it may not have yet
//! waits in its queue.

mod metrics;
mod queue;
mod state;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use caisson_vmm_api::devices::RngConfig;
pub use metrics::RngMetrics;
pub use queue::MAX_CHUNK;
pub use state::RngState;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, Drained, PollSource,
    SavedQueue, VirtioDevice,
    rate_limiter::{RateLimitError, RateLimiter},
};

/// The one queue. Linux has one request in it at a time.
const QUEUE_SIZES: [u16; 1] = [64];

/// Token of the source by which the device goes on with a queue that it left unfinished.
const AGAIN: u32 = 0;
/// Token of the rate limiter's timer.
const TIMER: u32 = 1;

/// Where random bytes come from.
pub trait Entropy: Send + 'static {
    /// Fills all of `to`.
    ///
    /// # Errors
    /// When the source has failed.
    fn fill(&mut self, to: &mut [u8]) -> io::Result<()>;
}

/// The host kernel's generator, getrandom(2).
#[derive(Clone, Copy, Debug, Default)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&mut self, to: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while let Some(rest) = to.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            // A host that has not gathered entropy yet says EAGAIN: an error here beats a device that blocks.
            // SAFETY: the pointer and length are those of an exclusively borrowed slice.
            let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), libc::GRND_NONBLOCK) };
            match usize::try_from(n) {
                Ok(n) => filled += n,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The device.
pub struct Rng<E = HostEntropy> {
    config: RngConfig,
    entropy: E,
    limiter: RateLimiter,
    again: EventFd,
    active: Option<DeviceQueue>,
    metrics: Arc<RngMetrics>,
}

/// Why an entropy device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The rate limits make no sense, or have no timer.
    #[error("rate")]
    Rate(#[from] RateLimitError),
    /// The host has no event descriptor left.
    #[error("creating an event descriptor")]
    EventFd(#[source] io::Error),
}

impl<E: Entropy> Rng<E> {
    /// A device that draws from `entropy`.
    ///
    /// # Errors
    /// When the rate makes no sense, or the host has no descriptor left.
    pub fn new(config: RngConfig, entropy: E) -> Result<Self, RngError> {
        Ok(Self {
            config,
            entropy,
            limiter: RateLimiter::new(config.rate)?,
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(RngError::EventFd)?,
            active: None,
            metrics: Arc::default(),
        })
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<RngMetrics> {
        self.metrics.clone()
    }

    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.active else { return Ok(()) };
        let mut source =
            queue::Source { entropy: &mut self.entropy, limiter: &mut self.limiter, metrics: &self.metrics };
        if source.serve(queue)? == Drained::NotAll && !self.limiter.is_blocked() {
            self.again.write(1).map_err(DeviceError::Backend)?;
        }
        Ok(())
    }
}

impl<E: Entropy> VirtioDevice for Rng<E> {
    fn id(&self) -> DeviceId {
        DeviceId::Rng
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [queue] = activation.into_queues(1)?;
        self.active = Some(queue);
        Ok(())
    }

    /// The limiter goes on as it was: a driver does not get a full bucket by resetting the device.
    fn reset(&mut self) {
        self.active = None;
        // An empty counter says EAGAIN: nothing was pending.
        let _ = self.again.read();
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        use std::os::fd::AsRawFd;
        let again = PollSource { fd: self.again.as_raw_fd(), events: EventSet::IN, token: AGAIN };
        let timer = self.limiter.timer_fd().map(|fd| PollSource { fd, events: EventSet::IN, token: TIMER });
        std::iter::once(again).chain(timer).collect()
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        match event {
            DeviceEvent::Source { token: TIMER, .. } => self.limiter.timer_expired(),
            // An empty counter says EAGAIN: the event was spurious, and a look at the queue costs little.
            DeviceEvent::Source { .. } => drop(self.again.read()),
            DeviceEvent::Queue(_) => {}
        }
        self.work()
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        Ok(self.active.iter().map(DeviceQueue::state).collect())
    }
}
