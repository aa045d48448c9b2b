use std::sync::Arc;

use caisson_virtio::memory::GuestRam;
use caisson_vmm_api::config::MAX_PROCESSORS;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::MachineBus;
use crate::{
    boot::Entry,
    jail,
    seccomp::Thread,
    vcpu::{VcpuCommandError, VcpuError, VcpuThread, cpuid::CpuTemplate, registers},
};

/// Why processors could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// A number that the machine cannot have.
    #[error("{wanted} processors: this machine can have 1 to {max}")]
    Count {
        /// What was asked for.
        wanted: usize,
        /// The limit.
        max: usize,
    },
    /// Processors are never taken away: the guest takes them offline.
    #[error("the machine has {has} processors already; the guest takes processors offline itself")]
    Shrink {
        /// How many it has.
        has: usize,
    },
    /// One could not be made.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// One is gone.
    #[error(transparent)]
    Gone(#[from] VcpuCommandError),
    /// The host does not say what its processors can do.
    #[error("asking KVM for CPUID")]
    Cpuid(#[source] kvm_ioctls::Error),
}

/// Where the model of a machine's processors comes from.
#[derive(Clone, Copy)]
pub(super) enum CpuSource<'a> {
    /// All that the host's KVM offers.
    Host,
    /// The CPUID of a processor that was saved: one that is added later must not differ from those that the
    /// guest knows, whatever the host's KVM has learnt since.
    Saved(&'a [kvm_cpuid_entry2]),
}

/// The machine's processors: those that exist, of those that may.
pub struct Processors {
    threads: Vec<VcpuThread>,
    running: bool,
    vm: Arc<VmFd>,
    bus: Arc<MachineBus>,
    template: CpuTemplate,
    max: u8,
}

/// Has KVM find the processor when another one sends it an interrupt. KVM makes its map of the interrupt controllers
/// while a new processor is not in its list yet, and drops what is sent to one that is not in the map, the first INIT
/// too. It makes the map anew when the state of a controller is set.
fn make_reachable(vcpu: &VcpuFd, id: u8) -> Result<(), VcpuError> {
    let failed = |source| VcpuError::Kvm { id, what: "connecting its interrupt controller", source };
    vcpu.get_lapic().and_then(|state| vcpu.set_lapic(&state)).map_err(failed)
}

impl Processors {
    pub(super) fn new(
        kvm: &Kvm,
        vm: Arc<VmFd>,
        bus: Arc<MachineBus>,
        (max, model): (u8, CpuSource<'_>),
    ) -> Result<Self, ProcessorError> {
        let limit = kvm.get_max_vcpus().min(usize::from(MAX_PROCESSORS));
        if max == 0 || usize::from(max) > limit {
            return Err(ProcessorError::Count { wanted: usize::from(max), max: limit });
        }
        let template = match model {
            CpuSource::Host => CpuTemplate::of_host(kvm).map_err(ProcessorError::Cpuid)?,
            CpuSource::Saved(entries) => CpuTemplate::of_saved(entries),
        };
        Ok(Self { threads: Vec::new(), running: false, vm, bus, template, max })
    }

    /// How many processors exist.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// The threads, in the order of their processors.
    #[must_use]
    pub fn threads(&self) -> &[VcpuThread] {
        &self.threads
    }

    /// Whether they run.
    #[must_use]
    pub fn running(&self) -> bool {
        self.running
    }

    /// Makes processor 0, at the kernel's entry.
    pub(super) fn boot(&mut self, ram: &GuestRam, entry: Entry) -> Result<(), ProcessorError> {
        let vcpu = self.create(0)?;
        self.as_firmware_leaves_it(&vcpu, 0)?;
        registers::enter_kernel(&vcpu, ram.mem(), entry)?;
        self.start(0, vcpu)
    }

    /// Makes processors until there are `count`. The guest may bring the new ones up from now on; until then
    /// each waits inside KVM.
    ///
    /// # Errors
    /// When the machine was not made for as many, or the host refuses.
    pub fn grow(&mut self, count: u8) -> Result<(), ProcessorError> {
        let (wanted, has) = (usize::from(count), self.threads.len());
        if count == 0 || count > self.max {
            return Err(ProcessorError::Count { wanted, max: usize::from(self.max) });
        }
        if wanted < has {
            return Err(ProcessorError::Shrink { has });
        }
        for id in (0..count).skip(has) {
            let vcpu = self.create(id)?;
            self.as_firmware_leaves_it(&vcpu, id)?;
            make_reachable(&vcpu, id)?;
            self.start(id, vcpu)?;
        }
        Ok(())
    }

    /// Adds a processor that `prepare` sets up, CPUID and all.
    ///
    /// # Errors
    /// When the machine was not made for as many, or the host or `prepare` refuses.
    pub fn add_with<E: From<ProcessorError>>(
        &mut self,
        id: u8,
        prepare: impl FnOnce(&VcpuFd) -> Result<(), E>,
    ) -> Result<(), E> {
        if id >= self.max {
            return Err(
                ProcessorError::Count { wanted: usize::from(id) + 1, max: usize::from(self.max) }.into()
            );
        }
        let vcpu = self.create(id)?;
        prepare(&vcpu)?;
        Ok(self.start(id, vcpu)?)
    }

    fn create(&self, id: u8) -> Result<VcpuFd, ProcessorError> {
        let failed = |source| VcpuError::Kvm { id, what: "creating it", source };
        Ok(self.vm.create_vcpu(u64::from(id)).map_err(failed)?)
    }

    fn as_firmware_leaves_it(&self, vcpu: &VcpuFd, id: u8) -> Result<(), VcpuError> {
        let cpuid = self.template.for_vcpu(id, self.max).map_err(|_| VcpuError::Cpuid { id })?;
        vcpu.set_cpuid2(&cpuid).map_err(|source| VcpuError::Kvm { id, what: "setting CPUID", source })?;
        if let Some(states) = self.template.xsave_states() {
            registers::enable_states(vcpu, id, states)?;
        }
        registers::set_firmware_msrs(vcpu, id)
    }

    fn start(&mut self, id: u8, vcpu: VcpuFd) -> Result<(), ProcessorError> {
        let thread =
            VcpuThread::spawn(id, vcpu, self.bus.clone(), || jail::confine_thread_or_abort(Thread::Vcpu))?;
        if self.running {
            thread.resume()?;
        }
        self.threads.push(thread);
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<(), ProcessorError> {
        for thread in &self.threads {
            thread.resume()?;
        }
        self.running = true;
        Ok(())
    }

    pub(super) fn pause(&mut self) -> Result<(), ProcessorError> {
        let paused = self.threads.iter().map(VcpuThread::pause).collect::<Result<Vec<_>, _>>()?;
        for (thread, paused) in self.threads.iter().zip(paused) {
            paused.recv().map_err(|_| VcpuCommandError { id: thread.id() })?;
        }
        self.running = false;
        Ok(())
    }
}
