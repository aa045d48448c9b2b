//! CPUID: what KVM offers on this host and the table of `allowed` lets pass, adjusted to the machine's own topology.
//!
//! Every vCPU is a core of its own with one thread, and all cores share one package.

use std::{arch::x86_64::__cpuid, fmt};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::allowed::only_allowed;

/// Leaf 1 ECX: the TSC-deadline timer, which KVM emulates but does not report.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package may hold more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX (AMD): the logical processors of a package are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 1 ECX: XSAVE and its kin.
const XSAVE: u32 = 1 << 26;
/// `CLFLUSH` line size in units of 8 bytes, as leaf 1 EBX has it.
const CLFLUSH_UNITS: u32 = 8;
/// Leaf 0xb and 0x1f ECX level types.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A processor model: its vendor, and family, model and stepping as leaf 1 has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    vendor: [u32; 3],
    signature: u32,
}

impl CpuModel {
    /// The model of this host.
    #[must_use]
    pub fn of_host() -> Self {
        let (vendor, leaf) = (__cpuid(0), __cpuid(1));
        Self { vendor: [vendor.ebx, vendor.edx, vendor.ecx], signature: leaf.eax }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vendor: Vec<u8> = self.vendor.iter().flat_map(|word| word.to_le_bytes()).collect();
        write!(f, "{} {:#x}", String::from_utf8_lossy(&vendor), self.signature)
    }
}

/// What every processor of the machine has in common.
#[derive(Clone)]
pub struct CpuTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl CpuTemplate {
    /// What this host's KVM supports and a guest may see.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn of_host(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self {
            entries: only_allowed(supported.as_slice()),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// What a processor that was saved had, as far as a guest may see it.
    #[must_use]
    pub fn of_saved(entries: &[kvm_cpuid_entry2]) -> Self {
        // Whoever made it has added the timer to its leaf 1.
        Self { entries: only_allowed(entries), tsc_deadline: false }
    }

    /// All states that XSAVE can save here, as XCR0 names them; `None` without XSAVE.
    #[must_use]
    pub fn xsave_states(&self) -> Option<u64> {
        let find =
            |function| self.entries.iter().find(|entry| entry.function == function && entry.index == 0);
        find(1).filter(|leaf| leaf.ecx & XSAVE != 0)?;
        find(0xd)
            .map(|leaf| u64::from(leaf.eax) | (u64::from(leaf.edx) << 32))
            .filter(|states| states & 1 != 0)
    }

    /// The CPUID table of processor `id` of `count`.
    ///
    /// # Errors
    /// When the table has more entries than KVM takes.
    pub fn for_vcpu(&self, id: u8, count: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let topology = Topology::new(id, count);
        let mut entries: Vec<_> = self
            .entries
            .iter()
            // Topology leaves are written afresh: the host's say where the host's processors sit.
            .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
            .copied()
            .collect();
        for entry in &mut entries {
            topology.adjust(entry);
            if entry.function == 1 && self.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        for function in [0xb, 0x1f] {
            if self.entries.iter().any(|entry| entry.function == function) {
                entries.extend(topology.levels(function));
            }
        }
        CpuId::from_entries(&entries)
    }
}

/// Where one processor sits.
struct Topology {
    id: u32,
    count: u32,
    /// Bits of an APIC id that number the cores of a package.
    core_bits: u32,
}

impl Topology {
    fn new(id: u8, count: u8) -> Self {
        let count = u32::from(count.max(1));
        Self { id: u32::from(id), count, core_bits: count.next_power_of_two().trailing_zeros() }
    }

    /// The highest core number that the bits can hold: several leaves want it rather than the true count.
    fn max_core(&self) -> u32 {
        (1 << self.core_bits) - 1
    }

    fn adjust(&self, entry: &mut kvm_cpuid_entry2) {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xff)
                    | (CLFLUSH_UNITS << 8)
                    | ((self.max_core() + 1).min(255) << 16)
                    | (self.id << 24);
                entry.ecx |= HYPERVISOR;
                entry.edx = with_bit(entry.edx, HTT, self.count > 1);
            }
            4 => self.intel_cache(entry),
            0x8000_0001 => entry.ecx = with_bit(entry.ecx, CMP_LEGACY, self.count > 1),
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (self.core_bits << 12) | (self.count - 1);
            }
            0x8000_001d => entry.eax = (entry.eax & !(0xfff << 14)) | (self.sharing(entry.eax) << 14),
            // Extended APIC id; core id with one thread; node 0 of 1.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (self.id, self.id & 0xff, 0),
            _ => {}
        }
    }

    /// Leaf 4: deterministic cache parameters.
    fn intel_cache(&self, entry: &mut kvm_cpuid_entry2) {
        if entry.eax & 0x1f == 0 {
            return;
        }
        let sharing = self.sharing(entry.eax);
        entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (self.max_core().min(63) << 26);
    }

    /// One less than the processors that share a cache of the level in `eax`: the third level belongs to the
    /// package, the others to their core.
    fn sharing(&self, eax: u32) -> u32 {
        let level = (eax >> 5) & 7;
        if level >= 3 { self.max_core() } else { 0 }
    }

    /// Leaf 0xb or 0x1f: extended topology, a level of one thread and one of all cores, then the end.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: index | (kind << 8),
            edx: self.id,
            ..Default::default()
        };
        [level(0, 0, 1, LEVEL_SMT), level(1, self.core_bits, self.count, LEVEL_CORE), level(2, 0, 0, 0)]
    }
}

