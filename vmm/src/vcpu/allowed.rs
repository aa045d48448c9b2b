//! What a guest may be told by CPUID, leaf by leaf and bit by bit. What is not in the table does not exist.
//!
//! KVM says what it could emulate on this host, which grows with each kernel and includes what no pod needs:
//! nested virtualization, performance counters, enclaves, power management. The table names instead what a Linux
//! guest uses and a snapshot saves. It holds for a processor at boot and for one from a state file alike.

use std::ops::RangeInclusive;

use kvm_bindings::kvm_cpuid_entry2;

/// Every bit: the register holds numbers rather than features, or the machine writes it itself.
const ALL: u32 = u32::MAX;
/// Leaves without sub-leaves.
const NO_INDEX: RangeInclusive<u32> = 0..=0;
/// The highest sub-leaf of leaf 7.
const MAX_FEATURE_INDEX: u32 = 2;
/// States that XSAVE may save: x87, SSE, AVX, the three of AVX-512, protection keys. Not MPX, AMX, CET.
const XSAVE_STATES: u32 = bits(&[0, 1, 2, 5, 6, 7, 9]);

/// Some sub-leaves of a leaf, and which bits of their registers pass.
struct Leaf {
    function: u32,
    indices: RangeInclusive<u32>,
    /// EAX, EBX, ECX, EDX.
    masks: [u32; 4],
}

const fn leaf(function: u32, masks: [u32; 4]) -> Leaf {
    Leaf { function, indices: NO_INDEX, masks }
}

const fn indexed(function: u32, indices: RangeInclusive<u32>, masks: [u32; 4]) -> Leaf {
    Leaf { function, indices, masks }
}

/// A mask of these bits.
const fn bits(mut numbers: &[u32]) -> u32 {
    let mut mask = 0;
    while let [number, rest @ ..] = numbers {
        mask |= 1 << *number;
        numbers = rest;
    }
    mask
}

const TABLE: &[Leaf] = &[
    // The vendor, by which a guest picks its errata and mitigations; the highest leaf is cut to what is here.
    leaf(0, [ALL, ALL, ALL, ALL]),
    // The model, for the same; EBX is written by the machine.
    leaf(1, [ALL, ALL, BASIC_ECX, BASIC_EDX]),
    // Caches and TLBs, by which memory functions size their steps. (Leaf 3 is a serial number.)
    leaf(2, [ALL, ALL, ALL, ALL]),
    indexed(4, 0..=7, [ALL, ALL, ALL, 0b111]),
    // Of power management no more than that the timer runs in every state: without that, Linux would not use it.
    leaf(6, [bits(&[2]), 0, 0, 0]),
    indexed(7, 0..=0, [ALL, FEATURES_EBX, FEATURES_ECX, FEATURES_EDX]),
    indexed(7, 1..=1, [MORE_FEATURES_EAX, 0, 0, MORE_FEATURES_EDX]),
    // How speculation can be held back: PSFD, IPRED, RRSBA, DDPD, BHI; MCDT_NO.
    indexed(7, 2..=2, [0, 0, 0, bits(&[0, 1, 2, 3, 4, 5])]),
    // Topology, written by the machine.
    indexed(0xb, 0..=2, [0x1f, 0xffff, 0xffff, ALL]),
    // XSAVE: the states, then XSAVEOPT, XSAVEC, XGETBV with ECX=1, XSAVES (no supervisor states, no XFD), then
    // where each state is.
    indexed(0xd, 0..=0, [XSAVE_STATES, ALL, ALL, 0]),
    indexed(0xd, 1..=1, [bits(&[0, 1, 2, 3]), ALL, 0, 0]),
    indexed(0xd, 2..=2, [ALL, ALL, 0b11, 0]),
    indexed(0xd, 5..=7, [ALL, ALL, 0b11, 0]),
    indexed(0xd, 9..=9, [ALL, ALL, 0b11, 0]),
    // Topology, written by the machine.
    indexed(0x1f, 0..=2, [0x1f, 0xffff, 0xffff, ALL]),
    // KVM's name; the highest leaf is cut to the next one.
    leaf(0x4000_0000, [ALL, ALL, ALL, ALL]),
    leaf(0x4000_0001, [PARAVIRTUAL, 0, 0, 0]),
    // AMD's vendor once more; the highest leaf is cut.
    leaf(0x8000_0000, [ALL, ALL, ALL, ALL]),
    leaf(0x8000_0001, [ALL, ALL, EXTENDED_ECX, EXTENDED_EDX]),
    // The model's name.
    leaf(0x8000_0002, [ALL, ALL, ALL, ALL]),
    leaf(0x8000_0003, [ALL, ALL, ALL, ALL]),
    leaf(0x8000_0004, [ALL, ALL, ALL, ALL]),
    // Caches and TLBs.
    leaf(0x8000_0005, [ALL, ALL, ALL, ALL]),
    leaf(0x8000_0006, [ALL, ALL, ALL, ALL]),
    // An invariant TSC, which makes it a clock; nothing of power and thermal management.
    leaf(0x8000_0007, [0, 0, 0, bits(&[8])]),
    // Address widths, CPU mitigations; ECX is written by the machine, without the size of a counter.
    leaf(0x8000_0008, [0x00ff_ffff, WIDTHS_EBX, 0xf0ff, 0]),
    // (0x8000_000a is SVM.) TLBs for pages of 1 GiB.
    leaf(0x8000_0019, [ALL, ALL, 0, 0]),
    // How fast wide SSE and AVX are: FP128, MOVU, FP256.
    leaf(0x8000_001a, [bits(&[0, 1, 2]), 0, 0, 0]),
    // (0x8000_001b is IBS, 0x8000_001c LWP.) Caches.
    indexed(0x8000_001d, 0..=7, [ALL, ALL, ALL, 0b11]),
    // Topology, written by the machine.
    leaf(0x8000_001e, [ALL, 0xffff, 0, 0]),
    // (0x8000_001f is SEV, 0x8000_0022 counters.)
    leaf(0x8000_0021, [EXTENDED2_EAX, 0, bits(&[1, 2]), 0]), // TSA_SQ_NO, TSA_L1_NO
];

