use std::{any::Any, io, os::fd::RawFd, sync::Arc};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use crate::{DeviceError, Interrupt, SavedQueue, memory::GuestMem, queue::DeviceQueue};

/// Virtio device types (VIRTIO 1.3, section 5) that this VMM implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[repr(u32)]
pub enum DeviceId {
    /// Network card, section 5.1.
    Net = 1,
    /// Block device, section 5.2.
    Block = 2,
    /// Entropy source, section 5.4.
    Rng = 4,
    /// Memory balloon, section 5.5.
    Balloon = 5,
    /// Socket device, section 5.10.
    Vsock = 19,
    /// Memory device, section 5.15.
    Mem = 24,
    /// File system device, section 5.11.
    Fs = 26,
}

/// All that a device receives when its driver sets DRIVER_OK.
///
/// From here on, until [`VirtioDevice::reset`], the transport lets the driver change none of it.
pub struct Activation {
    /// The guest's memory.
    pub mem: GuestMem,
    /// The configured queues, in order, as many as [`VirtioDevice::queue_sizes`] names. Each was checked by
    /// the transport ([`virtio_queue::QueueT::is_valid`]) unless the driver left it disabled
    /// ([`DeviceQueue::is_ready`]).
    pub queues: Vec<DeviceQueue>,
    /// The feature bits that the driver accepted: a subset of [`VirtioDevice::features`] and the transport's
    /// own.
    pub features: u64,
    /// Where to raise interrupts for a change of the configuration; each queue has its own.
    pub interrupt: Arc<dyn Interrupt>,
    /// The driver did this before the machine was saved, and is not going to do it again: it may wait for what was on
    /// its way then.
    pub restored: bool,
}

impl Activation {
    /// What a device receives for queues that its driver set up, in order.
    #[must_use]
    pub fn new(mem: GuestMem, queues: Vec<Queue>, features: u64, interrupt: Arc<dyn Interrupt>) -> Self {
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = queues
            .into_iter()
            .enumerate()
            .map(|(index, queue)| DeviceQueue::new(queue, index, mem.clone(), interrupt.clone(), event_idx));
        Self { queues: queues.collect(), mem, features, interrupt, restored: false }
    }

    /// The queues of a device that has `N`, of which it needs the first `required`.
    ///
    /// # Errors
    /// As [`check_queues`](Self::check_queues).
    pub fn into_queues<const N: usize>(self, required: usize) -> Result<[DeviceQueue; N], ActivateError> {
        self.check_queues(N, required)?;
        let got = self.queues.len();
        self.queues.try_into().map_err(|_| ActivateError::QueueCount { expected: N, got })
    }

    /// Checks that there are `count` queues, and that the driver enabled the first `required`.
    ///
    /// # Errors
    /// [`ActivateError::QueueCount`] when there are more or fewer, [`ActivateError::QueueDisabled`] when the driver left
    /// one disabled.
    pub fn check_queues(&self, count: usize, required: usize) -> Result<(), ActivateError> {
        let got = self.queues.len();
        if got != count {
            return Err(ActivateError::QueueCount { expected: count, got });
        }
        match self.queues.iter().take(required).position(|queue| !queue.is_ready()) {
            Some(disabled) => Err(ActivateError::QueueDisabled(disabled)),
            None => Ok(()),
        }
    }
}

/// Why a device could not be activated. The transport answers by setting DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue that the device cannot work without was left disabled by the driver.
    #[error("queue {0} is required but was not enabled")]
    QueueDisabled(usize),
    /// The transport handed over another number of queues than the device declared.
    #[error("expected {expected} queues, got {got}")]
    QueueCount {
        /// As many as [`VirtioDevice::queue_sizes`] names.
        expected: usize,
        /// As many as there were.
        got: usize,
    },
    /// The device's backend could not be started.
    #[error("starting the backend")]
    Backend(#[source] io::Error),
}

/// A host-side descriptor that a device wants to be woken for.
///
/// Sources are fixed from construction to drop. A device with a changing set (vsock's connections) nests them
/// in an epoll instance of its own and names that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollSource {
    /// The descriptor, owned by the device.
    pub fd: RawFd,
    /// What to wait for (level triggered unless EDGE_TRIGGERED is set).
    pub events: EventSet,
    /// Handed back in [`DeviceEvent::Source`].
    pub token: u32,
}

/// What a thread that a device starts does before anything else: whoever makes the device hands in how such a thread
/// is confined. It must not return when it fails.
pub type ThreadSetup = fn();

/// Something for an activated device to work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The driver notified the queue with this index.
    Queue(usize),
    /// A [`PollSource`] is ready.
    Source {
        /// The source's token.
        token: u32,
        /// What it is ready for.
        events: EventSet,
    },
}

/// A virtio device, apart from its transport.
///
/// One event loop thread calls [`process`](Self::process); register accesses arrive from vCPU threads. The
/// transport serialises all calls with a lock, so a device needs none of its own, and no method may block on
/// the guest, on a peer or on slow I/O: a bounded amount of work, then return.
pub trait VirtioDevice: Any + Send {
    /// What kind of device this is.
    fn id(&self) -> DeviceId;

    /// The feature bits offered, without the transport's own (VERSION_1, EVENT_IDX and INDIRECT_DESC are the
    /// device's to offer: it says what its queue handling supports).
    fn features(&self) -> u64;

    /// The largest size of each queue. Its length is the number of queues and never changes.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device's configuration space. Bytes beyond its end are left as they are (the transport
    /// zeroes `data` first).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space. Anything that is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready: from now on the device may use its queues.
    ///
    /// # Errors
    /// When it cannot work with what the driver set up, or its backend cannot start.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Back to the state before [`activate`](Self::activate): queues dropped, nothing in flight that touches
    /// guest memory, everything the driver told it forgotten. The backend stays open.
    fn reset(&mut self);

    /// The host-side descriptors to watch while the device is active.
    fn poll_sources(&self) -> Vec<PollSource>;

    /// Works on one event. A spurious event is not an error.
    ///
    /// # Errors
    /// When the device cannot go on; see [`DeviceError`].
    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError>;

    /// Brings the device to rest for a snapshot, and returns the queues of an active one, in order. Called while all
    /// vCPUs are paused; the device finishes or takes back what is in flight, so that the memory saved afterwards is
    /// consistent with the queues. It stays active: the next event lets it go on.
    ///
    /// What else of the device goes into a snapshot says [`Persist`](crate::Persist).
    ///
    /// # Errors
    /// [`DeviceError`] when in-flight work could not be brought to a stop.
    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError>;
}