fn with_bit(value: u32, bit: u32, on: bool) -> u32 {
    if on { value | bit } else { value & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(functions: &[u32]) -> CpuTemplate {
        let entries =
            functions.iter().map(|&function| kvm_cpuid_entry2 { function, ..Default::default() }).collect();
        CpuTemplate { entries, tsc_deadline: true }
    }

    fn find(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_every_leaf_that_has_one() {
        let template = template(&[0, 1, 0xb, 0x1f, 0x8000_001e]);
        for id in 0..6 {
            let table = template.for_vcpu(id, 6).unwrap();
            let id = u32::from(id);
            assert_eq!(find(&table, 1, 0).ebx >> 24, id);
            assert_eq!(find(&table, 0xb, 0).edx, id);
            assert_eq!(find(&table, 0xb, 1).edx, id);
            assert_eq!(find(&table, 0x1f, 1).edx, id);
            assert_eq!(find(&table, 0x8000_001e, 0).eax, id);
        }
    }

    #[test]
    fn cores_are_counted_in_ids_that_bits_can_hold() {
        let table = template(&[1, 0xb, 0x8000_0008]).for_vcpu(0, 6).unwrap();
        assert_eq!((find(&table, 1, 0).ebx >> 16) & 0xff, 8);
        assert_eq!(find(&table, 0xb, 1).eax, 3);
        assert_eq!(find(&table, 0xb, 1).ebx, 6);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, (3 << 12) | 5);
    }

    #[test]
    fn a_single_processor_is_no_multiprocessor() {
        let table = template(&[1, 0x8000_0001]).for_vcpu(0, 1).unwrap();
        assert_eq!(find(&table, 1, 0).edx & HTT, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx & CMP_LEGACY, 0);
        assert_ne!(find(&table, 1, 0).ecx & HYPERVISOR, 0);
        assert_ne!(find(&table, 1, 0).ecx & TSC_DEADLINE, 0);
    }

    #[test]
    fn a_processor_like_a_saved_one_differs_only_by_where_it_sits() {
        let template = template(&[0, 1, 0xb, 0xd, 0x4000_0001, 0x8000_001e]);
        let saved = template.for_vcpu(0, 4).unwrap();
        let like_saved = CpuTemplate::of_saved(saved.as_slice());
        for id in 0..4 {
            let (expected, got) = (template.for_vcpu(id, 4).unwrap(), like_saved.for_vcpu(id, 4).unwrap());
            assert_eq!(expected.as_slice(), got.as_slice());
        }
    }

    #[test]
    fn states_are_told_where_there_is_xsave() {
        let mut template = template(&[1, 0xd]);
        (template.entries[1].eax, template.entries[1].edx) = (7, 1);
        assert_eq!(template.xsave_states(), None);
        template.entries[0].ecx = XSAVE;
        assert_eq!(template.xsave_states(), Some((1 << 32) | 7));
    }

    /// A state file may come from a program that filtered less.
    #[test]
    fn a_processor_like_a_saved_one_has_no_more_than_a_new_one() {
        let saved = kvm_cpuid_entry2 { function: 0x8000_0001, ecx: u32::MAX, ..Default::default() };
        let counters = kvm_cpuid_entry2 { function: 0xa, eax: u32::MAX, ..Default::default() };
        let table = CpuTemplate::of_saved(&[saved, counters]).for_vcpu(0, 1).unwrap();
        assert_eq!(table.as_slice().len(), 1);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx & (1 << 2), 0, "SVM");
    }

    #[test]
    fn paravirtual_leaves_pass_unchanged_and_topology_leaves_are_not_invented() {
        let mut template = template(&[0x4000_0001]);
        template.entries[0].eax = 0x0100_7afb;
        let table = template.for_vcpu(3, 4).unwrap();
        assert_eq!(find(&table, 0x4000_0001, 0).eax, 0x0100_7afb);
        assert_eq!(table.as_slice().len(), 1);
    }

    #[test]
    fn the_last_level_cache_is_shared_and_the_others_are_not() {
        let mut template = template(&[4, 4]);
        template.entries[0].eax = 1 | (1 << 5);
        (template.entries[1].index, template.entries[1].eax) = (3, 3 | (3 << 5));
        let table = template.for_vcpu(0, 4).unwrap();
        assert_eq!((find(&table, 4, 0).eax >> 14) & 0xfff, 0);
        assert_eq!((find(&table, 4, 3).eax >> 14) & 0xfff, 3);
    }
}
