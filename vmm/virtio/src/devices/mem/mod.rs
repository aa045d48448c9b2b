//! Memory device, virtio-mem (VIRTIO 1.3, section 5.15): memory that comes and goes in blocks.
//!
//! A region of guest physical addresses is reserved at boot. The host says how much of it it wants plugged
//! ([`MemoryDevice::set_requested_size`]); the driver plugs and unplugs blocks until that is so, and tells
//! the device which. Blocks that are unplugged are given back to the host at once.
//!
//! # What is there of an unplugged block
//! To the host, nothing: it is a hole. To the guest's processors, it is not memory: the device has the
//! machine ([`Blocks`]) take it out of the guest's address space, which may do so in chunks larger than a block, and
//! offers VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE, without which it does not work. A chunk holds several blocks,
//! so a hostile guest can still touch unplugged blocks beside plugged ones, and other devices on its behalf
//! any of them. That populates memory which is charged to the VM's cgroup like all its memory, holds what the
//! guest itself wrote, and goes when the chunk does: nothing is gained that the guest does not have.

mod blocks;
mod metrics;
mod queue;
mod state;
#[cfg(test)]
mod tests;

use std::{os::fd::AsRawFd, sync::Arc};

pub use blocks::Blocks;
pub use metrics::MemoryMetrics;
use queue::{Request, Response};
use serde::{Deserialize, Serialize};
pub use state::{MemoryResources, MemoryState};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, Drained, Interrupt,
    PollSource, SavedQueue, VirtioDevice,
};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (section 5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The one queue, on which the driver sends one request at a time.
const QUEUE_SIZES: [u16; 1] = [16];

/// Length of the configuration space (section 5.15.4).
const CONFIG_LEN: usize = 56;

/// Token of the source by which the device goes on with requests that it left.
const AGAIN: u32 = 0;

/// The smallest block: a transparent huge page, and what Linux deals in at the least.
const MIN_BLOCK: u64 = 2 << 20;

/// How the memory device is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// First guest physical address of the region; a multiple of the block size.
    pub start: u64,
    /// Length of the region in bytes: the most that can ever be plugged. A multiple of the block size.
    pub size: u64,
    /// What is plugged and unplugged as a whole, in bytes: a power of two, 2 MiB or more.
    #[serde(default = "default_block_size")]
    pub block_size: u64,
    /// How many bytes the driver is asked to plug from the start; a multiple of the block size.
    #[serde(default)]
    pub requested_size: u64,
}

fn default_block_size() -> u64 {
    MIN_BLOCK
}

/// Why a memory device could not be made or resized.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The block size.
    #[error("block size {0:#x} is not a power of two of at least 2 MiB")]
    BlockSize(u64),
    /// A size or address.
    #[error("{what} {value:#x} is not a multiple of the block size {block_size:#x}")]
    Unaligned {
        /// Which one.
        what: &'static str,
        /// What it was.
        value: u64,
        /// What it should be a multiple of.
        block_size: u64,
    },
    /// The region is empty or ends beyond the address space.
    #[error("the region of {size:#x} bytes at {start:#x} is empty or too long")]
    Region {
        /// Where it starts.
        start: u64,
        /// How long it is.
        size: u64,
    },
    /// More was asked for than there is.
    #[error("requested size {requested:#x} is more than the region's {size:#x} bytes")]
    TooMuch {
        /// What was asked for.
        requested: u64,
        /// What there is.
        size: u64,
    },
    /// A saved state that does not fit its own configuration.
    #[error("saved state of {got} blocks where the region has {expected}")]
    State {
        /// Blocks in the region.
        expected: usize,
        /// Blocks in the state.
        got: usize,
    },
    /// The host refused.
    #[error("host")]
    Host(#[source] std::io::Error),
}

impl MemoryConfig {
    fn check(&self) -> Result<(), MemoryError> {
        let Self { start, size, block_size, requested_size } = *self;
        if !block_size.is_power_of_two() || block_size < MIN_BLOCK {
            return Err(MemoryError::BlockSize(block_size));
        }
        for (what, value) in [("start", start), ("size", size), ("requested size", requested_size)] {
            self.check_aligned(what, value)?;
        }
        if size == 0 || start.checked_add(size).is_none() {
            return Err(MemoryError::Region { start, size });
        }
        self.check_requested(requested_size)
    }

