//! The machine: a KVM virtual machine with its memory, processors, bus and slots.
//!
//! | module | owns |
//! |---|---|
//! | `bus` | which device answers at which address |
//! | `exit` | why a machine ends |
//! | [`poller`] | the descriptors that the event loop watches |
//! | [`slots`] | virtio-mmio slots and their wiring to KVM |
//! | `processors` | virtual processors: created, started, paused |
//!
//! A machine is put together in steps, each of which can fail alone: [`Machine::new`] makes an empty one,
//! [`Machine::load`] puts a kernel into it, [`Machine::resume`] lets it run. None of them opens a file: what a
//! machine needs from the host was opened before (see [`resources`](crate::resources)).

mod bus;
mod exit;
pub mod poller;
mod processors;
pub mod slots;

use std::{io, os::fd::AsRawFd, sync::Arc, time::Instant};

pub use bus::{End, MachineBus};
pub use exit::ExitReason;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use poller::{Poller, Token};
pub use processors::ProcessorError;
use processors::Processors;
use slots::{SlotError, Slots};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_NONBLOCK, EventFd},
};

use crate::{
    boot::{self, BootError, BootSource},
    devices::{
        exit::ExitPort,
        serial::{Console, ConsoleSink, SERIAL_GSI},
    },
    memory::{GuestRam, RamConfig, RamError, layout::KVM_TSS},
    virtio::{DeviceEvent, VirtioDevice},
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
    /// The host is out of descriptors or memory.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
}

/// The sizes of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineShape {
    /// Its memory.
    pub ram: RamConfig,
    /// As many processors as it can ever have.
    pub max_processors: u8,
    /// How many virtio-mmio slots.
    pub slots: u8,
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
}

impl Machine {
    /// Makes a machine with empty memory, empty slots and no processor.
    ///
    /// # Errors
    /// When the host lacks something; see [`MachineError`].
    pub fn new(
        kvm: &Kvm,
        shape: MachineShape,
        sink: ConsoleSink,
        started: Instant,
    ) -> Result<Self, MachineError> {
        check(kvm)?;
        let ram = Arc::new(GuestRam::new(shape.ram)?);
        let vm = Arc::new(create_vm(kvm, &ram)?);
        let poller = Arc::new(Poller::new().map_err(|e| MachineError::Host("creating the event loop", e))?);
        let bus = Arc::new(new_bus(&vm, &ram, &poller, shape, sink, started)?);
        let processors = Processors::new(kvm, vm.clone(), bus.clone(), shape.max_processors)?;
        Ok(Self { processors, bus, poller, vm, ram, shape })
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

    /// Plugs a device into a slot.
    ///
    /// # Errors
    /// When the slot is taken or the wiring fails.
    pub fn plug(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        Ok(self.bus.slots.plug(slot, device)?)
    }

    /// Lets all processors run.
    ///
    /// # Errors
    /// When one has stopped for good.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        Ok(self.processors.resume()?)
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
    pub fn handle(&self, token: Token, events: EventSet) {
        match token {
            Token::Queue { slot, queue } => self.bus.slots.notified(slot, queue),
            Token::Source { slot, token } => self.bus.slots.source_ready(slot, token, events),
            _ => {}
        }
    }

    /// Hands an event to the device in a slot.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn nudge(&self, slot: u8, event: DeviceEvent) -> Result<(), MachineError> {
        self.bus.slots.with(slot, |transport| transport.process(event))?;
        Ok(())
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
    vm.set_tss_address(KVM_TSS).map_err(failed("placing the task state segment"))?;
    vm.create_irq_chip().map_err(failed("creating the interrupt controller"))?;
    for (number, slot) in (0u32..).zip(ram.slots()) {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: slot.guest,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        debug_assert_eq!(region.flags & KVM_MEM_LOG_DIRTY_PAGES, 0);
        // SAFETY: the range is one of `ram`'s mappings, which the machine keeps until after KVM's descriptor is
        // closed, and which overlaps no other.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("handing over guest memory"))?;
    }
    Ok(vm)
}

fn new_bus(
    vm: &Arc<VmFd>,
    ram: &GuestRam,
    poller: &Arc<Poller>,
    shape: MachineShape,
    sink: ConsoleSink,
    started: Instant,
) -> Result<MachineBus, MachineError> {
    let host = |error| MachineError::Host("creating the machine's events", error);
    let console_irq = EventFd::new(EFD_NONBLOCK).map_err(host)?;
    vm.register_irqfd(&console_irq, SERIAL_GSI)
        .map_err(|source| MachineError::Kvm { what: "connecting the console's interrupt", source })?;
    let end = End::new().map_err(host)?;
    poller.add(end.event().as_raw_fd(), EventSet::IN, Token::Exit).map_err(host)?;
    Ok(MachineBus {
        console: Arc::new(Console::new(Arc::new(console_irq), sink)),
        exit_port: Arc::new(ExitPort::new(started)),
        slots: Arc::new(Slots::new(vm.clone(), ram.mem().clone(), poller.clone(), shape.slots)),
        end: Arc::new(end),
    })
}
