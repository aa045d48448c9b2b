//! The machine: a KVM virtual machine with its memory, processors, bus and slots.
//!
//! | module | owns |
//! |---|---|
//! | `bus` | which device answers at which address |
//! | `input` | what is typed on the console |
//! | `kinds` | the list of the kinds of devices |
//! | `memory_blocks` | the memory device's blocks as KVM memory slots |
//! | `metrics` | what the control API reports |
//! | [`poller`] | the descriptors that the event loop watches |
//! | [`slots`] | virtio-mmio slots and their wiring to KVM |
//! | [`shares`] | what serves shared directories |
//! | `processors` | virtual processors: created, started, paused |
//!
//! A machine is put together in steps, each of which can fail alone: [`Machine::new`] makes an empty one,
//! [`Machine::load`] puts a kernel into it, [`Machine::resume`] lets it run. None of them opens a file: what
//! a machine needs from the host was opened before.

mod bus;
mod devices;
mod input;
mod kinds;
mod memory_blocks;
mod metrics;
pub mod poller;
mod processors;
pub mod shares;
pub mod slots;

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc, time::Instant};

pub use bus::{End, MachineBus};
use caisson_virtio::{
    VirtioDevice,
    devices::{
        balloon::Balloon,
        block::{Block, DiskError},
        mem::{MemoryDevice, MemoryError},
    },
    memory::{GuestRam, RamConfig, RamError},
    mmio::{IrqLine, TransportState},
};
use caisson_vmm_api::{config::MAX_SLOTS, exit::ExitReason};
use devices::DeviceFactory;
pub use devices::{DeviceBuildError, OpenDevice};
use input::ConsoleInput;
pub use kinds::{DeviceMetrics, DeviceState};
use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_MEM_LOG_DIRTY_PAGES, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use poller::{Poller, Token};
pub use processors::ProcessorError;
use processors::{CpuSource, Processors};
use serde::{Deserialize, Serialize};
use shares::Shares;
use slots::{SlotError, Slots};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_NONBLOCK, EventFd},
};

use crate::{
    boot::{self, BootError, BootSource},
    devices::{
        exit::ExitPort,
        serial::{Console, ConsoleSink, SERIAL_GSI, SavedSerial},
    },
    layout::KVM_TSS,
};

/// The version of KVM's interface that exists.
const KVM_API_VERSION: i32 = 12;

/// What KVM must be able to do.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "an interrupt controller in the kernel"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::ImmediateExit, "immediate exit"),
];

/// Why a machine could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM speaks another version.
    #[error("KVM's interface has version {0}, not {KVM_API_VERSION}")]
    KvmVersion(i32),
    /// KVM lacks something.
    #[error("KVM on this host lacks {0}")]
    KvmLacks(&'static str),
    /// A KVM call failed.
    #[error("KVM: {what}")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The processors.
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    /// The slots.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A device.
    #[error("slot {slot}")]
    Device {
        /// The slot.
        slot: u8,
        /// Why it could not be made.
        #[source]
        source: DeviceBuildError,
    },
    /// The machine lacks the device that this is about.
    #[error("the machine has no {0}")]
    NoDevice(&'static str),
    /// The device in a slot is something else than what this is about.
    #[error("slot {slot} has no {what}")]
    OtherDevice {
        /// The slot.
        slot: u8,
        /// What should be there.
        what: &'static str,
    },
    /// A disk's files are not as they should be any more.
    #[error("the disk in slot {slot}")]
    Disk {
        /// The slot.
        slot: u8,
        /// What is wrong with them.
        #[source]
        source: DiskError,
    },
    /// A size that the memory device cannot have.
    #[error("resizing memory")]
    Resize(#[source] MemoryError),
    /// The host is out of descriptors or memory.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
}

/// The sizes of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineShape {
    /// Its memory.
    pub ram: RamConfig,
    /// As many processors as it can ever have.
    pub max_processors: u8,
    /// How many virtio-mmio slots.
    pub slots: u8,
}

/// What of a saved machine it takes to make an empty one that its processors and devices fit.
pub struct SavedMachine<'a> {
    /// Its sizes.
    pub shape: MachineShape,
    /// CPUID of its first processor.
    pub cpuid: &'a [kvm_cpuid_entry2],
    /// Its console.
    pub serial: &'a SavedSerial,
}