    fn check_aligned(&self, what: &'static str, value: u64) -> Result<(), MemoryError> {
        let block_size = self.block_size;
        if value.is_multiple_of(block_size) {
            Ok(())
        } else {
            Err(MemoryError::Unaligned { what, value, block_size })
        }
    }

    fn check_requested(&self, requested: u64) -> Result<(), MemoryError> {
        self.check_aligned("requested size", requested)?;
        if requested > self.size {
            return Err(MemoryError::TooMuch { requested, size: self.size });
        }
        Ok(())
    }

    fn block_count(&self) -> Result<usize, MemoryError> {
        let region = MemoryError::Region { start: self.start, size: self.size };
        usize::try_from(self.size / self.block_size).map_err(|_| region)
    }
}

struct Active {
    queue: DeviceQueue,
    interrupt: Arc<dyn Interrupt>,
}

/// The device.
pub struct MemoryDevice {
    config: MemoryConfig,
    blocks: Arc<dyn Blocks>,
    /// Of each block, whether it is plugged.
    plugged: Vec<bool>,
    plugged_size: u64,
    requested_size: u64,
    again: EventFd,
    active: Option<Active>,
    metrics: Arc<MemoryMetrics>,
}

impl MemoryDevice {
    /// A device with nothing plugged.
    ///
    /// # Errors
    /// When the configuration makes no sense (the error says what), or the host has no event descriptor left.
    pub fn new(config: MemoryConfig, blocks: Arc<dyn Blocks>) -> Result<Self, MemoryError> {
        config.check()?;
        Ok(Self {
            config,
            blocks,
            plugged: vec![false; config.block_count()?],
            plugged_size: 0,
            requested_size: config.requested_size,
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(MemoryError::Host)?,
            active: None,
            metrics: Arc::default(),
        })
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<MemoryMetrics> {
        self.metrics.clone()
    }

    /// Asks the driver to plug or unplug until so many bytes are plugged. It gets there, or as near as it
    /// can, in its own time; it may not plug more.
    ///
    /// # Errors
    /// When that is not a multiple of the block size, or more than the region has.
    pub fn set_requested_size(&mut self, bytes: u64) -> Result<(), MemoryError> {
        self.config.check_requested(bytes)?;
        self.requested_size = bytes;
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
        Ok(())
    }

    /// How many bytes the driver is asked to have plugged.
    #[must_use]
    pub fn requested_size(&self) -> u64 {
        self.requested_size
    }

    /// How many bytes are plugged.
    #[must_use]
    pub fn plugged_size(&self) -> u64 {
        self.plugged_size
    }

    /// How it was set up.
    #[must_use]
    pub fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// The blocks that a request is about, as indices, if they are all in the region (section 5.15.6.2).
    fn indices(&self, addr: u64, count: u16) -> Option<std::ops::Range<usize>> {
        let offset = addr.checked_sub(self.config.start)?;
        if count == 0 || !offset.is_multiple_of(self.config.block_size) {
            return None;
        }
        let first = usize::try_from(offset / self.config.block_size).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    /// Runs of plugged blocks among those given, as address and length.
    fn plugged_ranges(&self, first: usize, end: usize) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let blocks = self.plugged.iter().enumerate().take(end).skip(first);
        for (index, _) in blocks.filter(|(_, plugged)| **plugged) {
            let addr = self.config.start + index as u64 * self.config.block_size;
            match ranges.last_mut() {
                Some((start, len)) if *start + *len == addr => *len += self.config.block_size,
                _ => ranges.push((addr, self.config.block_size)),
            }
        }
        ranges
    }

    fn handle(&mut self, request: Request) -> Response {
        let response = match request {
            Request::Plug { addr, count } => self.plug(addr, count),
            Request::Unplug { addr, count } => self.unplug(addr, count),
            Request::UnplugAll => self.unplug_all(),
            Request::State { addr, count } => self.block_state(addr, count),
            Request::Unknown => Response::Error,
        };
        if matches!(response, Response::Error | Response::Busy) {
            self.metrics.refused_requests.inc();
        }
        response
    }

    fn plug(&mut self, addr: u64, count: u16) -> Response {
        let Some(range) = self.indices(addr, count) else { return Response::Error };
        let Some(blocks) = self.plugged.get_mut(range) else { return Response::Error };
        if blocks.iter().any(|plugged| *plugged) {
            return Response::Error;
        }
        let len = u64::from(count) * self.config.block_size;
        // Both are at most the region's size, which ends within 64 bits.
        if self.plugged_size + len > self.requested_size {
            return Response::Nack;
        }
        if self.blocks.plug(addr, len).is_err() {
            return Response::Busy;
        }
        blocks.fill(true);
        self.plugged_size += len;
        self.metrics.plugged_bytes.add(len);
        Response::Ack
    }

    fn unplug(&mut self, addr: u64, count: u16) -> Response {
        let Some(range) = self.indices(addr, count) else { return Response::Error };
        let Some(blocks) = self.plugged.get_mut(range) else { return Response::Error };
        if !blocks.iter().all(|plugged| *plugged) {
            return Response::Error;
        }
        let len = u64::from(count) * self.config.block_size;
        if self.blocks.unplug(addr, len).is_err() {
            return Response::Busy;
        }
        blocks.fill(false);
        self.plugged_size -= len;
        self.metrics.unplugged_bytes.add(len);
        Response::Ack
    }

    fn unplug_all(&mut self) -> Response {
        for (addr, len) in self.plugged_ranges(0, self.plugged.len()) {
            if self.blocks.unplug(addr, len).is_err() {
                return Response::Busy;
            }
            let first = usize::try_from((addr - self.config.start) / self.config.block_size);
            let count = usize::try_from(len / self.config.block_size);
            if let (Ok(first), Ok(count)) = (first, count)
                && let Some(blocks) = self.plugged.get_mut(first..first + count)
            {
                blocks.fill(false);
            }
            self.plugged_size -= len;
            self.metrics.unplugged_bytes.add(len);
        }
        Response::Ack
    }

    fn block_state(&self, addr: u64, count: u16) -> Response {
        let Some(range) = self.indices(addr, count) else { return Response::Error };
        let Some(blocks) = self.plugged.get(range) else { return Response::Error };
        match (blocks.iter().any(|plugged| *plugged), blocks.iter().all(|plugged| *plugged)) {
            (_, true) => Response::Plugged,
            (false, _) => Response::Unplugged,
            (true, false) => Response::Mixed,
        }
    }

    /// Works on the queue; has itself called again when it could not finish.
    fn work(&mut self) -> Result<(), DeviceError> {
        // Taken out so that requests can change the rest of the device while its queue is walked.
        let Some(mut active) = self.active.take() else { return Ok(()) };
        let drained = active.queue.drain(|mem, chain| {
            let driver = |what| DeviceError::Driver { queue: 0, what };
            let (request, answer) = queue::read_request(mem, chain).map_err(driver)?;
            let response = self.handle(request);
            answer.write(mem, response).map_err(driver)
        });
        self.active = Some(active);
        if drained? == Drained::NotAll {
            self.again.write(1).map_err(DeviceError::Backend)?;
        }
        Ok(())
    }

    /// `struct virtio_mem_config` (section 5.15.4).
    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let MemoryConfig { start, size, block_size, .. } = self.config;
        // All of the region is usable at any time. The second field is the NUMA node (and padding): there is
        // none.
        let fields = [block_size, 0, start, size, size, self.plugged_size, self.requested_size];
        let mut space = [0; CONFIG_LEN];
        for (bytes, field) in space.chunks_exact_mut(8).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        space
    }
}