/// Leaf 1 ECX. Without DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, SDBG, xTPR, PDCM, DCA.
const BASIC_ECX: u32 = bits(&[
    0, 9, 19, 20, // SSE3, SSSE3, SSE4.1, SSE4.2
    1, 25, // PCLMULQDQ, AES
    12, 28, 29, // FMA, AVX, F16C
    13, 22, 23, // CMPXCHG16B, MOVBE, POPCNT
    17, // PCID: cheap switches of address spaces
    21, 24, // x2APIC, TSC deadline: interrupts and timers with the fewest exits
    26, 27, // XSAVE; OSXSAVE, which KVM keeps like CR4
    30, // RDRAND
    31, // a hypervisor is there
]);

/// Leaf 1 EDX. Without PSN, DS, ACPI, TM, PBE.
const BASIC_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 8, // FPU, VME, DE, PSE, TSC, MSR, PAE, CMPXCHG8B
    7, 14, // MCE, MCA: Linux sets them up on each processor of this age
    9, 11, 12, 13, // APIC, SYSENTER, MTRR, PGE
    15, 16, 17, 19, // CMOV, PAT, PSE-36, CLFLUSH
    23, 24, 25, 26, // MMX, FXSR, SSE, SSE2
    27, 28, // self snoop, HTT
]);

/// Leaf 7 EBX. Without SGX, TSX (HLE, RTM: a side channel), RDT, MPX, processor trace, Xeon Phi's AVX-512.
const FEATURES_EBX: u32 = bits(&[
    0, 1, // FSGSBASE, TSC_ADJUST
    3, 8, 19, // BMI1, BMI2, ADX
    5, 16, 17, 21, 28, 30, 31, // AVX2; AVX-512 F, DQ, IFMA, CD, BW, VL
    6, 13, // what became of x87's pointers
    7, 20, // SMEP, SMAP
    9, 10, // ERMS, INVPCID
    18, 29, // RDSEED, SHA
    23, 24, // CLFLUSHOPT, CLWB
]);

/// Leaf 7 ECX. Without WAITPKG (idles on the host's processor), shadow stacks (their state is not saved), TME, bus
/// lock traps, key locker, ENQCMD, SGX, PKS.
const FEATURES_ECX: u32 = bits(&[
    1, 6, 11, 12, 14, // AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    2,  // UMIP
    3, 4, // protection keys; OSPKE, which KVM keeps like CR4
    8, 9, 10, // GFNI, VAES, VPCLMULQDQ
    16, // LA57
    22, // RDPID
    25, 27, 28, // CLDEMOTE, MOVDIRI, MOVDIR64B
]);

/// Leaf 7 EDX. Without user interrupts, TSX, hybrid, PCONFIG, LBR, IBT, AMX, core capabilities.
const FEATURES_EDX: u32 = bits(&[
    4, 8, 14, 23, // FSRM, VP2INTERSECT, SERIALIZE, AVX-512 FP16
    10, 26, 27, 28, 29, 31, // MD_CLEAR, IBRS and IBPB, STIBP, L1D flush, ARCH_CAPABILITIES, SSBD
]);

