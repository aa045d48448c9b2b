//! From the guest to the host: frames are written straight from the driver's buffers, behind a header that
//! was copied before it was checked.

use std::io;

use super::{
    backend::NetBackend,
    header::{HEADER, Offloads, check_sent},
    metrics::NetMetrics,
};
use crate::{DeviceError, DeviceQueue, buffers::GuestBuffers, rate_limiter::RateLimiter};

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
    pub(super) queue: DeviceQueue,
    allowed: Offloads,
}

impl Sender {
    pub(super) fn new(queue: DeviceQueue, allowed: Offloads) -> Self {
        Self { queue, allowed }
    }

    /// Sends frames until something keeps it from going on.
    pub(super) fn send(
        &mut self,
        backend: &mut dyn NetBackend,
        limiter: &mut RateLimiter,
        metrics: &NetMetrics,
    ) -> Result<Pause, DeviceError> {
        let mut turns = self.queue.size();
        loop {
            self.queue.disable_notification()?;
            while turns > 0 {
                let Some(chain) = self.queue.pop()? else {
                    break;
                };
                turns -= 1;
                let (head, mut frame, _) = chain.into_buffers()?;
                let bytes = frame.len().saturating_sub(HEADER) as u64;
                if !limiter.admit(bytes).map_err(DeviceError::Backend)? {
                    metrics.tx_throttled.inc();
                    self.queue.undo_pop(head);
                    return Ok(Pause::Limited);
                }
                if let Sent::NoRoom = self.send_one(&mut frame, backend, metrics) {
                    self.queue.undo_pop(head);
                    return Ok(Pause::NoRoom);
                }
                self.queue.complete(head, 0)?;
            }
            if turns == 0 {
                return Ok(Pause::Turn);
            }
            if !self.queue.enable_notification()? {
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
}
