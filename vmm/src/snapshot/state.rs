//! What a state file holds.

use std::collections::BTreeMap;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::{
    SnapshotError,
    vcpu::{self, VcpuState},
    vm::VmState,
};
use crate::{
    devices::serial::SavedSerial,
    machine::{DeviceState, Machine, MachineShape, OpenDevice, SavedMachine, SlotState},
    vcpu::cpuid::CpuModel,
};

/// A machine, save for its memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// The program that wrote it, for people.
    pub written_by: String,
    /// The processor model of the host.
    pub model: CpuModel,
    /// The machine's sizes.
    pub shape: MachineShape,
    /// How long the memory file is.
    pub memory_len: u64,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// The processors that exist, in order.
    pub vcpus: Vec<VcpuState>,
    /// The console.
    pub serial: SavedSerial,
    /// The devices, by slot.
    pub slots: BTreeMap<u8, SlotState>,
}

impl MachineState {
    /// The state of a paused machine.
    pub(super) fn of(kvm: &Kvm, machine: &mut Machine) -> Result<Self, SnapshotError> {
        let model = CpuModel::of_host();
        // Devices first: what they still do may raise interrupts and change memory.
        let slots = save_slots(machine)?;
        let msrs = vcpu::msr_indices(kvm)?;
        let mut vcpus = Vec::with_capacity(machine.processors().count());
        for thread in machine.processors().threads() {
            let msrs = msrs.clone();
            vcpus.push(thread.inspect(move |vcpu| VcpuState::of(vcpu, &msrs))??);
        }
        Ok(Self {
            written_by: concat!("caisson-vmm ", env!("CARGO_PKG_VERSION")).to_owned(),
            model,
            shape: machine.shape(),
            memory_len: machine.ram().file_len(),
            vm: VmState::of(machine.vm())?,
            vcpus,
            serial: machine.bus().console().save(),
            slots,
        })
    }

    /// What an empty machine is made from that this state fits.
    pub(super) fn outline(&self) -> Result<SavedMachine<'_>, SnapshotError> {
        let cpuid = self.vcpus.first().map(VcpuState::cpuid).ok_or(SnapshotError::NoProcessor)?;
        Ok(SavedMachine { shape: self.shape, cpuid, serial: &self.serial })
    }

    /// Refuses a snapshot from another kind of processor: its guest has adapted itself to that one.
    pub(super) fn check_host(&self) -> Result<(), SnapshotError> {
        let here = CpuModel::of_host();
        if here == self.model {
            return Ok(());
        }
        Err(SnapshotError::Processor { saved: self.model.to_string(), here: here.to_string() })
    }

    /// Puts the state into a machine that was made for it.
    pub(super) fn restore(
        &self,
        machine: &mut Machine,
        devices: Vec<(u8, OpenDevice)>,
    ) -> Result<(), SnapshotError> {
        let mut devices: BTreeMap<u8, OpenDevice> = devices.into_iter().collect();
        self.vm.restore_interrupts(machine.vm())?;
        for (id, state) in (0u8..).zip(&self.vcpus) {
            machine.processors_mut().add_with::<SnapshotError>(id, |vcpu| state.restore(vcpu))?;
        }
        self.vm.restore_clock(machine.vm())?;
        for (slot, state) in &self.slots {
            machine.restore_device(*slot, state, devices.remove(slot))?;
        }
        match devices.keys().next() {
            Some(slot) => Err(SnapshotError::NoSuchDevice(*slot)),
            None => Ok(()),
        }
    }

    /// A state with nothing in it.
    #[cfg(test)]
    pub(super) fn empty_for_tests() -> Self {
        use caisson_virtio::memory::RamConfig;
        use caisson_vmm_api::{config::Backing, config::HugePages};
        let ram =
            RamConfig { size: 1 << 20, hotplug: 0, backing: Backing::Anonymous, huge_pages: HugePages::Off };
        Self {
            written_by: "a test".into(),
            model: CpuModel::default(),
            shape: MachineShape { ram, max_processors: 1, slots: 1 },
            memory_len: 1 << 20,
            vm: VmState::default(),
            vcpus: Vec::new(),
            serial: vm_superio::SerialState::default().into(),
            slots: BTreeMap::new(),
        }
    }
}

fn save_slots(machine: &Machine) -> Result<BTreeMap<u8, SlotState>, SnapshotError> {
    let mut saved = BTreeMap::new();
    for slot in (0u8..).take(machine.slots().count()) {
        let state = machine.slots().with(slot, |transport| {
            let saved = transport.save().map_err(|source| SnapshotError::Device { slot, source })?;
            let device = DeviceState::of(transport).ok_or(SnapshotError::UnknownDevice(slot))?;
            Ok::<_, SnapshotError>(SlotState { transport: saved, device })
        });
        if let Ok(Some(state)) = state {
            saved.insert(slot, state?);
        }
    }
    Ok(saved)
}
