//! The model-specific registers that a snapshot holds: an allow-list, the same when it is saved and when it is restored.
//!
//! KVM lists more, and grows the list with every kernel: those of nested virtualization, performance counters, tracing
//! and power management are no part of a guest that is offered none of it (see [`super::allowed_cpuid`]), and whoever
//! could write a state file must not reach them.
//!
//! Sources: Intel SDM volume 4; AMD APM volume 2, appendix A; the kernel's Documentation/virt/kvm/x86/msr.rst.

use std::ops::RangeInclusive;

const ALLOWED: &[RangeInclusive<u32>] = &[
    0x10..=0x10,               // TSC
    0x11..=0x12,               // KVM's clock, by its first numbers
    0x1b..=0x1b,               // APIC_BASE
    0x3b..=0x3b,               // TSC_ADJUST
    0x48..=0x48,               // SPEC_CTRL: mitigations
    0x8b..=0x8b,               // UCODE_REV: guests choose mitigations by it
    0xce..=0xce,               // PLATFORM_INFO: whether CPUID can fault
    0x10a..=0x10a,             // ARCH_CAPABILITIES: which mitigations are needed
    0x122..=0x122,             // TSX_CTRL
    0x140..=0x140,             // MISC_FEATURES_ENABLES: whether CPUID faults
    0x174..=0x176,             // SYSENTER
    0x179..=0x17b,             // MCG_CAP, MCG_STATUS, MCG_CTL: machine checks
    0x1a0..=0x1a0,             // MISC_ENABLE
    0x200..=0x21f,             // variable MTRRs
    0x250..=0x250,             // fixed MTRRs
    0x258..=0x259,             //
    0x268..=0x26f,             //
    0x277..=0x277,             // PAT
    0x2ff..=0x2ff,             // MTRR_DEF_TYPE
    0x400..=0x47f,             // banks of machine checks
    0x6e0..=0x6e0,             // TSC_DEADLINE
    0x4b56_4d00..=0x4b56_4d07, // KVM's: clock, asynchronous page faults, steal time, end of interrupt, polling
    0xc000_0080..=0xc000_0084, // EFER, STAR, LSTAR, CSTAR, SFMASK
    0xc000_0100..=0xc000_0103, // FS, GS and the kernel's GS base, TSC_AUX
    0xc001_0015..=0xc001_0015, // HWCR
    0xc001_011f..=0xc001_011f, // VIRT_SPEC_CTRL: mitigations
    0xc001_0140..=0xc001_0141, // OSVW: errata that are worked around
    0xc001_1029..=0xc001_1029, // DE_CFG: whether LFENCE serializes
];

/// Whether a snapshot may hold this register.
pub(crate) fn is_allowed(index: u32) -> bool {
    ALLOWED.iter().any(|range| range.contains(&index))
}

/// KVM's own registers, which it does not list.
pub(crate) const KVM_CUSTOM: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_of_nested_virtualization_counters_and_tracing_are_not_allowed() {
        for (index, what) in [
            (0x34, "SMI_COUNT"),
            (0x3a, "FEATURE_CONTROL"),
            (0x9e, "SMBASE"),
            (0xc1, "PMC0"),
            (0x186, "PERFEVTSEL0"),
            (0x1c4, "XFD"),
            (0x1d9, "DEBUGCTL"),
            (0x309, "FIXED_CTR0"),
            (0x345, "PERF_CAPABILITIES"),
            (0x38f, "PERF_GLOBAL_CTRL"),
            (0x480, "VMX_BASIC"),
            (0x491, "VMX_VMFUNC"),
            (0x570, "RTIT_CTL"),
            (0xda0, "XSS"),
            (0x4000_0000, "Hyper-V"),
            (0x4b56_4d08, "KVM's migration control"),
            (0xc000_0104, "TSC_RATIO"),
            (0xc001_0114, "VM_CR"),
            (0xc001_0117, "VM_HSAVE_PA"),
            (0xc001_0200, "PERF_CTL0"),
        ] {
            assert!(!is_allowed(index), "{what}");
        }
    }

    #[test]
    fn msrs_that_a_guest_runs_by_are_allowed() {
        for index in [0x10, 0x1b, 0x48, 0x174, 0x277, 0x2ff, 0x6e0, 0x4b56_4d01, 0xc000_0080, 0xc000_0102] {
            assert!(is_allowed(index), "{index:#x}");
        }
    }

    #[test]
    fn msrs_are_listed_in_order() {
        assert!(ALLOWED.windows(2).all(|pair| pair[0].end() < pair[1].start()));
    }
}