/// Leaf 7, 1 EAX. Without FRED, LKGS, HRESET, AMX, LAM.
const MORE_FEATURES_EAX: u32 = bits(&[
    0, 1, 2, // SHA512, SM3, SM4
    4, 5, 23, // AVX-VNNI, AVX-512 BF16, AVX-IFMA
    7,  // CMPccXADD
    10, 11, 12, // fast short string operations
]);

/// Leaf 7, 1 EDX. Without AMX, user-space MSR writes, AVX10.
const MORE_FEATURES_EDX: u32 = bits(&[4, 5, 10, 14]); // AVX-VNNI-INT8, AVX-NE-CONVERT, -INT16, PREFETCHI

/// Leaf 0x4000_0001 EAX: those that save exits or time. Without the obsolete MMU operations, page faults that are
/// delivered as nested exits, wide MSI destinations (there is no MSI), and those of encrypted guests.
const PARAVIRTUAL: u32 = bits(&[
    0, 3, 24, // clocks
    1,  // no delay after port I/O
    4, 14, // asynchronous page faults, by interrupt
    5,  // steal time
    6, 7, 9, 11, 13, // end of interrupt, unhalt, TLB flush, IPIs, yield to a processor
    12, // polling by the host when the guest idles
]);

/// Leaf 0x8000_0001 ECX. Without SVM, extended APIC space, IBS, SKINIT, watchdog, LWP, TCE, counters, data breakpoint
/// extensions, MONITORX.
const EXTENDED_ECX: u32 = bits(&[
    0, 1, 4, // LAHF, cores rather than threads, CR8 in 32-bit mode
    5, 6, 7, 8, // LZCNT, SSE4A, misaligned SSE, PREFETCHW
    9, // OSVW: which errata are worked around
    11, 16, 21, // XOP, FMA4, TBM
    22, // the topology leaves
]);

/// Leaf 0x8000_0001 EDX: as in leaf 1; SYSCALL, NX, MMX extensions, FXSR, pages of 1 GiB, RDTSCP, long mode.
const EXTENDED_EDX: u32 =
    bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29]);

/// Leaf 0x8000_0008 EBX. Without IRPERF, RDPRU, MCOMMIT (counters), CPPC.
const WIDTHS_EBX: u32 = bits(&[
    0, 2, 9, // CLZERO, XSAVEERPTR, WBNOINVD
    12, 14, 15, 16, 17, 18, // IBPB, IBRS, STIBP, and whether they are best left on
    24, 25, 26, 28, // SSBD, by a virtual MSR too, or not needed; PSFD
    29, 30, // BTC_NO, IBPB clears return predictions
]);

/// Leaf 0x8000_0021 EAX. Without SMM's, user CPUID faulting, and prefetch control.
const EXTENDED2_EAX: u32 = bits(&[
    0, 1, 2, 6, // data breakpoints, FS and GS base writes, LFENCE, null selectors: how they behave
    5, 8, 27, 28, 29,
    30, // VERW clears, automatic IBRS, SBPB, IBPB for branch types, SRSO_NO and for user space
    10, 11, // fast short string operations
]);

/// What of `entries` a guest may be told.
pub(crate) fn only_allowed(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut allowed: Vec<_> = entries.iter().filter_map(mask).collect();
    let highest = |base: u32| {
        let of_range = allowed.iter().map(|entry| entry.function).filter(|leaf| leaf >> 28 == base >> 28);
        of_range.max().unwrap_or(base)
    };
    let limits = [0, 0x4000_0000, 0x8000_0000].map(|base| (base, highest(base)));
    for entry in &mut allowed {
        if let Some((_, highest)) = limits.iter().find(|(base, _)| *base == entry.function) {
            entry.eax = entry.eax.min(*highest);
        }
        if (entry.function, entry.index) == (7, 0) {
            entry.eax = entry.eax.min(MAX_FEATURE_INDEX);
        }
    }
    allowed
}