/// A slot's device in a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotState {
    /// The transport, with the queues.
    pub transport: TransportState,
    /// The device.
    pub device: DeviceState,
}

/// A machine. Dropping it stops its processors and gives everything back.
pub struct Machine {
    // Declared in the order in which they must go: processors before what they run on.
    processors: Processors,
    bus: Arc<MachineBus>,
    poller: Arc<Poller>,
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    shape: MachineShape,
    shares: Arc<Shares>,
    input: Option<ConsoleInput>,
    /// It was restored and has not run since: what was on its way when it was saved is to be sent again.
    fresh_from_snapshot: bool,
}

impl Machine {
    /// Makes a machine with empty memory, empty slots and no processor.
    ///
    /// # Errors
    /// When the host lacks something; see [`MachineError`].
    pub fn new(
        kvm: &Kvm,
        shape: MachineShape,
        poller: Arc<Poller>,
        sink: ConsoleSink,
        started: Instant,
    ) -> Result<Self, MachineError> {
        let ram = GuestRam::new(shape.ram)?;
        let console = |irq| Ok(Console::new(irq, sink));
        Self::with_memory((kvm, CpuSource::Host), shape, ram, poller, BusParts { console, started })
    }

    /// Makes a machine for a saved state, with its memory and its console but without processors and devices.
    ///
    /// # Errors
    /// When the host lacks something, or the state is impossible.
    pub fn from_snapshot(
        kvm: &Kvm,
        saved: &SavedMachine<'_>,
        memory: File,
        poller: Arc<Poller>,
        (sink, started): (ConsoleSink, Instant),
    ) -> Result<Self, MachineError> {
        let ram = GuestRam::from_file(saved.shape.ram, memory)?;
        let console = |irq| {
            Console::from_state(saved.serial, irq, sink)
                .map_err(|error| MachineError::Host("restoring the console", error))
        };
        let model = CpuSource::Saved(saved.cpuid);
        let parts = BusParts { console, started };
        let mut machine = Self::with_memory((kvm, model), saved.shape, ram, poller, parts)?;
        machine.fresh_from_snapshot = true;
        Ok(machine)
    }

