//! virtio-fs: a directory of the host, shared by the FUSE protocol (VIRTIO 1.3, section 5.11).
//!
//! | module | owns |
//! |---|---|
//! | `config` | the directory in the machine file, and the configuration space |
//! | `request` | a descriptor chain as a FUSE message |
//! | `passthrough` | what messages do: files by descriptors, never by paths |
//! | `worker` | the threads that do it |
//! | `state`, `metrics` | what a snapshot and an observer see |
//!
//! The event loop takes chains from the queues and hands them to the workers, which wait for the disk in its
//! place and complete them. In flight are never more requests than a queue has entries; a reset and a
//! snapshot wait for them to end.

mod config;
mod metrics;
mod passthrough;
mod request;
mod state;
#[cfg(any(test, feature = "test-utils"))]
mod tests;
mod worker;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use caisson_vmm_api::devices::FsConfig;
use fuse_backend_rs::api::server::Server;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use self::passthrough::Passthrough;
pub use self::{
    config::{MAX_QUEUES, QUEUE_SIZE, TAG_BYTES},
    metrics::{FsMetrics, Operations},
    state::{FsResources, FsState},
    worker::Workers,
};
use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, PollSource, SavedQueue,
    VirtioDevice,
    memory::GuestMem,
    queue::{Chain, Head},
};
#[cfg(any(test, feature = "test-utils"))]
pub use tests::exercise_workers;

/// There is more to take from a queue, or a worker found one broken.
const TOKEN_AGAIN: u32 = 0;

/// Why a shared directory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty, too long, or has a zero byte in it.
    #[error("the tag must have 1 to {TAG_BYTES} bytes, none of them zero")]
    Tag,
    /// More request queues than possible.
    #[error("{0} request queues, at most {MAX_QUEUES} are possible")]
    Queues(u16),
    /// What was given as the root is not a directory, or cannot be looked at.
    #[error("the shared directory")]
    Root(#[source] io::Error),
    /// The host has no event descriptor left.
    #[error("creating an event descriptor")]
    Event(#[source] io::Error),
}

/// What the workers and the event loop share of an active device.
struct Active {
    mem: GuestMem,
    queues: Vec<Mutex<DeviceQueue>>,
    in_flight: Mutex<InFlight>,
    idle: Condvar,
    /// What a worker found wrong with a queue when it completed a request.
    broken: Mutex<Option<DeviceError>>,
    /// The device was reset: what was not begun is dropped.
    cancelled: AtomicBool,
}

/// What is with the workers.
struct InFlight {
    /// The entries of each queue that the driver has not been given back.
    taken: Vec<u16>,
    /// Jobs that have not ended. One goes on for a moment after it has given its entry back, which the driver
    /// may have offered again by then.
    jobs: usize,
}

/// Workers that panicked have left what is under a lock consistent: values are only moved under it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Active {
    fn wait(&self) {
        drop(self.idle.wait_while(lock(&self.in_flight), |in_flight| in_flight.jobs > 0));
    }

    /// A job begins, with an entry of a queue.
    fn begin(&self, index: usize, size: u16) -> Result<(), DeviceError> {
        let mut in_flight = lock(&self.in_flight);
        match in_flight.taken.get_mut(index) {
            Some(count) if *count < size => {
                *count += 1;
                in_flight.jobs += 1;
                Ok(())
            }
            _ => Err(DeviceError::Driver { queue: index, what: "more requests than the queue has entries" }),
        }
    }

    /// A job has ended.
    fn end(&self) {
        let mut in_flight = lock(&self.in_flight);
        in_flight.jobs = in_flight.jobs.saturating_sub(1);
        drop(in_flight);
        self.idle.notify_all();
    }

    /// Gives an entry back to the driver.
    fn complete(&self, index: usize, head: Head, len: u32) -> Result<(), DeviceError> {
        let Some(queue) = self.queues.get(index) else { return Ok(()) };
        let mut queue = lock(queue);
        // First, as the driver may use the entry again at once.
        if let Some(count) = lock(&self.in_flight).taken.get_mut(index) {
            *count = count.saturating_sub(1);
        }
        queue.complete(head, len)?;
        queue.kick()
    }
}

/// The device.
pub struct Fs {
    config: FsConfig,
    share: Arc<Passthrough>,
    server: Arc<Server<Arc<Passthrough>>>,
    workers: Arc<Workers>,
    again: Arc<EventFd>,
    queue_sizes: Vec<u16>,
    metrics: Arc<FsMetrics>,
    active: Option<Arc<Active>>,
}

