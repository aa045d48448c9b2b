//! From the host to the guest: frames are read straight into the driver's buffers, of which one frame may
//! take several (VIRTIO_NET_F_MRG_RXBUF).

use std::{collections::VecDeque, io};

use super::{
    backend::NetBackend,
    header::{HEADER, NUM_BUFFERS},
    metrics::NetMetrics,
};
use crate::{DeviceError, DeviceQueue, buffers::GuestBuffers, queue::Head, rate_limiter::RateLimiter};

/// Why receiving stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// No frame has come; the tap's descriptor tells when one has.
    NoFrame,
    /// The driver has to offer buffers; it was asked to notify.
    NoBuffers,
    /// The rate limiter's timer tells when to go on.
    Limited,
    /// Others want their turn.
    Turn,
}

/// The receiving half of an active card.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) queue: DeviceQueue,
    mergeable: bool,
    /// The room to have before a frame is read, header included.
    wanted: usize,
    /// Buffers taken from the queue and not filled yet, in order.
    buffers: GuestBuffers,
    /// The chains that they are from: head and length.
    chains: VecDeque<(Head, usize)>,
    /// The length of a frame that is in the buffers and waits for the rate limiter.
    held: Option<usize>,
}

/// How a receiver was set up by its driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Negotiated {
    pub(super) mergeable: bool,
    /// The longest frame to expect, without its header.
    pub(super) longest: usize,
}

impl Receiver {
    pub(super) fn new(queue: DeviceQueue, negotiated: Negotiated) -> Self {
        Self {
            buffers: GuestBuffers::new(queue.mem().clone()),
            queue,
            mergeable: negotiated.mergeable,
            wanted: negotiated.longest + HEADER,
            chains: VecDeque::new(),
            held: None,
        }
    }

    /// Receives frames until something keeps it from going on.
    pub(super) fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        limiter: &mut RateLimiter,
        metrics: &NetMetrics,
    ) -> Result<Pause, DeviceError> {
        for _ in 0..self.queue.size() {
            let frame = match self.held.take() {
                Some(frame) => frame,
                None => {
                    if !self.fill()? {
                        metrics.rx_starved.inc();
                        return Ok(Pause::NoBuffers);
                    }
                    match backend.receive(&self.buffers) {
                        Ok(n) if n > HEADER => n,
                        // Nothing behind the header, or the end of a file: not a frame.
                        Ok(_) => return Ok(Pause::NoFrame),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Pause::NoFrame),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        Err(_) => {
                            // The interface is down or gone: there is nothing to receive until it says so.
                            metrics.rx_failed.inc();
                            return Ok(Pause::NoFrame);
                        }
                    }
                }
            };
            if !limiter.admit((frame - HEADER) as u64).map_err(DeviceError::Backend)? {
                metrics.rx_throttled.inc();
                self.held = Some(frame);
                return Ok(Pause::Limited);
            }
            self.deliver(frame)?;
            metrics.rx_frames.inc();
            metrics.rx_bytes.add((frame - HEADER) as u64);
        }
        Ok(Pause::Turn)
    }

    /// Takes chains from the queue until a frame of any length finds room; whether it does. If not, the
    /// driver was asked to notify.
    fn fill(&mut self) -> Result<bool, DeviceError> {
        loop {
            while !self.has_room() {
                let Some(chain) = self.queue.pop()? else {
                    break;
                };
                let (head, descriptors) = chain.into_parts();
                let before = self.buffers.len();
                let mut readable = GuestBuffers::new(self.queue.mem().clone());
                GuestBuffers::append_chain(descriptors, &mut readable, &mut self.buffers)
                    .map_err(|error| self.queue.driver_error(error.what()))?;
                let len = self.buffers.len() - before;
                // The header of a frame must be in one piece at the start of a chain (section 5.1.6.3.2).
                if len <= HEADER || !readable.is_empty() {
                    let what = "receive buffer with no room for a frame, or not writable";
                    return Err(self.queue.driver_error(what));
                }
                self.chains.push_back((head, len));
            }
            if self.has_room() {
                self.queue.disable_notification()?;
                return Ok(true);
            }
            if !self.queue.enable_notification()? {
                // With every buffer there is in hand, waiting for more would be waiting for ever.
                return Ok(self.chains.len() >= usize::from(self.queue.size()));
            }
        }
    }

    fn has_room(&self) -> bool {
        if self.mergeable { self.buffers.len() >= self.wanted } else { !self.chains.is_empty() }
    }

    /// Hands the first `frame` bytes of the buffers to the driver.
    fn deliver(&mut self, frame: usize) -> Result<(), DeviceError> {
        let mut left = frame;
        let mut filled = Vec::with_capacity(1);
        let mut bytes = 0;
        while left > 0 {
            let Some((head, len)) = self.chains.pop_front() else { break };
            let part = len.min(left);
            filled.push((head, u32::try_from(part).unwrap_or(u32::MAX)));
            left -= part;
            bytes += len;
            if !self.mergeable {
                break;
            }
        }
        let count = u16::try_from(filled.len()).unwrap_or(u16::MAX);
        self.buffers.copy_from(NUM_BUFFERS, &count.to_le_bytes());
        self.buffers.advance(bytes);
        // A driver that saw the first chain of a frame without the others would take the frame for broken.
        self.queue.complete_together(filled)
    }

    /// Gives back what was taken from the queue and not filled; a held frame is lost, as frames may be.
    pub(super) fn give_back(&mut self) {
        for (head, _) in self.chains.drain(..) {
            self.queue.undo_pop(head);
        }
        self.buffers.clear();
        self.held = None;
    }
}
