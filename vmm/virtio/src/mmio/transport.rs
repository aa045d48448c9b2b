use std::{any::Any, sync::Arc};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::{
    IrqLine, MmioInterrupt, Register, Status, TransportState, TransportStateError,
    registers::{CONFIG, MAGIC, VENDOR, VERSION},
};
use crate::{
    Activation, DeviceError, DeviceEvent, DeviceId, Interrupt, PollSource, SavedQueue, VirtioDevice,
    memory::GuestMem,
};

/// Whoever watches a device's poll sources: told when it becomes active and when it stops being so.
pub trait Watcher: Send + Sync {
    /// The device is active: watch these.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    fn watch(&self, sources: &[PollSource]) -> std::io::Result<()>;
    /// The device is no longer active.
    fn unwatch(&self, sources: &[PollSource]);
}

/// One device behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    mem: GuestMem,
    interrupt: Arc<MmioInterrupt>,
    watcher: Arc<dyn Watcher>,
    status: Status,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// The queues as the driver sets them up; the active device has its own copies.
    queues: Vec<Queue>,
    /// The device has been activated and not been reset since.
    active: bool,
    /// Its poll sources are watched.
    watched: bool,
}

impl MmioTransport {
    /// Puts `device` behind registers, as after power-on.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        line: Arc<dyn IrqLine>,
        watcher: Arc<dyn Watcher>,
    ) -> Self {
        let queues = new_queues(device.as_ref());
        Self {
            device,
            mem,
            interrupt: Arc::new(MmioInterrupt::new(line)),
            watcher,
            status: Status::empty(),
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            active: false,
            watched: false,
        }
    }

    /// Puts a restored `device` behind the registers of a saved transport, and activates it if it was active.
    ///
    /// # Errors
    /// When the state does not fit the device: it comes from a file.
    pub fn from_state(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        line: Arc<dyn IrqLine>,
        watcher: Arc<dyn Watcher>,
        state: &TransportState,
    ) -> Result<Self, TransportStateError> {
        let interrupt =
            Arc::new(MmioInterrupt::restored(line.clone(), state.interrupt_status, state.config_generation));
        let mut transport = Self::new(device, mem, line, watcher);
        transport.interrupt = interrupt;
        transport.status = state.status;
        transport.device_features_sel = state.device_features_sel;
        transport.driver_features_sel = state.driver_features_sel;
        transport.driver_features = state.driver_features;
        transport.queue_sel = state.queue_sel;
        let unknown = state.driver_features & !transport.offered();
        if unknown != 0 {
            return Err(TransportStateError::Features(unknown));
        }
        if state.active && !state.status.contains(IN_USE) {
            return Err(TransportStateError::Status(state.status));
        }
        transport.restore_queues(&state.queues)?;
        if state.active {
            transport.reactivate()?;
        }
        Ok(transport)
    }

    fn restore_queues(&mut self, saved: &[SavedQueue]) -> Result<(), TransportStateError> {
        let (expected, got) = (self.queues.len(), saved.len());
        if expected != got {
            return Err(TransportStateError::QueueCount { expected, got });
        }
        for (index, (queue, saved)) in self.queues.iter_mut().zip(saved).enumerate() {
            let restored =
                Queue::try_from(*saved).map_err(|source| TransportStateError::Queue { index, source })?;
            if restored.max_size() != queue.max_size() || (restored.ready() && !restored.is_valid(&*self.mem))
            {
                return Err(TransportStateError::QueueInvalid(index));
            }
            *queue = restored;
        }
        Ok(())
    }

    fn reactivate(&mut self) -> Result<(), TransportStateError> {
        let activation = Activation { restored: true, ..self.activation() };
        self.device.activate(activation).map_err(TransportStateError::Activate)?;
        self.active = true;
        // A device that had failed when it was saved is not asked again before its driver resets it.
        if self.status.contains(Status::NEEDS_RESET) {
            return Ok(());
        }
        self.watch().map_err(|error| TransportStateError::Activate(crate::ActivateError::Backend(error)))
    }

    fn watch(&mut self) -> std::io::Result<()> {
        // Also when it fails, as a part of them may be watched by then.
        self.watched = true;
        self.watcher.watch(&self.device.poll_sources())
    }

    /// Nobody asks the device any more, so what makes a source ready would never be dealt with.
    fn unwatch(&mut self) {
        if std::mem::take(&mut self.watched) {
            self.watcher.unwatch(&self.device.poll_sources());
        }
    }

    /// Continues a restored device: notifications and interrupts may have been on their way when it was
    /// saved.
    pub fn kick(&mut self) {
        for queue in 0..self.queues.len() {
            self.process(DeviceEvent::Queue(queue));
        }
        self.interrupt.repeat();
    }

    /// What kind of device is behind the registers.
    #[must_use]
    pub fn device_id(&self) -> DeviceId {
        self.device.id()
    }

    /// How many queues it has.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The device itself, if it is a `D`.
    pub fn device_as<D: VirtioDevice>(&mut self) -> Option<&mut D> {
        let device: &mut dyn Any = self.device.as_mut();
        device.downcast_mut()
    }

    /// Whether a driver is bound to it. (Linux leaves ACKNOWLEDGE set after its driver has let go.)
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.status.contains(Status::DRIVER)
    }

    /// Whether a driver is using it.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Brings the device to rest, and returns the transport's state with the device's queues. What else is to be saved
    /// of the device, its [`Persist::state`](crate::Persist::state), is to be asked for after that.
    ///
    /// # Errors
    /// [`DeviceError`] when the device could not come to rest.
    pub fn save(&mut self) -> Result<TransportState, DeviceError> {
        // First: what the device finishes now raises interrupts, which the restored driver has to find pending.
        let device_queues = self.device.quiesce()?;
        let queues =
            if self.active { device_queues } else { self.queues.iter().map(SavedQueue::from).collect() };
        Ok(TransportState {
            status: self.status,
            driver_features: self.driver_features,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            queues,
            active: self.active,
        })
    }

    /// Lets the device work on an event; nothing happens unless it is active.
    pub fn process(&mut self, event: DeviceEvent) {
        if !self.active || self.status.contains(Status::NEEDS_RESET) {
            return;
        }
        if let Err(error) = self.device.process(event) {
            tracing::warn!(
                device = ?self.device.id(),
                error = &error as &dyn std::error::Error,
                "device stopped until its driver resets it"
            );
            self.fail();
        }
    }

    /// A read of the slot's registers or the device's configuration space.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
        } else if let (Some(register), Ok(word)) = (Register::at(offset), <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(register).to_le_bytes();
        }
    }

    /// A write to the slot's registers or the device's configuration space.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            // A driver may not touch a device that it has not announced itself to, nor one that has failed.
            if self.status.contains(Status::DRIVER) && !self.status.contains(Status::FAILED) {
                self.device.write_config(offset, data);
            }
        } else if let (Some(register), Ok(word)) = (Register::at(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(register, u32::from_le_bytes(word));
        }
    }

    fn read_register(&self, register: Register) -> u32 {
        match register {
            Register::MagicValue => MAGIC,
            Register::Version => VERSION,
            Register::DeviceId => self.device.id() as u32,
            Register::VendorId => VENDOR,
            Register::DeviceFeatures => word(self.offered(), self.device_features_sel),
            Register::QueueSizeMax => self.queue().map_or(0, |queue| u32::from(queue.max_size())),
            Register::QueueReady => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            Register::InterruptStatus => self.interrupt.status(),
            Register::Status => self.status.bits(),
            Register::Shm => u32::MAX,
            Register::ConfigGeneration => self.interrupt.generation(),
            // The others are write-only.
            _ => 0,
        }
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSel => self.device_features_sel = value,
            Register::DriverFeaturesSel => self.driver_features_sel = value,
            Register::DriverFeatures => self.accept_features(value),
            Register::QueueSel => self.queue_sel = value,
            Register::QueueNotify => {
                if let Ok(queue) = usize::try_from(value)
                    && queue < self.queues.len()
                {
                    self.process(DeviceEvent::Queue(queue));
                }
            }
            Register::InterruptAck => self.interrupt.acknowledge(value),
            Register::Status => self.write_status(value),
            _ => self.configure_queue(register, value),
        }
    }

    /// The features offered: the device's and the transport's own.
    fn offered(&self) -> u64 {
        self.device.features() | (1 << VIRTIO_F_VERSION_1)
    }

    fn accept_features(&mut self, value: u32) {
        // Only between DRIVER and FEATURES_OK (section 3.1.1).
        if !self.status.contains(Status::DRIVER) || self.status.contains(Status::FEATURES_OK) {
            return;
        }
        match self.driver_features_sel {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | u64::from(value),
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (u64::from(value) << 32),
            _ => {}
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn configure_queue(&mut self, register: Register, value: u32) {
        let negotiating = self.status.contains(Status::FEATURES_OK) && !self.status.intersects(FROZEN);
        let index = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(index).filter(|_| negotiating) else { return };
        // A queue in use keeps its place until it is disabled (section 4.2.2.2).
        match (register, queue.ready()) {
            (Register::QueueReady, _) => queue.set_ready(value == 1),
            (_, true) => {}
            (Register::QueueSize, _) => {
                if let Ok(size) = u16::try_from(value) {
                    // An invalid size leaves the old one.
                    queue.set_size(size);
                }
            }
            (Register::QueueDescLow, _) => queue.set_desc_table_address(Some(value), None),
            (Register::QueueDescHigh, _) => queue.set_desc_table_address(None, Some(value)),
            (Register::QueueDriverLow, _) => queue.set_avail_ring_address(Some(value), None),
            (Register::QueueDriverHigh, _) => queue.set_avail_ring_address(None, Some(value)),
            (Register::QueueDeviceLow, _) => queue.set_used_ring_address(Some(value), None),
            (Register::QueueDeviceHigh, _) => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// The status machine (section 3.1): bits are set one after the other, and only a reset clears any.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // The device alone sets NEEDS_RESET; bits that this version of the interface lacks do not stick.
        let wanted = Status::from_bits_truncate(value) - Status::NEEDS_RESET;
        let added = wanted - self.status;
        if added.contains(Status::FAILED) {
            self.status |= Status::FAILED;
            return;
        }
        let known = self.status - Status::NEEDS_RESET;
        if !wanted.contains(known) || self.status.intersects(Status::NEEDS_RESET | Status::FAILED) {
            return;
        }
        for (step, needs) in [
            (Status::ACKNOWLEDGE, Status::empty()),
            (Status::DRIVER, Status::ACKNOWLEDGE),
            (Status::FEATURES_OK, Status::ACKNOWLEDGE.union(Status::DRIVER)),
            (Status::DRIVER_OK, Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::FEATURES_OK)),
        ] {
            if added.contains(step) && self.status.contains(needs) {
                self.take_step(step);
            }
        }
    }

    fn take_step(&mut self, step: Status) {
        match step {
            // FEATURES_OK reads back as unset when the driver accepted what was not offered, or refused the
            // one feature without which this is another interface.
            Status::FEATURES_OK => {
                let known = self.driver_features & !self.offered() == 0;
                if known && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0 {
                    self.status |= step;
                }
            }
            Status::DRIVER_OK => {
                self.status |= step;
                self.activate();
            }
            _ => self.status |= step,
        }
    }

    fn activate(&mut self) {
        if let Some(index) = self.queues.iter().position(|queue| queue.ready() && !queue.is_valid(&*self.mem))
        {
            tracing::warn!(device = ?self.device.id(), queue = index, "driver set up an impossible queue");
            self.fail();
            return;
        }
        let activation = self.activation();
        let activated = self.device.activate(activation).map_err(Box::<dyn std::error::Error>::from);
        let watched = activated.and_then(|()| {
            self.active = true;
            Ok(self.watch()?)
        });
        if let Err(error) = watched {
            tracing::warn!(device = ?self.device.id(), error = &*error, "device could not be activated");
            self.fail();
        }
    }

    /// Copies of the queues for the device. The transport's own stay what the driver chose.
    fn activation(&mut self) -> Activation {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = new_queues(self.device.as_ref());
        for (copy, queue) in queues.iter_mut().zip(&mut self.queues) {
            queue.set_event_idx(event_idx);
            if let Ok(same) = Queue::try_from(queue.state()) {
                *copy = same;
            }
        }
        Activation::new(self.mem.clone(), queues, self.driver_features, self.interrupt.clone())
    }

    fn fail(&mut self) {
        self.status |= Status::NEEDS_RESET;
        self.unwatch();
        // A driver that is not set up yet will read the status; one that is wants to be told.
        if self.status.contains(Status::DRIVER_OK) {
            self.interrupt.signal_config();
        }
    }

    /// Back to power-on. The configuration generation alone goes on counting.
    pub fn reset(&mut self) {
        self.unwatch();
        self.active = false;
        self.device.reset();
        self.interrupt.clear();
        self.status = Status::empty();
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.queues = new_queues(self.device.as_ref());
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.unwatch();
    }
}

/// Status bits that the driver has set by the time that a device is active.
const IN_USE: Status =
    Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::FEATURES_OK).union(Status::DRIVER_OK);

/// Status bits after which the driver can change no part of the configuration.
const FROZEN: Status = Status::DRIVER_OK.union(Status::NEEDS_RESET).union(Status::FAILED);

fn new_queues(device: &dyn VirtioDevice) -> Vec<Queue> {
    // A size that is no power of two is a defect of the device, caught by its tests; such a queue has no use.
    device.queue_sizes().iter().map(|&size| Queue::new(size).unwrap_or_default()).collect()
}

fn word(value: u64, index: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match index {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
