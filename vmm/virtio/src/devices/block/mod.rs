//! virtio-blk: a disk made of raw files or block devices (VIRTIO 1.3, section 5.2).
//!
//! | module | owns |
//! |---|---|
//! | `config` | the disk in the machine file, and the configuration space |
//! | `disk` | the files: what is accepted, and the read-only concat disk |
//! | `request` | what a descriptor chain asks for |
//! | `engine` | reading and writing, by a worker thread or io_uring |
//! | `state`, `metrics` | what a snapshot and an observer see |
//!
//! A request is validated as a whole and then handed to the engine, which never makes the event loop wait.
//! What is in flight keeps the guest's memory mapped. A snapshot waits for all of it to end; a reset gives up
//! what the host has not begun.

mod config;
mod disk;
mod engine;
mod metrics;
mod request;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use caisson_vmm_api::devices::{BlockConfig, CacheMode, IoEngine};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use self::{
    config::{ConfigSpace, SECTOR},
    disk::Disk,
    engine::{Action, Completion, Engine, Operation},
    request::{Parsed, Request, Status, parse},
};
pub use self::{
    config::{ID_BYTES, MAX_QUEUES, QUEUE_SIZE},
    disk::{DiskError, MAX_FILES},
    metrics::BlockMetrics,
    state::{BlockResources, BlockState},
};
use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, Interrupt, PollSource,
    SavedQueue, ThreadSetup, VirtioDevice,
    buffers::GuestBuffers,
    queue::Head,
    rate_limiter::{RateLimitError, RateLimiter},
};

/// The engine has completions.
const TOKEN_ENGINE: u32 = 0;
/// There is more to do than one turn allowed.
const TOKEN_AGAIN: u32 = 1;
/// The rate limiter lets requests through again.
const TOKEN_TIMER: u32 = 2;

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A file was refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The id is too long for the guest to read.
    #[error("the id must be at most {ID_BYTES} bytes of printable ASCII")]
    Id,
    /// Too many queues.
    #[error("a disk has at most {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// A limit makes no sense.
    #[error("rate_limits")]
    RateLimits(#[from] RateLimitError),
    /// The I/O engine could not be started.
    #[error("starting the {0:?} engine")]
    Engine(IoEngine, #[source] io::Error),
    /// An event descriptor could not be made.
    #[error("creating an event descriptor")]
    Event(#[source] io::Error),
    /// The files are not those of the snapshot.
    #[error("the disk had {saved} sectors when it was saved, and has {now} now")]
    CapacityChanged {
        /// Sectors of 512 bytes in the snapshot.
        saved: u64,
        /// Sectors of 512 bytes in the files given.
        now: u64,
    },
}

/// The device.
#[derive(Debug)]
pub struct Block {
    config: BlockConfig,
    // Before the disk: the engine works on the disk's descriptors and is dropped first.
    engine: Engine,
    disk: Disk,
    limiter: RateLimiter,
    again: EventFd,
    queue_sizes: Vec<u16>,
    metrics: Arc<BlockMetrics>,
    active: Option<Active>,
    /// The engine did not end what it was working on at a reset, so the device cannot be used again.
    stuck: bool,
}

/// What there is between activation and reset.
struct Active {
    queues: Vec<DeviceQueue>,
    interrupt: Arc<dyn Interrupt>,
    /// Writes must be safe when they are complete.
    write_through: bool,
    /// Requests in the engine, by their operations' tag.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Active").field("queues", &self.queues).finish_non_exhaustive()
    }
}

/// What a completed request counts as.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Read(u64),
    Write(u64),
    Flush,
    Discard,
    WriteZeroes,
}

/// A request in the engine.
#[derive(Debug)]
struct InFlight {
    queue: usize,
    head: Head,
    kind: Kind,
    status: GuestBuffers,
    /// Operations that have not ended.
    pending: usize,
    failed: bool,
    /// The operations are followed by a flush, for write-through.
    then_flush: bool,
}

