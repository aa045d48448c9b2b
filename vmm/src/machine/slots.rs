//! The machine's virtio-mmio slots, and their wiring to KVM: notifications in, interrupts out.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_virtio::{
    DeviceEvent, VirtioDevice,
    memory::GuestMem,
    mmio::{MmioTransport, QUEUE_NOTIFY, Slot, TransportState, TransportStateError},
};
use caisson_vmm_api::config::MAX_SLOTS;
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::poller::{Poller, SlotWatcher, Token};
use crate::layout::{MMIO_SLOT_SIZE, MMIO_SLOTS};

/// The interrupts that slots use, over and over when there are more slots.
const FIRST_GSI: u32 = 5;
const LAST_GSI: u32 = 23;

/// Why a device could not be plugged or unplugged.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is no such slot.
    #[error("there is no slot {slot}; the machine has {count}")]
    NoSuchSlot {
        /// The slot that was named.
        slot: u8,
        /// How many there are.
        count: usize,
    },
    /// More than a machine can have.
    #[error("{0} slots, at most {MAX_SLOTS} are possible")]
    TooMany(u8),
    /// It holds a device.
    #[error("slot {0} is occupied")]
    Occupied(u8),
    /// It holds none.
    #[error("slot {0} is empty")]
    Empty(u8),
    /// No slot is free.
    #[error("all slots are occupied")]
    Full,
    /// The guest's driver still holds the device.
    #[error("the device in slot {0} is still bound to its driver")]
    Busy(u8),
    /// KVM refused an eventfd.
    #[error("slot {slot}: {what}")]
    Kvm {
        /// The slot.
        slot: u8,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The process is out of descriptors.
    #[error("slot {slot}: creating a notification descriptor")]
    Descriptor {
        /// The slot.
        slot: u8,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A saved device does not fit.
    #[error("slot {slot}: restoring its device")]
    Restore {
        /// The slot.
        slot: u8,
        /// Why.
        #[source]
        source: TransportStateError,
    },
}

/// One slot with its notification descriptors: as many as its device has queues.
#[derive(Default)]
struct Place {
    slot: Slot,
    notifiers: Mutex<Vec<EventFd>>,
}

/// All slots.
pub struct Slots {
    vm: Arc<VmFd>,
    mem: GuestMem,
    poller: Arc<Poller>,
    places: Vec<Place>,
    lines: Mutex<BTreeMap<u32, Arc<EventFd>>>,
}

impl Slots {
    /// `count` empty slots.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, mem: GuestMem, poller: Arc<Poller>, count: u8) -> Self {
        let places = (0..count).map(|_| Place::default()).collect();
        Self { vm, mem, poller, places, lines: Mutex::default() }
    }

    /// How many slots there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// Where a slot's registers are.
    #[must_use]
    pub fn base(slot: u8) -> u64 {
        MMIO_SLOTS + u64::from(slot) * MMIO_SLOT_SIZE
    }

    /// The interrupt that a slot uses.
    #[must_use]
    pub fn gsi(slot: u8) -> u32 {
        FIRST_GSI + u32::from(slot) % (LAST_GSI - FIRST_GSI + 1)
    }

    /// The name of the slot's platform device in the guest's sysfs, by which its driver is bound and unbound.
    #[must_use]
    pub fn guest_name(slot: u8) -> String {
        format!("virtio-mmio.{slot}")
    }

    /// The first empty slot.
    ///
    /// # Errors
    /// When there is none.
    pub fn first_empty(&self) -> Result<u8, SlotError> {
        (0u8..)
            .zip(&self.places)
            .find(|(_, place)| place.slot.is_empty())
            .map(|(slot, _)| slot)
            .ok_or(SlotError::Full)
    }

    fn place(&self, slot: u8) -> Result<&Place, SlotError> {
        self.places.get(usize::from(slot)).ok_or(SlotError::NoSuchSlot { slot, count: self.places.len() })
    }

    /// Runs `f` on the device in a slot; `None` when it is empty.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn with<T>(&self, slot: u8, f: impl FnOnce(&mut MmioTransport) -> T) -> Result<Option<T>, SlotError> {
        Ok(self.place(slot)?.slot.with(f))
    }

    /// Puts a device into an empty slot. The guest sees it when its driver probes the slot again.
    ///
    /// # Errors
    /// When the slot is taken or the wiring fails; nothing of it remains then.
    pub fn plug(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<(), SlotError> {
        self.fill(slot, |line, watcher| Ok(MmioTransport::new(device, self.mem.clone(), line, watcher)))
    }

    /// Puts a restored device into its slot.
    ///
    /// # Errors
    /// When the slot is taken, the wiring fails, or the state does not fit the device.
    pub fn restore(
        &self,
        slot: u8,
        device: Box<dyn VirtioDevice>,
        state: &TransportState,
    ) -> Result<(), SlotError> {
        self.fill(slot, |line, watcher| {
            MmioTransport::from_state(device, self.mem.clone(), line, watcher, state)
                .map_err(|source| SlotError::Restore { slot, source })
        })
    }

    fn fill(
        &self,
        slot: u8,
        make: impl FnOnce(Arc<EventFd>, Arc<SlotWatcher>) -> Result<MmioTransport, SlotError>,
    ) -> Result<(), SlotError> {
        let place = self.place(slot)?;
        if !place.slot.is_empty() {
            return Err(SlotError::Occupied(slot));
        }
        let watcher = Arc::new(SlotWatcher { slot, poller: self.poller.clone() });
        let transport = make(self.line(slot)?, watcher)?;
        let notifiers = self.attach_notifiers(slot, transport.queue_count())?;
        *place.notifiers.lock().unwrap_or_else(PoisonError::into_inner) = notifiers;
        place.slot.insert(transport);
        Ok(())
    }

    /// Takes the device out of a slot, which from then on is a placeholder again. Its driver must have let go
    /// of it, unless `force` says that the guest is not asked.
    ///
    /// # Errors
    /// When the slot is empty or its driver is still bound.
    pub fn unplug(&self, slot: u8, force: bool) -> Result<(), SlotError> {
        let place = self.place(slot)?;
        let bound = place.slot.with(|transport| transport.is_bound()).ok_or(SlotError::Empty(slot))?;
        if bound && !force {
            return Err(SlotError::Busy(slot));
        }
        if let Some(mut transport) = place.slot.take() {
            transport.reset();
        }
        let notifiers = std::mem::take(&mut *place.notifiers.lock().unwrap_or_else(PoisonError::into_inner));
        self.detach_notifiers(slot, &notifiers);
        Ok(())
    }

    /// The interrupt line of a slot, connected on first use.
    fn line(&self, slot: u8) -> Result<Arc<EventFd>, SlotError> {
        let gsi = Self::gsi(slot);
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(&gsi) {
            return Ok(line.clone());
        }
        let line = EventFd::new(EFD_NONBLOCK).map_err(|source| SlotError::Descriptor { slot, source })?;
        self.vm.register_irqfd(&line, gsi).map_err(|source| SlotError::Kvm {
            slot,
            what: "connecting its interrupt",
            source,
        })?;
        let line = Arc::new(line);
        lines.insert(gsi, line.clone());
        Ok(line)
    }

    fn attach_notifiers(&self, slot: u8, queues: usize) -> Result<Vec<EventFd>, SlotError> {
        let mut attached = Vec::with_capacity(queues);
        for queue in (0u16..).take(queues) {
            match self.attach_notifier(slot, queue) {
                Ok(notifier) => attached.push(notifier),
                Err(error) => {
                    self.detach_notifiers(slot, &attached);
                    return Err(error);
                }
            }
        }
        Ok(attached)
    }

    /// Has KVM turn a write of `queue` to the slot's notification register into an event.
    fn attach_notifier(&self, slot: u8, queue: u16) -> Result<EventFd, SlotError> {
        let notifier = EventFd::new(EFD_NONBLOCK).map_err(|source| SlotError::Descriptor { slot, source })?;
        let address = IoEventAddress::Mmio(Self::base(slot) + QUEUE_NOTIFY);
        self.vm.register_ioevent(&notifier, &address, u32::from(queue)).map_err(|source| SlotError::Kvm {
            slot,
            what: "connecting a notification",
            source,
        })?;
        let token = Token::Queue { slot, queue };
        if let Err(source) = self.poller.add(notifier.as_raw_fd(), EventSet::IN, token) {
            let _ = self.vm.unregister_ioevent(&notifier, &address, u32::from(queue));
            return Err(SlotError::Descriptor { slot, source });
        }
        Ok(notifier)
    }

    fn detach_notifiers(&self, slot: u8, notifiers: &[EventFd]) {
        let address = IoEventAddress::Mmio(Self::base(slot) + QUEUE_NOTIFY);
        for (queue, notifier) in (0u32..).zip(notifiers) {
            self.poller.remove(notifier.as_raw_fd());
            // It was registered with the same arguments; should KVM disagree, closing the descriptor ends it.
            let _ = self.vm.unregister_ioevent(notifier, &address, queue);
        }
    }

    /// A queue's notification descriptor is ready: takes the notification and lets the device work.
    pub fn notified(&self, slot: u8, queue: u16) {
        let Ok(place) = self.place(slot) else { return };
        if let Some(notifier) =
            place.notifiers.lock().unwrap_or_else(PoisonError::into_inner).get(usize::from(queue))
        {
            // Empty when another event of the same batch has taken it.
            let _ = notifier.read();
        }
        place.slot.process(DeviceEvent::Queue(usize::from(queue)));
    }

    /// A device's poll source is ready.
    pub fn source_ready(&self, slot: u8, token: u32, events: EventSet) {
        if let Ok(place) = self.place(slot) {
            place.slot.process(DeviceEvent::Source { token, events });
        }
    }

    /// Continues every device after a restore.
    pub fn kick_all(&self) {
        for place in &self.places {
            place.slot.with(MmioTransport::kick);
        }
    }

    fn find(&self, addr: u64) -> Option<(&Slot, u64)> {
        let offset = addr.checked_sub(MMIO_SLOTS)?;
        let place = self.places.get(usize::try_from(offset / MMIO_SLOT_SIZE).ok()?)?;
        Some((&place.slot, offset % MMIO_SLOT_SIZE))
    }

    /// A guest's read; false when no slot is there.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        self.find(addr).map(|(slot, offset)| slot.read(offset, data)).is_some()
    }

    /// A guest's write; false when no slot is there.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr).map(|(slot, offset)| slot.write(offset, data)).is_some()
    }
}
