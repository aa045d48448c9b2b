//! From the host to the guest: frames are read straight into the driver's buffers, of which one frame may
//! take several (VIRTIO_NET_F_MRG_RXBUF).

use std::{
    collections::VecDeque,
    io,
    num::Wrapping,
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    RX,
    backend::NetBackend,
    header::{HEADER, NUM_BUFFERS},
    metrics::NetMetrics,
};
use crate::{
    DeviceError,
    buffers::{GuestBuffers, pop_chain},
    memory::GuestMem,
    rate_limiter::RateLimiter,
};

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
    mem: GuestMem,
    pub(super) queue: Queue,
    event_idx: bool,
    mergeable: bool,
    /// The room to have before a frame is read, header included.
    wanted: usize,
    /// Buffers taken from the queue and not filled yet, in order.
    buffers: GuestBuffers,
    /// The chains that they are from: head and length.
    chains: VecDeque<(u16, usize)>,
    /// The length of a frame that is in the buffers and waits for the rate limiter.
    held: Option<usize>,
    /// The used index at the last look at whether to interrupt.
    looked_at: Wrapping<u16>,
}

/// How a receiver was set up by its driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Negotiated {
    pub(super) event_idx: bool,
    pub(super) mergeable: bool,
    /// The longest frame to expect, without its header.
    pub(super) longest: usize,
}

fn ring(source: QueueError) -> DeviceError {
    DeviceError::Ring { queue: RX, source }
}

impl Receiver {
    pub(super) fn new(mem: GuestMem, queue: Queue, negotiated: Negotiated) -> Self {
        Self {
            buffers: GuestBuffers::new(mem.clone()),
            looked_at: Wrapping(queue.next_used()),
            mem,
            queue,
            event_idx: negotiated.event_idx,
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
        let mem: &GuestMemoryMmap<()> = &self.mem.clone();
        loop {
            while !self.has_room() {
                let Some(chain) = pop_chain(&mut self.queue, mem).map_err(ring)? else {
                    break;
                };
                let head = chain.head_index();
                let before = self.buffers.len();
                let mut readable = GuestBuffers::new(self.mem.clone());
                let driver = |what| DeviceError::Driver { queue: RX, what };
                GuestBuffers::append_chain(chain, &mut readable, &mut self.buffers)
                    .map_err(|error| driver(error.what()))?;
                let len = self.buffers.len() - before;
                // The header of a frame must be in one piece at the start of a chain (section 5.1.6.3.2).
                if len <= HEADER || !readable.is_empty() {
                    return Err(driver("receive buffer with no room for a frame, or not writable"));
                }
                self.chains.push_back((head, len));
            }
            if self.has_room() {
                self.queue.disable_notification(mem).map_err(ring)?;
                return Ok(true);
            }
            if !self.queue.enable_notification(mem).map_err(ring)? {
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
        self.publish(&filled)
    }

    /// Adds chains to the used ring in one step: a driver that saw the first chain of a frame without the
    /// others would take the frame for broken.
    fn publish(&mut self, filled: &[(u16, u32)]) -> Result<(), DeviceError> {
        let mem: &GuestMemoryMmap<()> = &self.mem;
        let Some((&(last_head, last_len), before)) = filled.split_last() else {
            return Ok(());
        };
        let mut next = Wrapping(self.queue.next_used());
        for &(head, len) in before {
            if head >= self.queue.size() {
                return Err(ring(QueueError::InvalidDescriptorIndex));
            }
            let slot = u64::from(next.0.checked_rem(self.queue.size()).unwrap_or_default());
            let address = self.queue.used_ring().checked_add(4 + 8 * slot);
            let address = GuestAddress(address.ok_or_else(|| ring(QueueError::AddressOverflow))?);
            let mut element = [0; 8];
            element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            element[4..].copy_from_slice(&len.to_le_bytes());
            mem.write_slice(&element, address).map_err(|error| ring(QueueError::GuestMemory(error)))?;
            next += 1;
        }
        // The last one's store of the index, with release ordering, is what makes all of them visible.
        self.queue.set_next_used(next.0);
        self.queue.add_used(mem, last_head, last_len).map_err(ring)
    }

    /// Whether to interrupt the driver for what was delivered since the last call (section 2.7.7.1).
    pub(super) fn needs_interrupt(&mut self) -> Result<bool, DeviceError> {
        let (old, new) = (self.looked_at, Wrapping(self.queue.next_used()));
        self.looked_at = new;
        if old == new || !self.event_idx {
            return Ok(old != new);
        }
        // The driver writes its wish and then looks at the index; we write the index and then look at the
        // wish.
        fence(Ordering::SeqCst);
        let address = self.queue.avail_ring().checked_add(4 + 2 * u64::from(self.queue.size()));
        let address = GuestAddress(address.ok_or_else(|| ring(QueueError::AddressOverflow))?);
        let wish: u16 = self
            .mem
            .load(address, Ordering::Relaxed)
            .map_err(|error| ring(QueueError::GuestMemory(error)))?;
        Ok(new - Wrapping(u16::from_le(wish)) - Wrapping(1) < new - old)
    }

    /// Gives back what was taken from the queue and not filled; a held frame is lost, as frames may be.
    pub(super) fn give_back(&mut self) {
        let taken = u16::try_from(self.chains.len()).unwrap_or_default();
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(taken));
        self.chains.clear();
        self.buffers.clear();
        self.held = None;
    }
}