impl Block {
    /// A disk of these files, in this order. All that needs a system call that a jailed vCPU thread may lack
    /// (threads, rings, timers) happens here. A thread begins with `setup`.
    ///
    /// # Errors
    /// When the files or the configuration are refused, or the engine cannot be started.
    pub fn new(config: BlockConfig, files: Vec<OwnedFd>, setup: ThreadSetup) -> Result<Self, BlockError> {
        if config.id.len() > ID_BYTES || !config.id.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BlockError::Id);
        }
        if config.queues > MAX_QUEUES {
            return Err(BlockError::Queues(config.queues));
        }
        let disk = Disk::new(files, config.read_only)?;
        let limiter = RateLimiter::new(config.rate_limits)?;
        let engine = Engine::new(config.engine, &disk.fds(), &format!("blk {}", config.id), setup)
            .map_err(|source| BlockError::Engine(config.engine, source))?;
        let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BlockError::Event)?;
        let queue_sizes = vec![QUEUE_SIZE; usize::from(config.queue_count())];
        Ok(Self {
            config,
            engine,
            disk,
            limiter,
            again,
            queue_sizes,
            metrics: Arc::default(),
            active: None,
            stuck: false,
        })
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        self.metrics.clone()
    }

    /// Looks at the size of the file again and tells the driver when it changed. Disks of several files keep
    /// theirs.
    ///
    /// # Errors
    /// When the new size is not one that a disk may have.
    pub fn refresh_capacity(&mut self) -> Result<bool, DiskError> {
        let changed = self.disk.refresh()?;
        if let (true, Some(active)) = (changed, &self.active) {
            active.interrupt.signal_config();
        }
        Ok(changed)
    }

    /// The disk's size in sectors of 512 bytes.
    pub fn capacity_sectors(&self) -> u64 {
        self.disk.capacity() / SECTOR
    }

    /// The disk's size in bytes.
    pub fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn config_space(&self) -> ConfigSpace {
        ConfigSpace {
            capacity: self.capacity_sectors(),
            queues: self.config.queue_count(),
            writable: !self.disk.read_only(),
        }
    }

    /// Takes requests off a queue until it is empty, the engine is full, the limiter says stop, or its turn
    /// is over.
    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if self.limiter.is_blocked() {
            // The timer comes back here.
            return Ok(());
        }
        let Some(queue) = active.queues.get_mut(index).filter(|queue| queue.is_ready()) else {
            return Ok(());
        };
        let mut budget = queue.size();
        loop {
            queue.disable_notification()?;
            while budget > 0 {
                // Without a free slot, the next completion comes back here.
                let Some(&slot) = active.free.last() else {
                    return self.engine.flush_submissions().map_err(DeviceError::Backend);
                };
                let Some(chain) = queue.pop()? else {
                    break;
                };
                budget -= 1;
                let (head, readable, writable) = chain.into_buffers()?;
                let parsed =
                    parse(readable, writable, &self.disk).map_err(|what| queue.driver_error(what))?;
                let bytes = parsed.request.as_ref().map_or(0, Request::bytes);
                if !self.limiter.admit(bytes).map_err(DeviceError::Backend)? {
                    self.metrics.throttled.inc();
                    queue.undo_pop(head);
                    return self.engine.flush_submissions().map_err(DeviceError::Backend);
                }
                let starter =
                    Starter { disk: &self.disk, config: &self.config, write_through: active.write_through };
                match starter.start(parsed, index, head) {
                    Started::Done { head, status, kind, at, written } => {
                        count(&self.metrics, kind, status);
                        at.copy_from(0, &[status as u8]);
                        queue.complete(head, written)?;
                    }
                    Started::InFlight(request, operations) => {
                        active.free.pop();
                        if let Some(place) = active.in_flight.get_mut(slot) {
                            *place = Some(request);
                        }
                        for (file, offset, action) in operations {
                            self.engine.submit(Operation { tag: slot, file, offset, action });
                        }
                    }
                }
            }
            if budget == 0 {
                // More may be there, but other devices want their turn.
                self.again.write(1).map_err(DeviceError::Backend)?;
                break;
            }
            if !queue.enable_notification()? {
                break;
            }
        }
        self.engine.flush_submissions().map_err(DeviceError::Backend)
    }

    fn serve_all(&mut self) -> Result<(), DeviceError> {
        (0..self.queue_sizes.len()).try_for_each(|index| {
            self.serve(index)?;
            self.notify(index)
        })
    }

    /// Interrupts the driver if it wants to know of what was used since it was last asked.
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        match active.queues.get_mut(index) {
            Some(queue) => queue.kick(),
            None => Ok(()),
        }
    }

    /// Answers the requests whose operations have all ended.
    fn complete(&mut self, completions: Vec<Completion>) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mut touched = 0u32;
        for Completion { tag, result } in completions {
            let Some(place) = active.in_flight.get_mut(tag) else { continue };
            let Some(request) = place else { continue };
            request.pending -= 1;
            request.failed |= result.is_err();
            if request.pending > 0 {
                continue;
            }
            if request.then_flush && !request.failed {
                request.then_flush = false;
                request.pending = 1;
                self.engine.submit(Operation { tag, file: 0, offset: 0, action: Action::Flush });
                continue;
            }
            let status = if request.failed { Status::IoError } else { Status::Ok };
            count(&self.metrics, Some(request.kind), status);
            request.status.copy_from(0, &[status as u8]);
            let written = match (request.kind, status) {
                (Kind::Read(bytes), Status::Ok) => u32::try_from(bytes + 1).unwrap_or(u32::MAX),
                _ => 1,
            };
            let Some(InFlight { queue: index, head, .. }) = place.take() else { continue };
            active.free.push(tag);
            if let Some(queue) = active.queues.get_mut(index) {
                queue.complete(head, written)?;
                touched |= 1 << index;
            }
        }
        (0..self.queue_sizes.len())
            .filter(|index| touched & (1 << index) != 0)
            .try_for_each(|index| self.notify(index))
    }

    /// Waits for all that is in flight and answers it.
    fn finish(&mut self) -> Result<(), DeviceError> {
        // A write-through request goes on with a flush when its first part is complete.
        while self.active.as_ref().is_some_and(|active| active.in_flight.iter().any(Option::is_some)) {
            self.engine.flush_submissions().map_err(DeviceError::Backend)?;
            let completions = self.engine.drain().map_err(DeviceError::Backend)?;
            self.complete(completions)?;
        }
        Ok(())
    }
}

