//! The state in which the first processor enters the kernel.

use caisson_virtio::memory::layout::PAGE_SIZE;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::VcpuError;
use crate::{
    boot::Entry,
    layout::{BOOT_GDT, BOOT_PML4, PVH_START_INFO, ZERO_PAGE},
};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS reads as one.
const RFLAGS_RESERVED: u64 = 2;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 2;
const PAGE_LARGE: u64 = 1 << 7;

/// Segment types: code, execute and read, accessed; data, read and write, accessed.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
/// The selectors that Linux's boot protocol asks for: `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// Fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// Memory type ranges: enabled, write-back by default.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// Puts processor 0 at the kernel's entry point.
///
/// # Errors
/// When KVM refuses, or the boot tables do not fit guest memory.
pub fn enter_kernel(vcpu: &VcpuFd, mem: &GuestMemoryMmap<()>, entry: Entry) -> Result<(), VcpuError> {
    let failed = |what| move |source| VcpuError::Kvm { id: 0, what, source };
    let mut sregs = vcpu.get_sregs().map_err(failed("reading its system registers"))?;
    write_gdt(mem, &mut sregs, entry).map_err(VcpuError::Memory)?;
    let regs = match entry {
        Entry::Linux(rip) => {
            write_page_tables(mem).map_err(VcpuError::Memory)?;
            sregs.cr3 = BOOT_PML4;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            kvm_regs { rip, rsi: ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
        Entry::Pvh(rip) => {
            sregs.cr0 = CR0_PE | CR0_ET;
            kvm_regs { rip, rbx: PVH_START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
    };
    vcpu.set_sregs(&sregs).map_err(failed("setting its system registers"))?;
    vcpu.set_regs(&regs).map_err(failed("setting its registers"))
}

/// Model-specific registers as firmware would leave them, on every processor.
///
/// # Errors
/// When KVM refuses.
pub fn set_firmware_msrs(vcpu: &VcpuFd, id: u8) -> Result<(), VcpuError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ])
    .map_err(|_| VcpuError::Cpuid { id })?;
    let set = vcpu.set_msrs(&msrs).map_err(|source| VcpuError::Kvm { id, what: "setting MSRs", source })?;
    if set == msrs.as_slice().len() {
        return Ok(());
    }
    Err(VcpuError::Kvm { id, what: "setting MSRs", source: kvm_ioctls::Error::new(libc::EINVAL) })
}

/// Enables all of `states` for XSAVE, on every processor.
///
/// Where XSETBV does not reach KVM (QEMU's emulation of SVM lets a nested guest execute it), KVM would go on
/// to run the guest without the states that it has enabled, and CPUID would tell it the wrong size for them.
///
/// # Errors
/// When KVM refuses.
pub fn enable_states(vcpu: &VcpuFd, id: u8, states: u64) -> Result<(), VcpuError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: states };
    vcpu.set_xcrs(&xcrs).map_err(|source| VcpuError::Kvm { id, what: "enabling its states", source })
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// A flat segment's descriptor (Intel SDM volume 3, 3.4.5). Bases are zero and limits all ones.
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_) | (u64::from(segment.s) << 4) | (u64::from(segment.present) << 7);
    let flags = (u64::from(segment.l) << 1) | (u64::from(segment.db) << 2) | (u64::from(segment.g) << 3);
    0xffff | (access << 40) | (0xf << 48) | (flags << 52)
}

fn write_gdt(mem: &GuestMemoryMmap<()>, sregs: &mut kvm_sregs, entry: Entry) -> Result<(), GuestMemoryError> {
    let long = matches!(entry, Entry::Linux(_));
    let code = segment(BOOT_CS, CODE, long);
    let data = segment(BOOT_DS, DATA, false);
    let gdt = [0, 0, descriptor(&code), descriptor(&data)];
    mem.write_obj(gdt, GuestAddress(BOOT_GDT))?;
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    Ok(())
}

/// Maps the first GiB to itself, in pages of 2 MiB.
fn write_page_tables(mem: &GuestMemoryMmap<()>) -> Result<(), GuestMemoryError> {
    let pdpt = BOOT_PML4 + PAGE_SIZE;
    let pd = pdpt + PAGE_SIZE;
    mem.write_obj(pdpt | PAGE_PRESENT | PAGE_WRITABLE, GuestAddress(BOOT_PML4))?;
    mem.write_obj(pd | PAGE_PRESENT | PAGE_WRITABLE, GuestAddress(pdpt))?;
    let mut entries = [0u8; 4096];
    for (slot, page) in entries.chunks_exact_mut(8).zip(0u64..) {
        slot.copy_from_slice(&((page << 21) | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE).to_le_bytes());
    }
    mem.write_slice(&entries, GuestAddress(pd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_manual_says() {
        assert_eq!(descriptor(&segment(BOOT_CS, CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(BOOT_CS, CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(BOOT_DS, DATA, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn page_tables_map_addresses_to_themselves() {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&mem).unwrap();
        let entry =
            |table: u64, index: u64| -> u64 { mem.read_obj(GuestAddress(table + index * 8)).unwrap() };
        let pdpt = entry(BOOT_PML4, 0) & !0xfff;
        let pd = entry(pdpt, 0) & !0xfff;
        for index in [0, 1, 511] {
            assert_eq!(entry(pd, index), (index << 21) | 0x83);
        }
    }
}