    fn with_memory(
        (kvm, model): (&Kvm, CpuSource<'_>),
        shape: MachineShape,
        ram: GuestRam,
        poller: Arc<Poller>,
        parts: BusParts<impl FnOnce(Arc<dyn IrqLine>) -> Result<Console, MachineError>>,
    ) -> Result<Self, MachineError> {
        check(kvm)?;
        if shape.slots > MAX_SLOTS {
            return Err(SlotError::TooMany(shape.slots).into());
        }
        let ram = Arc::new(ram);
        let vm = Arc::new(create_vm(kvm, &ram)?);
        let slots = Slots::new(vm.clone(), ram.mem().clone(), poller.clone(), shape.slots);
        let bus = Arc::new(new_bus(&vm, &poller, slots, parts)?);
        let processors = Processors::new(kvm, vm.clone(), bus.clone(), (shape.max_processors, model))?;
        let shares = Arc::default();
        Ok(Self { processors, bus, poller, vm, ram, shape, shares, input: None, fresh_from_snapshot: false })
    }

    /// Has the machine's shared directories served by `shares`. By default, any directory is, by threads of
    /// its own.
    pub fn share_by(&mut self, shares: Arc<Shares>) {
        self.shares = shares;
    }

    /// Feeds the console with what comes from `source`.
    ///
    /// # Errors
    /// When `source` is of a kind that cannot be watched, such as a regular file.
    pub fn type_from(&mut self, source: File) -> Result<(), MachineError> {
        let input = ConsoleInput::attach(source, &self.bus.console, self.poller.clone());
        self.input = Some(input.map_err(|error| MachineError::Host("console.input: watching it", error))?);
        Ok(())
    }

    /// Puts a kernel into memory and processor 0 at its entry, with `processors` processors in all.
    ///
    /// # Errors
    /// When an image is not what it should be, or KVM refuses.
    pub fn load(&mut self, source: &BootSource<'_>, processors: u8) -> Result<(), MachineError> {
        let entry = boot::load(&self.ram, source)?;
        self.processors.boot(&self.ram, entry)?;
        self.processors.grow(processors)?;
        Ok(())
    }

    /// The machine's shape.
    #[must_use]
    pub fn shape(&self) -> MachineShape {
        self.shape
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its slots.
    #[must_use]
    pub fn slots(&self) -> &Slots {
        &self.bus.slots
    }

    /// Its bus.
    #[must_use]
    pub fn bus(&self) -> &MachineBus {
        &self.bus
    }

    /// Its KVM descriptor.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Its processors.
    #[must_use]
    pub fn processors(&self) -> &Processors {
        &self.processors
    }

    /// Its processors, to add to them.
    pub fn processors_mut(&mut self) -> &mut Processors {
        &mut self.processors
    }

    /// What its event loop watches.
    #[must_use]
    pub fn poller(&self) -> &Arc<Poller> {
        &self.poller
    }

    /// Makes a device and plugs it into a slot.
    ///
    /// # Errors
    /// When the device cannot be made, the slot is taken or the wiring fails.
    pub fn plug(&self, slot: u8, device: OpenDevice) -> Result<(), MachineError> {
        let device = self.factory().make(device).map_err(|source| MachineError::Device { slot, source })?;
        Ok(self.bus.slots.plug(slot, device)?)
    }

    /// Plugs the memory device into the first empty slot, if the machine has hotpluggable memory.
    ///
    /// # Errors
    /// When the device cannot be made or no slot is free.
    pub fn plug_memory(&self) -> Result<(), MachineError> {
        if self.shape.ram.hotplug == 0 {
            return Ok(());
        }
        let slot = self.bus.slots.first_empty()?;
        let device = self.factory().memory().map_err(|source| MachineError::Device { slot, source })?;
        Ok(self.bus.slots.plug(slot, device)?)
    }

    /// Puts a device back into its slot; `device` is what it is on now, for those that need something.
    ///
    /// # Errors
    /// When it cannot be made, or does not take its state.
    pub fn restore_device(
        &self,
        slot: u8,
        state: &SlotState,
        device: Option<OpenDevice>,
    ) -> Result<(), MachineError> {
        let made = self.factory().restore(&state.device, device);
        let made = made.map_err(|source| MachineError::Device { slot, source })?;
        Ok(self.bus.slots.restore(slot, made, &state.transport)?)
    }

    fn factory(&self) -> DeviceFactory<'_> {
        DeviceFactory { vm: &self.vm, ram: &self.ram, shares: &self.shares }
    }

    /// Takes the device out of a slot.
    ///
    /// # Errors
    /// When there is none, or its driver holds it and `force` is not set.
    pub fn unplug(&self, slot: u8, force: bool) -> Result<(), MachineError> {
        Ok(self.bus.slots.unplug(slot, force)?)
    }

    /// Asks the guest to have `bytes` of hotpluggable memory plugged.
    ///
    /// # Errors
    /// When there is no memory device, or it cannot have that size.
    pub fn request_memory(&self, bytes: u64) -> Result<(), MachineError> {
        let asked = self.first_device::<MemoryDevice, _>(|mem| mem.set_requested_size(bytes));
        asked.ok_or(MachineError::NoDevice("memory device"))?.map_err(MachineError::Resize)
    }

    /// Asks the guest to have `pages` pages of 4 KiB in its balloon.
    ///
    /// # Errors
    /// When there is no balloon.
    pub fn request_balloon(&self, pages: u32) -> Result<(), MachineError> {
        let asked = self.first_device::<Balloon, _>(|balloon| balloon.set_target_pages(pages));
        asked.ok_or(MachineError::NoDevice("balloon"))
    }

    /// Has the disk in a slot take the size that its file has by now, and tells the guest of a change.
    /// Returns the size in bytes.
    ///
    /// # Errors
    /// When there is no disk in the slot, or its file has no size that a disk can have.
    pub fn refresh_capacity(&self, slot: u8) -> Result<u64, MachineError> {
        let refreshed = self.bus.slots.with(slot, |transport| {
            transport.device_as::<Block>().map(|disk| disk.refresh_capacity().map(|_| disk.capacity()))
        })?;
        let refreshed = refreshed.flatten().ok_or(MachineError::OtherDevice { slot, what: "disk" })?;
        refreshed.map_err(|source| MachineError::Disk { slot, source })
    }

    /// Runs `f` on the first device that is a `D`.
    fn first_device<D: VirtioDevice, T>(&self, mut f: impl FnMut(&mut D) -> T) -> Option<T> {
        let slots = (0u8..).take(self.bus.slots.count());
        slots.filter_map(|slot| self.bus.slots.with(slot, |t| t.device_as::<D>().map(&mut f)).ok()??).next()
    }

    /// Lets all processors run.
    ///
    /// # Errors
    /// When one has stopped for good.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.processors.resume()?;
        if std::mem::take(&mut self.fresh_from_snapshot) {
            self.bus.slots.kick_all();
        }
        Ok(())
    }