/// What became of a request.
enum Started {
    /// It is answered, with so many bytes written to the driver's buffers.
    Done { head: Head, status: Status, kind: Option<Kind>, at: GuestBuffers, written: u32 },
    /// It takes these operations: file, offset, action.
    InFlight(InFlight, Vec<(usize, u64, Action)>),
}

/// Turns requests into operations.
struct Starter<'a> {
    disk: &'a Disk,
    config: &'a BlockConfig,
    write_through: bool,
}

impl Starter<'_> {
    fn start(&self, parsed: Parsed, queue: usize, head: Head) -> Started {
        let Parsed { request, status } = parsed;
        let request = match request {
            Ok(request) => request,
            Err(refused) => {
                return Started::Done { head, status: refused, kind: None, at: status, written: 1 };
            }
        };
        let mut then_flush = false;
        let (kind, operations) = match request {
            Request::GetId(data) => {
                let mut id = [0; ID_BYTES];
                id.iter_mut().zip(self.config.id.bytes()).for_each(|(to, from)| *to = from);
                let written = u32::try_from(data.copy_from(0, &id)).unwrap_or(0);
                return Started::Done {
                    head,
                    status: Status::Ok,
                    kind: None,
                    at: status,
                    written: written + 1,
                };
            }
            Request::Read { offset, data } => {
                let kind = Kind::Read(data.len() as u64);
                (kind, self.transfer(offset, data, Action::Read))
            }
            Request::Write { offset, data } => {
                let kind = Kind::Write(data.len() as u64);
                let sync = self.write_through;
                (kind, self.transfer(offset, data, |data| Action::Write { data, sync }))
            }
            Request::Flush if self.disk.read_only() || self.config.cache == CacheMode::Unsafe => {
                (Kind::Flush, Vec::new())
            }
            Request::Flush => (Kind::Flush, vec![(0, 0, Action::Flush)]),
            Request::Discard(ranges) => {
                let punch = |range: request::Range| Action::Punch { len: range.len, required: false };
                (Kind::Discard, self.ranges(&ranges, punch))
            }
            Request::WriteZeroes(ranges) => {
                then_flush = self.write_through;
                let zero = |range: request::Range| match range.unmap {
                    true => Action::Punch { len: range.len, required: true },
                    false => Action::Zero { len: range.len },
                };
                (Kind::WriteZeroes, self.ranges(&ranges, zero))
            }
        };
        if operations.is_empty() {
            // Nothing to do: no bytes, a flush of what is never dirty, or padding, which is zeroed by now.
            let written = if let Kind::Read(bytes) = kind { bytes + 1 } else { 1 };
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            return Started::Done { head, status: Status::Ok, kind: Some(kind), at: status, written };
        }
        let pending = operations.len();
        let request = InFlight { queue, head, kind, status, pending, failed: false, then_flush };
        Started::InFlight(request, operations)
    }

    fn transfer(
        &self,
        offset: u64,
        data: GuestBuffers,
        action: impl Fn(GuestBuffers) -> Action,
    ) -> Vec<(usize, u64, Action)> {
        let parts = self.disk.parts(offset, data);
        parts.into_iter().map(|part| (part.file, part.offset, action(part.data))).collect()
    }

    /// Only a disk of one file is writable, so a range is never cut.
    fn ranges(
        &self,
        ranges: &[request::Range],
        action: impl Fn(request::Range) -> Action,
    ) -> Vec<(usize, u64, Action)> {
        let ranges = ranges.iter().filter(|range| range.len > 0);
        ranges.map(|range| (0, range.offset, action(*range))).collect()
    }
}

