//! The MSRs that a snapshot saves, and the only ones that a state file may set.
//!
//! KVM lists all that it could save on this host, among them those of nested virtualization
//! (IA32_FEATURE_CONTROL, the VMX capabilities, SVM's), of performance counters and of debugging. A guest has none of
//! those by CPUID, and gets none by a state file.

use std::ops::RangeInclusive;

/// Ranges of MSRs, each with why a guest needs it back.
const TABLE: &[RangeInclusive<u32>] = &[
    0x10..=0x12,               // TSC; KVM's clock by its old numbers
    0x3b..=0x3b,               // TSC_ADJUST
    0x48..=0x48,               // SPEC_CTRL: what the guest mitigates
    0x8b..=0x8b,               // the microcode's revision, which the guest has judged its mitigations by
    0xce..=0xce,               // PLATFORM_INFO: whether CPUID can fault
    0x10a..=0x10a,             // ARCH_CAPABILITIES, likewise judged
    0x122..=0x122,             // TSX_CTRL: turned off
    0x140..=0x140,             // MISC_FEATURES_ENABLES: CPUID faults
    0x174..=0x176,             // SYSENTER
    0x17a..=0x17b,             // MCG_STATUS, MCG_CTL
    0x1a0..=0x1a0,             // MISC_ENABLE
    0x200..=0x21f,             // variable MTRRs
    0x250..=0x250,             // fixed MTRRs
    0x258..=0x259,             //
    0x268..=0x26f,             //
    0x277..=0x277,             // PAT
    0x2ff..=0x2ff,             // the default memory type
    0x6e0..=0x6e0,             // TSC_DEADLINE
    0x4b56_4d00..=0x4b56_4d07, // KVM's clock, steal time, asynchronous page faults, end of interrupt, polling
    0xc000_0081..=0xc000_0084, // SYSCALL: STAR, LSTAR, CSTAR, its mask
    0xc000_0102..=0xc000_0103, // KERNEL_GS_BASE, TSC_AUX
    0xc001_0015..=0xc001_0015, // HWCR
    0xc001_011f..=0xc001_011f, // VIRT_SPEC_CTRL
    0xc001_1029..=0xc001_1029, // DE_CFG: whether LFENCE serializes
];

/// Whether a snapshot may hold an MSR.
pub(crate) fn is_allowed(index: u32) -> bool {
    TABLE.iter().any(|range| range.contains(&index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_of_nesting_counters_and_debugging_are_not_allowed() {
        let ranges = [
            0x3a..=0x3a,               // FEATURE_CONTROL
            0x8c..=0x8f,               // SGX
            0xc1..=0xc8,               // counters
            0x186..=0x18d,             // their events
            0x1d9..=0x1d9,             // DEBUGCTL
            0x309..=0x30c,             // fixed counters
            0x345..=0x345,             // PERF_CAPABILITIES
            0x38d..=0x390,             // their control
            0x480..=0x491,             // VMX
            0x570..=0x587,             // processor trace
            0x4000_0000..=0x4000_01ff, // Hyper-V
            0x4b56_4d08..=0x4b56_4d08, // migration of encrypted guests
            0xc000_0080..=0xc000_0080, // EFER, which is a system register
            0xc000_0104..=0xc000_0104, // SVM's TSC ratio
            0xc000_0300..=0xc000_0302, // counters
            0xc001_0000..=0xc001_0007, //
            0xc001_0114..=0xc001_0117, // VM_CR, SVM's host save area
            0xc001_0200..=0xc001_020b, // counters
        ];
        for index in ranges.into_iter().flatten() {
            assert!(!is_allowed(index), "{index:#x}");
        }
    }

    #[test]
    fn msrs_that_a_running_guest_depends_on_are_allowed() {
        for index in [0x10, 0x3b, 0x48, 0x174, 0x277, 0x6e0, 0x4b56_4d01, 0xc000_0082, 0xc000_0102] {
            assert!(is_allowed(index), "{index:#x}");
        }
    }
}