    /// Brings all processors to rest. Devices still finish what they have begun.
    ///
    /// # Errors
    /// When one has stopped for good.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        Ok(self.processors.pause()?)
    }

    /// How the machine ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<ExitReason> {
        self.bus.end.get()
    }

    /// Ends the machine from outside.
    pub fn stop(&self) {
        self.bus.end.set(ExitReason::Stopped);
    }

    /// Works on an event that is the machine's own.
    pub fn handle(&mut self, token: Token, events: EventSet) {
        match token {
            Token::ConsoleInput => self.input.iter_mut().for_each(|input| input.readable(&self.bus.console)),
            Token::ConsoleRoom => self.input.iter_mut().for_each(|input| input.room(&self.bus.console)),
            Token::Queue { slot, queue } => self.bus.slots.notified(slot, queue),
            Token::Source { slot, token } => self.bus.slots.source_ready(slot, token, events),
            _ => {}
        }
    }
}

fn check(kvm: &Kvm) -> Result<(), MachineError> {
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(MachineError::KvmVersion(version));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(MachineError::KvmLacks(name)),
        None => Ok(()),
    }
}

fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Result<VmFd, MachineError> {
    let failed = |what| move |source| MachineError::Kvm { what, source };
    let vm = kvm.create_vm().map_err(failed("creating the virtual machine"))?;
    disable_pmu(&vm)?;
    vm.set_tss_address(KVM_TSS).map_err(failed("placing the task state segment"))?;
    vm.create_irq_chip().map_err(failed("creating the interrupt controller"))?;
    for (number, slot) in (0u32..).zip(ram.boot_slots()) {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: slot.guest,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        debug_assert_eq!(region.flags & KVM_MEM_LOG_DIRTY_PAGES, 0);
        // SAFETY: the range is one of `ram`'s mappings, which the machine keeps until after KVM's descriptor
        // is closed, and which overlaps no other.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("handing over guest memory"))?;
    }
    Ok(vm)
}

/// Turns the guest's performance counters off, before its first vCPU exists. CPUID does not offer them, but AMD's first
/// four answer all the same. KVM before Linux 5.18 lacks the capability.
fn disable_pmu(vm: &VmFd) -> Result<(), MachineError> {
    if vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) <= 0 {
        return Ok(());
    }
    let mut capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    capability.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&capability)
        .map_err(|source| MachineError::Kvm { what: "leaving out performance counters", source })
}

/// What a bus is made from, beside its slots.
struct BusParts<C> {
    /// Makes the console on its interrupt line.
    console: C,
    started: Instant,
}

fn new_bus(
    vm: &VmFd,
    poller: &Poller,
    slots: Slots,
    parts: BusParts<impl FnOnce(Arc<dyn IrqLine>) -> Result<Console, MachineError>>,
) -> Result<MachineBus, MachineError> {
    let host = |error| MachineError::Host("creating the machine's events", error);
    let console_irq = EventFd::new(EFD_NONBLOCK).map_err(host)?;
    vm.register_irqfd(&console_irq, SERIAL_GSI)
        .map_err(|source| MachineError::Kvm { what: "connecting the console's interrupt", source })?;
    let end = End::new().map_err(host)?;
    poller.add(end.event().as_raw_fd(), EventSet::IN, Token::Exit).map_err(host)?;
    Ok(MachineBus {
        console: Arc::new((parts.console)(Arc::new(console_irq))?),
        exit_port: Arc::new(ExitPort::new(parts.started)),
        slots: Arc::new(slots),
        end: Arc::new(end),
    })
}