fn count(metrics: &BlockMetrics, kind: Option<Kind>, status: Status) {
    match (kind, status) {
        (_, Status::Unsupported) | (None, Status::IoError) => metrics.refused.inc(),
        (Some(_), Status::IoError) => metrics.failed.inc(),
        (Some(Kind::Read(bytes)), Status::Ok) => {
            metrics.reads.inc();
            metrics.read_bytes.add(bytes);
        }
        (Some(Kind::Write(bytes)), Status::Ok) => {
            metrics.writes.inc();
            metrics.written_bytes.add(bytes);
        }
        (Some(Kind::Flush), Status::Ok) => metrics.flushes.inc(),
        (Some(Kind::Discard), Status::Ok) => metrics.discards.inc(),
        (Some(Kind::WriteZeroes), Status::Ok) => metrics.write_zeroes.inc(),
        (None, Status::Ok) => {}
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        if self.config.queue_count() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.disk.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
            if self.config.cache != CacheMode::Writethrough {
                bits.push(VIRTIO_BLK_F_FLUSH);
            }
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config_space().read(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The one writable field, writeback, comes with a feature that is not offered.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.stuck {
            return Err(ActivateError::Backend(io::ErrorKind::ResourceBusy.into()));
        }
        // A driver uses as many queues as it has processors for, but the first in any case.
        activation.check_queues(self.queue_sizes.len(), 1)?;
        let Activation { queues, features, interrupt, .. } = activation;
        let accepted = |bit: u32| features & (1 << bit) != 0;
        let slots = queues.iter().map(|queue| usize::from(queue.size())).sum();
        // A driver that cannot flush takes a completed write for a safe one (section 5.2.6.2).
        let write_through = !accepted(VIRTIO_BLK_F_FLUSH) && self.config.cache != CacheMode::Unsafe;
        self.active = Some(Active {
            queues,
            interrupt,
            write_through,
            in_flight: std::iter::repeat_with(|| None).take(slots).collect(),
            free: (0..slots).collect(),
        });
        // A restored driver may wait for requests whose notification came before the snapshot.
        self.again.write(1).map_err(ActivateError::Backend)
    }

    fn reset(&mut self) {
        // The engine holds on to what it could not finish, and to the memory that this needs.
        self.stuck |= self.engine.cancel().is_err();
        self.active = None;
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        let source = |fd, token| PollSource { fd, events: EventSet::IN, token };
        let mut sources =
            vec![source(self.engine.event_fd(), TOKEN_ENGINE), source(self.again.as_raw_fd(), TOKEN_AGAIN)];
        sources.extend(self.limiter.timer_fd().map(|fd| source(fd, TOKEN_TIMER)));
        sources
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        match event {
            DeviceEvent::Queue(index) => {
                self.serve(index)?;
                self.notify(index)
            }
            DeviceEvent::Source { token: TOKEN_ENGINE, .. } => {
                let completions = self.engine.completions().map_err(DeviceError::Backend)?;
                let full = self.active.as_ref().is_some_and(|active| active.free.is_empty());
                self.complete(completions)?;
                self.engine.flush_submissions().map_err(DeviceError::Backend)?;
                if full { self.serve_all() } else { Ok(()) }
            }
            DeviceEvent::Source { token: TOKEN_AGAIN, .. } => {
                // Nothing to read is no error: the event may be spurious.
                let _ = self.again.read();
                self.serve_all()
            }
            DeviceEvent::Source { token: TOKEN_TIMER, .. } => {
                self.limiter.timer_expired();
                self.serve_all()
            }
            DeviceEvent::Source { .. } => Ok(()),
        }
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        self.finish()?;
        Ok(self.active.iter().flat_map(|active| &active.queues).map(DeviceQueue::state).collect())
    }
}
