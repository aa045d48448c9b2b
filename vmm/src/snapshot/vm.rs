use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::SnapshotError;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// What belongs to the virtual machine as a whole.
#[derive(Default, Serialize, Deserialize)]
pub struct VmState {
    clock: kvm_clock_data,
    chips: Vec<kvm_irqchip>,
}

impl VmState {
    pub(super) fn of(vm: &VmFd) -> Result<Self, SnapshotError> {
        let failed = |what: &str| {
            let what = format!("saving {what}");
            move |source| SnapshotError::Kvm { what, source }
        };
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(failed("an interrupt controller"))?;
            chips.push(chip);
        }
        let clock = vm.get_clock().map_err(failed("the clock"))?;
        Ok(Self { clock, chips })
    }

    pub(super) fn restore_interrupts(&self, vm: &VmFd) -> Result<(), SnapshotError> {
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(|source| SnapshotError::Kvm {
                what: format!("restoring interrupt controller {}", chip.chip_id),
                source,
            })?;
        }
        Ok(())
    }

    /// The guest's monotonic clock goes on where it stopped. Without flags KVM takes the value as it is; with
    /// `KVM_CLOCK_REALTIME` it would add the time in between and the clock would jump.
    pub(super) fn restore_clock(&self, vm: &VmFd) -> Result<(), SnapshotError> {
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.set_clock(&clock)
            .map_err(|source| SnapshotError::Kvm { what: "restoring the clock".into(), source })
    }
}
