//! From the guest to the host: frames are written straight from the driver's buffers, behind a header that
//! was copied before it was checked.

use std::io;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{
    TX,
    backend::NetBackend,
    header::{HEADER, Offloads, check_sent},
    metrics::NetMetrics,
};
use crate::{
    DeviceError,
    buffers::{GuestBuffers, pop_chain},
    memory::GuestMem,
    rate_limiter::RateLimiter,
};

/// Why sending stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// There is nothing to send; the driver was asked to notify.
    NoFrame,
    /// The tap has no room; its descriptor tells when it has.
    NoRoom,
    /// The rate limiter's timer tells when to go on.
    Limited,
    /// Others want their turn.
    Turn,
}

/// What to do with a frame that could not be sent.
enum Sent {
    Done,
    NoRoom,
}

/// The sending half of an active card.
#[derive(Debug)]
pub(super) struct Sender {
    mem: GuestMem,
    pub(super) queue: Queue,
    allowed: Offloads,
    /// The used index at the last look at whether to interrupt.
    looked_at: u16,
}

fn ring(source: virtio_queue::Error) -> DeviceError {
    DeviceError::Ring { queue: TX, source }
}

impl Sender {
    pub(super) fn new(mem: GuestMem, queue: Queue, allowed: Offloads) -> Self {
        Self { looked_at: queue.next_used(), mem, queue, allowed }
    }

    /// Sends frames until something keeps it from going on.
    pub(super) fn send(
        &mut self,
        backend: &mut dyn NetBackend,
        limiter: &mut RateLimiter,
        metrics: &NetMetrics,
    ) -> Result<Pause, DeviceError> {
        let mem: &GuestMemoryMmap<()> = &self.mem.clone();
        let mut turns = self.queue.size();
        let mut frame = GuestBuffers::new(self.mem.clone());
        let mut writable = GuestBuffers::new(self.mem.clone());
        loop {
            self.queue.disable_notification(mem).map_err(ring)?;
            while turns > 0 {
                let Some(chain) = pop_chain(&mut self.queue, mem).map_err(ring)? else {
                    break;
                };
                turns -= 1;
                let head = chain.head_index();
                frame.clear();
                writable.clear();
                GuestBuffers::append_chain(chain, &mut frame, &mut writable)
                    .map_err(|error| DeviceError::Driver { queue: TX, what: error.what() })?;
                let bytes = frame.len().saturating_sub(HEADER) as u64;
                if !limiter.admit(bytes).map_err(DeviceError::Backend)? {
                    metrics.tx_throttled.inc();
                    self.put_back();
                    return Ok(Pause::Limited);
                }
                if let Sent::NoRoom = self.send_one(&mut frame, backend, metrics) {
                    self.put_back();
                    return Ok(Pause::NoRoom);
                }
                self.queue.add_used(mem, head, 0).map_err(ring)?;
            }
            if turns == 0 {
                return Ok(Pause::Turn);
            }
            if !self.queue.enable_notification(mem).map_err(ring)? {
                return Ok(Pause::NoFrame);
            }
        }
    }

    fn send_one(&self, frame: &mut GuestBuffers, backend: &mut dyn NetBackend, metrics: &NetMetrics) -> Sent {
        let mut header = [0; HEADER];
        let got = frame.copy_to(0, &mut header);
        frame.advance(HEADER);
        let len = frame.len();
        let Some(header) = check_sent(header, len, self.allowed).ok().filter(|_| got == HEADER) else {
            metrics.tx_malformed.inc();
            return Sent::Done;
        };
        loop {
            match backend.send(&header, frame) {
                Ok(()) => {
                    metrics.tx_frames.inc();
                    metrics.tx_bytes.add(len as u64);
                    return Sent::Done;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::NoRoom,
                // The interface is down, or the kernel refused the frame: lost, as frames may be.
                Err(_) => {
                    metrics.tx_failed.inc();
                    return Sent::Done;
                }
            }
        }
    }

    /// Whether to interrupt the driver for what was sent since the last call.
    pub(super) fn needs_interrupt(&mut self) -> Result<bool, DeviceError> {
        let used = self.queue.next_used();
        let news = std::mem::replace(&mut self.looked_at, used) != used;
        Ok(news && self.queue.needs_notification(&*self.mem).map_err(ring)?)
    }

    fn put_back(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }
}