impl Fs {
    /// Shares the directory `root`, which may be open with `O_PATH`, and all that is mounted below it.
    /// Requests are served by `workers`, with their privileges: giving files to their owners takes CAP_CHOWN,
    /// CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_SETUID, CAP_SETGID and CAP_SETFCAP over the ids in use.
    ///
    /// # Errors
    /// When the configuration or the directory is refused.
    pub fn new(config: FsConfig, root: OwnedFd, workers: Arc<Workers>) -> Result<Self, FsError> {
        if config.tag.is_empty() || config.tag.len() > TAG_BYTES || config.tag.contains('\0') {
            return Err(FsError::Tag);
        }
        if config.queues > MAX_QUEUES {
            return Err(FsError::Queues(config.queues));
        }
        let share = Arc::new(Passthrough::new(&config, root, workers.clone()).map_err(FsError::Root)?);
        let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(FsError::Event)?;
        let queue_sizes = vec![QUEUE_SIZE; usize::from(config.queue_count()) + 1];
        Ok(Self {
            config,
            server: Arc::new(Server::new(share.clone())),
            share,
            workers,
            again: Arc::new(again),
            queue_sizes,
            metrics: Arc::default(),
            active: None,
        })
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<FsMetrics> {
        self.metrics.clone()
    }

    /// Hands what is in a queue to the workers.
    fn take(&self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &self.active else { return Ok(()) };
        let Some(queue) = active.queues.get(index) else { return Ok(()) };
        let mut queue = lock(queue);
        if !queue.is_ready() {
            return Ok(());
        }
        let size = queue.size();
        let mut left = size;
        loop {
            queue.disable_notification()?;
            while let Some(chain) = queue.pop()? {
                active.begin(index, size)?;
                self.submit(active, index, chain);
                left -= 1;
                if left == 0 {
                    return self.again.write(1).map_err(DeviceError::Backend);
                }
            }
            if !queue.enable_notification()? {
                return Ok(());
            }
        }
    }

    fn submit(&self, active: &Arc<Active>, index: usize, chain: Chain) {
        let (active, share, server) = (active.clone(), self.share.clone(), self.server.clone());
        let (metrics, again) = (self.metrics.clone(), self.again.clone());
        self.workers.submit(Box::new(move || {
            if !active.cancelled.load(Ordering::Acquire) {
                let (head, descriptors) = chain.into_parts();
                let len = request::serve((&share, &server), &active.mem, descriptors, &metrics);
                if let Err(error) = active.complete(index, head, len) {
                    *lock(&active.broken) = Some(error);
                    // A counter that is full wakes the loop as well.
                    let _ = again.write(1);
                }
            }
            active.end();
        }));
    }
}

impl VirtioDevice for Fs {
    fn id(&self) -> DeviceId {
        DeviceId::Fs
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = config::space(&self.config);
        let from = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Nothing in it is writable.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // The urgent queue and the first for requests; a driver may leave the others.
        activation.check_queues(self.queue_sizes.len(), 2)?;
        let Activation { mem, queues, .. } = activation;
        self.active = Some(Arc::new(Active {
            mem,
            in_flight: Mutex::new(InFlight { taken: vec![0; queues.len()], jobs: 0 }),
            queues: queues.into_iter().map(Mutex::new).collect(),
            idle: Condvar::new(),
            broken: Mutex::new(None),
            cancelled: AtomicBool::new(false),
        }));
        // A restored driver may wait for requests whose notification came before the snapshot.
        self.again.write(1).map_err(ActivateError::Backend)
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            active.cancelled.store(true, Ordering::Release);
            active.wait();
        }
        // Nothing of what the guest held outlives its driver.
        self.share.clear();
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        vec![PollSource { fd: self.again.as_raw_fd(), events: EventSet::IN, token: TOKEN_AGAIN }]
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        if let Some(error) = self.active.as_ref().and_then(|active| lock(&active.broken).take()) {
            return Err(error);
        }
        match event {
            DeviceEvent::Queue(index) => self.take(index),
            DeviceEvent::Source { token: TOKEN_AGAIN, .. } => {
                // Nothing to read is no error: the event may be spurious.
                let _ = self.again.read();
                (0..self.queue_sizes.len()).try_for_each(|index| self.take(index))
            }
            DeviceEvent::Source { .. } => Ok(()),
        }
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        if let Some(active) = &self.active {
            active.wait();
        }
        if self.share.live() {
            let why =
                "a shared directory that the guest has mounted cannot be saved; unmount or unplug it first";
            return Err(DeviceError::Backend(io::Error::new(io::ErrorKind::Unsupported, why)));
        }
        let queues = self.active.iter().flat_map(|active| &active.queues);
        Ok(queues.map(|queue| lock(queue).state()).collect())
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