impl VirtioDevice for MemoryDevice {
    fn id(&self) -> DeviceId {
        DeviceId::Mem
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
            | (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let from = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, byte) in data.iter_mut().zip(from.unwrap_or_default()) {
            *to = *byte;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (features, interrupt) = (activation.features, activation.interrupt.clone());
        let [queue] = activation.into_queues(1)?;
        if features & F_UNPLUGGED_INACCESSIBLE == 0 {
            let why = "the driver wants to read unplugged memory";
            return Err(ActivateError::Backend(std::io::Error::new(std::io::ErrorKind::Unsupported, why)));
        }
        self.active = Some(Active { queue, interrupt });
        Ok(())
    }

    /// Plugged blocks stay plugged: they hold the guest's memory, which a reset of the device does not end
    /// (section 5.15.6.1).
    fn reset(&mut self) {
        self.active = None;
        // An empty counter says EAGAIN: nothing was pending.
        let _ = self.again.read();
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        vec![PollSource { fd: self.again.as_raw_fd(), events: EventSet::IN, token: AGAIN }]
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        if let DeviceEvent::Source { .. } = event {
            // An empty counter says EAGAIN: the event was spurious, and a look at the queue costs little.
            let _ = self.again.read();
        }
        self.work()
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        Ok(self.active.iter().map(|active| active.queue.state()).collect())
    }
}
