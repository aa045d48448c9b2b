use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use crate::vcpu::{msrs, only_allowed};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// KVM's own MSRs: clock, steal time, asynchronous page faults, end of interrupt.
const KVM_CUSTOM: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// EFER: SVM's instructions exist. CR4: VMX's do.
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;
/// As many MSRs as KVM reads or writes at once.
const MSR_BATCH: usize = 128;

/// A processor.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// The MSRs to save: those that KVM lists, and its own, as far as a guest may have them.
pub(super) fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, SnapshotError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(|source| SnapshotError::Kvm { what: "listing MSRs".into(), source })?;
    let listed = list.as_slice().iter().copied();
    let listed = listed.filter(|index| !KVM_CUSTOM.contains(index));
    Ok(listed.chain(KVM_CUSTOM).filter(|index| msrs::is_allowed(*index)).collect())
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> SnapshotError {
    move |source| SnapshotError::Kvm { what: what.to_owned(), source }
}

impl VcpuState {
    /// Reads a processor at rest. MP_STATE comes first, as reading it settles what else depends on it; events
    /// come last, as reading the others may turn pending ones into injected ones.
    pub(super) fn of(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, SnapshotError> {
        let mp_state = vcpu.get_mp_state().map_err(failed("saving MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(failed("saving registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("saving system registers"))?;
        let xsave = vcpu.get_xsave().map_err(failed("saving XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(failed("saving XCRs"))?;
        let debug_regs = vcpu.get_debug_regs().map_err(failed("saving debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(failed("saving the local APIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().ok();
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("saving CPUID"))?;
        let msrs = read_msrs(vcpu, msrs)?;
        let events = vcpu.get_vcpu_events().map_err(failed("saving events"))?;
        let cpuid = cpuid.as_slice().to_vec();
        Ok(Self { cpuid, tsc_khz, mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, msrs, events })
    }

    pub(super) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Puts the state into a new processor, in the order in which each part finds what it depends on.
    pub(super) fn restore(&self, vcpu: &VcpuFd) -> Result<(), SnapshotError> {
        // A state file is not believed: it has no more than a new processor could be given.
        refuse_nesting(&self.sregs)?;
        vcpu.set_cpuid2(&cpuid_table(&self.cpuid)?).map_err(failed("restoring CPUID"))?;
        if let Some(khz) = self.tsc_khz
            && vcpu.get_tsc_khz().ok() != Some(khz)
        {
            vcpu.set_tsc_khz(khz).map_err(failed("restoring the TSC's frequency"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(failed("restoring MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(failed("restoring registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("restoring system registers"))?;
        // SAFETY: a guest's XSAVE area is 4 KiB unless the process asked for dynamic features, which this one
        // never does; KVM reads no more.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("restoring XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("restoring XCRs"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(failed("restoring debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("restoring the local APIC"))?;
        write_msrs(vcpu, &writable(&self.msrs)?)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("restoring events"))?;
        // Tells the guest's watchdogs that it was stopped. It fails when the guest does not use KVM's clock.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

/// The CPUID table of a state file, as far as a guest may see it.
fn cpuid_table(saved: &[kvm_cpuid_entry2]) -> Result<CpuId, SnapshotError> {
    CpuId::from_entries(&only_allowed(saved)).map_err(|_| SnapshotError::Table("CPUID"))
}

/// Refuses registers in which the guest had turned nested virtualization on, as only a forged file has them.
fn refuse_nesting(sregs: &kvm_sregs) -> Result<(), SnapshotError> {
    if sregs.efer & EFER_SVME == 0 && sregs.cr4 & CR4_VMXE == 0 {
        return Ok(());
    }
    Err(refused("restoring system registers with nested virtualization turned on".into()))
}

/// The MSRs of a state file that are written: an error if it has one that a guest must not have. One that is 0 is left
/// out, as that is what it is in a new processor.
fn writable(values: &[(u32, u64)]) -> Result<Vec<(u32, u64)>, SnapshotError> {
    let (allowed, others): (Vec<_>, Vec<_>) = values.iter().partition(|(index, _)| msrs::is_allowed(*index));
    match others.iter().find(|(_, data)| *data != 0) {
        Some((index, _)) => Err(refused(format!("restoring MSR {index:#x}, which no guest may have"))),
        None => Ok(allowed),
    }
}

fn refused(what: String) -> SnapshotError {
    SnapshotError::Kvm { what, source: kvm_ioctls::Error::new(libc::EPERM) }
}

/// Reads those of `indices` that exist for this guest.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, SnapshotError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(MSR_BATCH));
        let entries: Vec<_> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| SnapshotError::Table("MSRs"))?;
        // KVM stops at the first that it does not have; that one is left out.
        let read = vcpu.get_msrs(&mut msrs).map_err(failed("saving MSRs"))?;
        values.extend(msrs.as_slice().iter().take(read).map(|entry| (entry.index, entry.data)));
        let done = if read == batch.len() { read } else { read + 1 };
        rest = rest.get(done..).unwrap_or_default();
    }
    settle_timer(&mut values);
    Ok(values)
}

/// Orders the TSC before the deadline that is relative to it. A deadline of 0 means that the timer is off, or
/// that it has fired but its interrupt is not in the APIC yet; restored as 0 that interrupt would be lost, so
/// it becomes a deadline that has just passed.
fn settle_timer(values: &mut Vec<(u32, u64)>) {
    let find = |values: &[(u32, u64)], index| values.iter().position(|(i, _)| *i == index);
    let Some(tsc_at) = find(values, MSR_TSC) else { return };
    let tsc = values.remove(tsc_at);
    values.insert(0, tsc);
    if let Some(at) = find(values, MSR_TSC_DEADLINE) {
        let (index, deadline) = values.remove(at);
        values.push((index, if deadline == 0 { tsc.1 } else { deadline }));
    }
}

/// Writes MSRs. One that KVM refuses is an error unless it is 0, as in a new processor.
fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), SnapshotError> {
    let mut rest = values;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(MSR_BATCH));
        let entries: Vec<_> =
            batch.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| SnapshotError::Table("MSRs"))?;
        let written = vcpu.set_msrs(&msrs).map_err(failed("restoring MSRs"))?;
        let refused = batch.get(written);
        if let Some((index, _)) = refused.filter(|(_, data)| *data != 0) {
            let source = kvm_ioctls::Error::new(libc::EINVAL);
            return Err(SnapshotError::Kvm { what: format!("restoring MSR {index:#x}"), source });
        }
        let done = written + usize::from(refused.is_some());
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_comes_first_and_a_spent_deadline_is_due_at_once() {
        let mut values = vec![(MSR_TSC_DEADLINE, 0), (0x1a0, 1), (MSR_TSC, 1000), (0x2ff, 2)];
        settle_timer(&mut values);
        assert_eq!(values, [(MSR_TSC, 1000), (0x1a0, 1), (0x2ff, 2), (MSR_TSC_DEADLINE, 1000)]);
    }

    #[test]
    fn cpuid_of_a_state_file_passes_the_same_list_as_at_boot() {
        let all_ones = |function| kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let saved = [1, 0xa, 0x8000_0001, 0x8000_000a].map(all_ones);
        let restored = cpuid_table(&saved).unwrap();
        assert_eq!(restored.as_slice(), only_allowed(&saved));
        let (functions, ecx): (Vec<_>, Vec<_>) =
            restored.as_slice().iter().map(|entry| (entry.function, entry.ecx)).unzip();
        assert_eq!(functions, [1, 0x8000_0001]);
        assert_eq!((ecx[0] & (1 << 5), ecx[1] & (1 << 2)), (0, 0), "VMX and SVM");
    }

    #[test]
    fn msrs_that_no_guest_may_have_are_not_written() {
        for index in [0x3a, 0x1d9, 0x186, 0x480, 0xc000_0080, 0xc001_0117] {
            let error = writable(&[(MSR_TSC, 5), (index, 1)]).unwrap_err().to_string();
            assert!(error.contains(&format!("{index:#x}")), "{error}");
            assert_eq!(writable(&[(MSR_TSC, 5), (index, 0)]).unwrap(), [(MSR_TSC, 5)]);
        }
    }

    #[test]
    fn registers_with_nested_virtualization_are_refused() {
        refuse_nesting(&kvm_sregs { efer: 0xd01, cr4: 0x3506b0 & !CR4_VMXE, ..Default::default() }).unwrap();
        refuse_nesting(&kvm_sregs { efer: EFER_SVME, ..Default::default() }).unwrap_err();
        refuse_nesting(&kvm_sregs { cr4: CR4_VMXE, ..Default::default() }).unwrap_err();
    }

    #[test]
    fn a_pending_deadline_is_kept() {
        let mut values = vec![(MSR_TSC_DEADLINE, 5000), (MSR_TSC, 1000)];
        settle_timer(&mut values);
        assert_eq!(values, [(MSR_TSC, 1000), (MSR_TSC_DEADLINE, 5000)]);
    }
}
