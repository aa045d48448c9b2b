//! Memory balloon (VIRTIO 1.3, section 5.5): the guest hands pages back to the host.
//!
//! Three ways lead there. The host sets a target and the driver *inflates* the balloon with pages that it
//! takes from its own free memory; it *deflates* it when the target falls, or on its own account when it runs
//! out of memory (if that is on). With *free page reporting* the driver tells of free pages as they come,
//! keeps them, and finds zeros in them later. The *statistics* queue says how the guest's memory is used.
//!
//! Pages go back through [`Discard`], so what is left in their place are zeros whatever backs them. What the
//! driver names is a list of page numbers of its choice: each list is bounded, sorted and joined into ranges
//! before any system call, and a page that is not guest memory is counted and skipped.

mod metrics;
mod queue;
mod state;
mod statistics;
#[cfg(test)]
mod tests;

use std::{os::fd::AsRawFd, sync::Arc};

use caisson_vmm_api::devices::BalloonConfig;
pub use metrics::BalloonMetrics;
use queue::PageList;
pub use state::BalloonState;
pub use statistics::Statistics;
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
    PollSource, SavedQueue, VirtioDevice, memory::Discard, queue::Head,
};

/// VIRTIO_BALLOON_F_STATS_VQ (section 5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Entries in each queue. Linux posts one chain at a time to each of them.
const QUEUE_SIZE: u16 = 64;

/// Length of the configuration space: `num_pages` and `actual`. The fields after them belong to features that
/// are not offered.
const CONFIG_LEN: usize = 8;
/// Offset of `actual`, the field that the driver writes.
const ACTUAL_OFFSET: u64 = 4;

/// Token of the source by which the device goes on with a queue that it left unfinished.
const AGAIN: u32 = 0;

/// The features that are offered.
fn features(config: BalloonConfig) -> u64 {
    let optional = [
        (config.statistics, F_STATS_VQ),
        (config.deflate_on_oom, F_DEFLATE_ON_OOM),
        (config.free_page_reporting, F_PAGE_REPORTING),
    ];
    let base =
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC);
    optional.iter().filter(|(on, _)| *on).fold(base, |features, (_, bit)| features | bit)
}

/// How many queues there are.
fn queue_count(config: BalloonConfig) -> usize {
    2 + usize::from(config.statistics) + usize::from(config.free_page_reporting)
}

/// What a queue is for. Queues of features that were not negotiated do not exist: those after them move up
/// (section 5.5.2, and what Linux does).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

impl Role {
    fn list(features: u64) -> Vec<Self> {
        let mut roles = vec![Self::Inflate, Self::Deflate];
        if features & F_STATS_VQ != 0 {
            roles.push(Self::Statistics);
        }
        if features & F_PAGE_REPORTING != 0 {
            roles.push(Self::Reporting);
        }
        roles
    }
}

struct Active {
    queues: Vec<DeviceQueue>,
    roles: Vec<Role>,
    interrupt: Arc<dyn Interrupt>,
}

/// The device.
pub struct Balloon {
    config: BalloonConfig,
    discard: Arc<dyn Discard>,
    queue_sizes: Vec<u16>,
    target_pages: u32,
    actual_pages: u32,
    statistics: Statistics,
    /// The statistics buffer that waits with us until somebody asks.
    statistics_head: Option<Head>,
    pages: PageList,
    again: EventFd,
    active: Option<Active>,
    metrics: Arc<BalloonMetrics>,
}