/// The bits of an entry that pass, or `None` for one that is not in the table.
fn mask(entry: &kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    let row =
        TABLE.iter().find(|row| row.function == entry.function && row.indices.contains(&entry.index))?;
    let [eax, ebx, ecx, edx] = row.masks;
    Some(kvm_cpuid_entry2 {
        eax: entry.eax & eax,
        ebx: entry.ebx & ebx,
        ecx: entry.ecx & ecx,
        edx: entry.edx & edx,
        ..*entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL, ..Default::default() }
    }

    /// All leaves near the ranges, each with all its bits.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        let leaves = (0..0x40).chain(0x4000_0000..0x4000_0110).chain(0x8000_0000..0x8000_0040);
        let leaves = leaves.chain(0xc000_0000..0xc000_0008);
        leaves.flat_map(|leaf| (0..64).map(move |index| all_ones(leaf, index))).collect()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn cpuid_leaves_that_are_not_listed_vanish() {
        let mut leaves: Vec<_> = only_allowed(&everything()).iter().map(|entry| entry.function).collect();
        leaves.dedup();
        let basic = [0, 1, 2, 4, 6, 7, 0xb, 0xd, 0x1f, 0x4000_0000, 0x4000_0001];
        let extended =
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x19, 0x1a, 0x1d, 0x1e, 0x21].map(|leaf| 0x8000_0000 + leaf);
        assert_eq!(leaves, basic.into_iter().chain(extended).collect::<Vec<_>>());
    }

    /// The literals are the manuals' bits, written apart from the table.
    #[test]
    fn cpuid_offers_no_feature_that_is_not_listed() {
        let allowed = only_allowed(&everything());
        let features = |function, index| {
            let entry = find(&allowed, function, index);
            (entry.eax, entry.ebx, entry.ecx, entry.edx)
        };
        let (_, _, ecx, edx) = features(1, 0);
        assert_eq!((ecx, edx), (0xfffa_3203, 0x1f8b_fbff));
        assert_eq!(features(6, 0), (1 << 2, 0, 0, 0));
        assert_eq!(features(7, 0), (2, 0xf1bf_27eb, 0x1a41_5f5e, 0xbc80_4510));
        assert_eq!(features(0xd, 0).0, 0x2e7);
        assert_eq!(features(0xd, 1), (0xf, ALL, 0, 0));
        assert_eq!(features(0x4000_0001, 0), (0x0100_7afb, 0, 0, 0));
        let (_, _, ecx, edx) = features(0x8000_0001, 0);
        assert_eq!((ecx, edx), (0x0061_0bf3, 0x2fd3_fbff));
        assert_eq!(features(0x8000_0007, 0), (0, 0, 0, 1 << 8));
        assert_eq!(features(0x8000_0008, 0).1, 0x7707_d205);
        assert_eq!(features(0x8000_0021, 0), (0x7800_0d67, 0, 6, 0));
    }

    #[test]
    fn cpuid_offers_neither_nesting_nor_counters_nor_enclaves() {
        let allowed = only_allowed(&everything());
        let absent = |bit: u32, register: u32| assert_eq!(register & (1 << bit), 0, "bit {bit}");
        absent(5, find(&allowed, 1, 0).ecx); // VMX
        absent(15, find(&allowed, 1, 0).ecx); // PDCM
        absent(2, find(&allowed, 7, 0).ebx); // SGX
        absent(2, find(&allowed, 0x8000_0001, 0).ecx); // SVM
        absent(23, find(&allowed, 0x8000_0001, 0).ecx); // PERFCTR_CORE
        for leaf in [5, 0xa, 0x12, 0x14, 0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022] {
            assert!(allowed.iter().all(|entry| entry.function != leaf), "{leaf:#x}");
        }
    }

    #[test]
    fn cpuid_names_no_leaf_beyond_the_last_one() {
        let allowed = only_allowed(&everything());
        for (base, last) in [(0, 0x1f), (0x4000_0000, 0x4000_0001), (0x8000_0000, 0x8000_0021)] {
            assert_eq!(find(&allowed, base, 0).eax, last);
        }
        // One that the host does not have is not made up.
        let few = only_allowed(&[all_ones(0, 0), all_ones(1, 0)]);
        assert_eq!(find(&few, 0, 0).eax, 1);
    }

    #[test]
    fn cpuid_places_every_xsave_state_that_it_offers() {
        let allowed = only_allowed(&everything());
        for state in 2..32 {
            let placed = allowed.iter().any(|entry| (entry.function, entry.index) == (0xd, state));
            assert_eq!(placed, XSAVE_STATES & (1 << state) != 0, "state {state}");
        }
    }

    #[test]
    fn cpuid_keeps_what_the_levels_of_x86_64_take() {
        let allowed = only_allowed(&everything());
        let has = |register: u32, wanted: &[u32]| assert_eq!(register & bits(wanted), bits(wanted));
        // v2 and v3: SSE3 to SSE4.2, CX16, POPCNT, FMA, MOVBE, OSXSAVE, AVX, F16C; LAHF, LZCNT; AVX2, BMI. v4: AVX-512.
        has(find(&allowed, 1, 0).ecx, &[0, 9, 12, 13, 19, 20, 22, 23, 26, 27, 28, 29]);
        has(find(&allowed, 0x8000_0001, 0).ecx, &[0, 5]);
        has(find(&allowed, 7, 0).ebx, &[3, 5, 8, 16, 17, 28, 30, 31]);
    }
}