impl Balloon {
    /// A balloon whose pages go back through `discard`.
    ///
    /// # Errors
    /// When the host has no event descriptor left.
    pub fn new(config: BalloonConfig, discard: Arc<dyn Discard>) -> std::io::Result<Self> {
        Ok(Self {
            config,
            discard,
            queue_sizes: vec![QUEUE_SIZE; queue_count(config)],
            target_pages: config.target_pages,
            actual_pages: 0,
            statistics: Statistics::default(),
            statistics_head: None,
            pages: PageList::default(),
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            active: None,
            metrics: Arc::default(),
        })
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<BalloonMetrics> {
        self.metrics.clone()
    }

    /// Asks the driver for a balloon of so many pages of 4 KiB. It gets there, or as near as it can, in its
    /// own time.
    pub fn set_target_pages(&mut self, pages: u32) {
        self.target_pages = pages;
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
    }

    /// The size that the driver was asked for, in pages of 4 KiB.
    #[must_use]
    pub fn target_pages(&self) -> u32 {
        self.target_pages
    }

    /// The size that the driver says the balloon has, in pages of 4 KiB. The guest can say what it likes
    /// here.
    #[must_use]
    pub fn actual_pages(&self) -> u32 {
        self.actual_pages
    }

    /// The guest's last answer to [`request_statistics`](Self::request_statistics).
    #[must_use]
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Asks the driver for fresh statistics. Returns whether it can be asked now: not before it has answered
    /// the last time, nor when it has no statistics queue.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn request_statistics(&mut self) -> Result<bool, DeviceError> {
        let Some(active) = &mut self.active else { return Ok(false) };
        let Some(index) = active.roles.iter().position(|role| *role == Role::Statistics) else {
            return Ok(false);
        };
        let (Some(queue), Some(head)) = (active.queues.get_mut(index), self.statistics_head.take()) else {
            return Ok(false);
        };
        queue.complete(head, 0)?;
        queue.kick()?;
        Ok(true)
    }

    fn work(&mut self, index: usize) -> Result<Drained, DeviceError> {
        let Self { active: Some(active), discard, pages, metrics, .. } = self else {
            return Ok(Drained::All);
        };
        let (Some(queue), Some(role)) = (active.queues.get_mut(index), active.roles.get(index)) else {
            return Ok(Drained::All);
        };
        let driver = |what| DeviceError::Driver { queue: index, what };
        match role {
            Role::Inflate => queue.drain(|mem, chain| {
                pages.read(mem, chain).map_err(driver)?;
                pages.discard(&**discard, metrics);
                Ok(0)
            }),
            // Pages that were given back are filled again by the host as they are touched: nothing to do.
            Role::Deflate => queue.drain(|mem, chain| {
                pages.read(mem, chain).map_err(driver)?;
                metrics.deflated_pages.add(pages.len() as u64);
                Ok(0)
            }),
            Role::Reporting => queue.drain(|_, chain| {
                queue::discard_reported(chain, &**discard, metrics).map_err(driver)?;
                Ok(0)
            }),
            Role::Statistics => {
                queue::take_statistics(queue, &mut self.statistics_head, &mut self.statistics)
            }
        }
    }

    /// Works on a queue; has itself called again when it could not finish.
    fn work_or_come_back(&mut self, index: usize) -> Result<(), DeviceError> {
        if self.work(index)? == Drained::NotAll {
            self.again.write(1).map_err(DeviceError::Backend)?;
        }
        Ok(())
    }

    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        space[..4].copy_from_slice(&self.target_pages.to_le_bytes());
        space[4..].copy_from_slice(&self.actual_pages.to_le_bytes());
        space
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> DeviceId {
        DeviceId::Balloon
    }

    fn features(&self) -> u64 {
        features(self.config)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let from = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, byte) in data.iter_mut().zip(from.unwrap_or_default()) {
            *to = *byte;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == ACTUAL_OFFSET
            && let Ok(actual) = <[u8; 4]>::try_from(data)
        {
            self.actual_pages = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // A queue of an optional feature that stays disabled is merely never used.
        activation.check_queues(self.queue_sizes.len(), 2)?;
        let Activation { queues, features, interrupt, .. } = activation;
        self.active = Some(Active { queues, roles: Role::list(features), interrupt });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.actual_pages = 0;
        self.statistics_head = None;
        self.statistics = Statistics::default();
        // An empty counter says EAGAIN: nothing was pending.
        let _ = self.again.read();
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        vec![PollSource { fd: self.again.as_raw_fd(), events: EventSet::IN, token: AGAIN }]
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        match event {
            DeviceEvent::Queue(index) => self.work_or_come_back(index),
            DeviceEvent::Source { .. } => {
                // An empty counter says EAGAIN: the event was spurious, and a look at the queues costs
                // little.
                let _ = self.again.read();
                (0..self.queue_sizes.len()).try_for_each(|index| self.work_or_come_back(index))
            }
        }
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        Ok(self.active.iter().flat_map(|active| &active.queues).map(DeviceQueue::state).collect())
    }
}
