//! The CPUID leaves and bits that a guest may see: an allow-list, the same at boot and at restore.
//!
//! What KVM supports is more than a guest needs, and grows with every kernel. A leaf that is not in [`LEAVES`] is left
//! out of the table, a bit that is not is cleared. So a guest is offered neither nested virtualization (VMX, SVM), which
//! would open KVM's shadow MMU to it, nor performance counters, nor states that a snapshot does not save.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; the kernel's
//! Documentation/virt/kvm/x86/cpuid.rst for leaves from 0x4000_0000.

use kvm_bindings::kvm_cpuid_entry2;

/// All bits of a register.
const ALL: u32 = u32::MAX;
/// None.
const NONE: u32 = 0;

/// States that XSAVE may save, as XCR0 names them: x87, SSE, AVX, AVX-512 (three), protection keys. Not MPX, which
/// processors no longer have, nor AMX, which the host would have to be asked for.
const XSAVE_STATES: u32 = bits(&[0, 1, 2, 5, 6, 7, 9]);

/// A leaf that a guest may see, and which bits of it.
struct Leaf {
    function: u32,
    /// The only subleaf that this is about; all if there is none.
    index: Option<u32>,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// A whole leaf.
const fn whole(function: u32) -> Leaf {
    Leaf { function, index: None, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL }
}

/// Nothing of a leaf yet: the start of an entry that names its bits.
const fn leaf(function: u32, index: u32) -> Leaf {
    Leaf { function, index: Some(index), eax: NONE, ebx: NONE, ecx: NONE, edx: NONE }
}

/// A mask of these bits.
const fn bits(numbers: &[u32]) -> u32 {
    let (mut mask, mut at) = (0, 0);
    while at < numbers.len() {
        mask |= 1 << numbers[at];
        at += 1;
    }
    mask
}

const LEAVES: &[Leaf] = &[
    // The vendor, and the highest leaf.
    whole(0),
    Leaf {
        // The model, and where the processor sits, which is written afresh.
        eax: ALL,
        ebx: ALL,
        // SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC deadline, AES, XSAVE,
        // OSXSAVE, AVX, F16C, RDRAND: instructions and what KVM emulates of the interrupt controller. HYPERVISOR is ours.
        // Not: DS, MONITOR, VMX, SMX, EIST, TM2, SDBG, PDCM, DCA: power, tracing, nested virtualization.
        ecx: bits(&[0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]),
        // FPU to APIC, SEP to PSE36, CLFLUSH, MMX to self-snoop, HTT. Not: the serial number, DS, ACPI, TM, PBE.
        edx: bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27, 28]),
        ..leaf(1, 0)
    },
    // Caches: what they are is no secret of the host's, and allocators size themselves by it.
    whole(2),
    whole(4),
    Leaf {
        // The timer of the interrupt controller goes on in every power state: KVM emulates none of them.
        eax: bits(&[2]),
        ..leaf(6, 0)
    },
    Leaf {
        // The highest subleaf.
        eax: ALL,
        // FSGSBASE, TSC_ADJUST, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, INVPCID, ZERO_FCS_FDS, AVX512F, DQ, RDSEED,
        // ADX, SMAP, IFMA, CLFLUSHOPT, CLWB, AVX512PF, ER, CD, SHA, BW, VL. Not: SGX, HLE and RTM (a side channel with no
        // user), PQM, PQE, MPX, processor trace.
        ebx: bits(&[0, 1, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31]),
        // PREFETCHWT1, VBMI, UMIP, PKU, OSPKE, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, LA57, RDPID,
        // CLDEMOTE, MOVDIRI, MOVDIR64B. Not: WAITPKG (a guest's wait must exit), shadow stacks (a state that is not
        // saved), bus lock detection, key locker, ENQCMD, SGX, PKS.
        ecx: bits(&[0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14, 16, 22, 25, 27, 28]),
        // 4VNNIW, 4FMAPS, FSRM, VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX512_FP16; and what mitigations in the guest need:
        // SPEC_CTRL, STIBP, FLUSH_L1D, ARCH_CAPABILITIES, SSBD. Not: TSX, LBR, IBT, AMX, core capabilities.
        edx: bits(&[2, 3, 4, 8, 10, 14, 23, 26, 27, 28, 29, 31]),
        ..leaf(7, 0)
    },
    Leaf {
        // SHA512, SM3, SM4, AVX_VNNI, AVX512_BF16, CMPCCXADD, FZRM, FSRS, FSRC, AVX_IFMA.
        eax: bits(&[0, 1, 2, 4, 5, 7, 10, 11, 12, 23]),
        // AVX_VNNI_INT8, AVX_NE_CONVERT, AVX_VNNI_INT16, PREFETCHI.
        edx: bits(&[4, 5, 10, 14]),
        ..leaf(7, 1)
    },
    Leaf {
        // Mitigations: PSFD, IPRED, RRSBA, DDPD_U, BHI, MCDT_NO.
        edx: bits(&[0, 1, 2, 3, 4, 5]),
        ..leaf(7, 2)
    },
    // Topology, which is written afresh.
    whole(0xb),
    whole(0x1f),
    Leaf { eax: XSAVE_STATES, ebx: ALL, ecx: ALL, ..leaf(0xd, 0) },
    // XSAVEOPT, XSAVEC, XGETBV1, XSAVES; no states for supervisors, and no XFD.
    Leaf { eax: bits(&[0, 1, 2, 3]), ebx: ALL, ..leaf(0xd, 1) },
    xsave_state(2),
    xsave_state(5),
    xsave_state(6),
    xsave_state(7),
    xsave_state(9),
    // KVM's signature and highest leaf.
    whole(0x4000_0000),
    Leaf {
        // CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, ASYNC_PF, STEAL_TIME, PV_EOI, PV_UNHALT, PV_TLB_FLUSH, PV_SEND_IPI,
        // POLL_CONTROL, PV_SCHED_YIELD, ASYNC_PF_INT, MSI_EXT_DEST_ID, CLOCKSOURCE_STABLE. Not: what serves hypervisors in
        // the guest (ASYNC_PF_VMEXIT), encrypted guests (HC_MAP_GPA_RANGE) and their migration.
        eax: bits(&[0, 1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15, 24]),
        ..leaf(0x4000_0001, 0)
    },
    whole(0x8000_0000),
    Leaf {
        eax: ALL,
        ebx: ALL,
        // LAHF, CMP_LEGACY, CR8_LEGACY, ABM, SSE4A, MISALIGNSSE, 3DNOWPREFETCH, OSVW, XOP, FMA4, TBM, TOPOEXT. Not: SVM,
        // the extended APIC space, IBS, SKINIT, watchdog, LWP, performance counters, breakpoint extensions, MWAITX.
        ecx: bits(&[0, 1, 4, 5, 6, 7, 8, 9, 11, 16, 21, 22]),
        // As leaf 1 has them on AMD; SYSCALL, NX, MMXEXT, FXSR_OPT, GBPAGES, RDTSCP, LM, 3DNOWEXT, 3DNOW.
        edx: bits(&[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29, 30, 31,
        ]),
        ..leaf(0x8000_0001, 0)
    },
    // The model's name; caches and TLBs.
    whole(0x8000_0002),
    whole(0x8000_0003),
    whole(0x8000_0004),
    whole(0x8000_0005),
    whole(0x8000_0006),
    // The TSC runs at one rate. Nothing else of power management.
    Leaf { edx: bits(&[8]), ..leaf(0x8000_0007, 0) },
    Leaf {
        // Sizes of addresses.
        eax: ALL,
        // CLZERO, XSAVEERPTR, WBNOINVD; mitigations: IBPB, IBRS, STIBP, always-on and preferred modes of both, SSBD and its
        // kin, PSFD, BTC_NO, IBPB_RET. Not: RDPRU, memory bandwidth.
        ebx: bits(&[0, 2, 9, 12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30]),
        // Cores, written afresh.
        ecx: ALL,
        ..leaf(0x8000_0008, 0)
    },
    // TLBs for 1 GiB pages; the width of the units for vectors; caches.
    whole(0x8000_0019),
    Leaf { eax: bits(&[0, 1, 2]), ..leaf(0x8000_001a, 0) },
    whole(0x8000_001d),
    // Where the processor sits, written afresh.
    Leaf { eax: ALL, ebx: ALL, ecx: ALL, ..leaf(0x8000_001e, 0) },
    Leaf {
        // NO_NESTED_DATA_BP, LFENCE_RDTSC, VERW_CLEAR, NULL_SEL_CLR_BASE, AUTOIBRS, NO_SMM_CTL_MSR, PREFETCHI, SBPB,
        // IBPB_BRTYPE, SRSO_NO, SRSO_USER_KERNEL_NO: how instructions behave, and which mitigations are needed.
        eax: bits(&[0, 2, 5, 6, 8, 9, 20, 27, 28, 29, 30]),
        // TSA_SQ_NO, TSA_L1_NO.
        ecx: bits(&[1, 2]),
        ..leaf(0x8000_0021, 0)
    },
];

/// Size and place of a state that XSAVE may save.
const fn xsave_state(index: u32) -> Leaf {
    Leaf { eax: ALL, ebx: ALL, ecx: ALL, ..leaf(0xd, index) }
}

/// What a guest may see of a table.
pub(super) fn filter(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    entries.iter().filter_map(filter_entry).collect()
}

/// What a guest may see of an entry; `None` if nothing.
fn filter_entry(entry: &kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    let leaf = LEAVES.iter().find(|leaf| {
        leaf.function == entry.function && leaf.index.is_none_or(|index| index == entry.index)
    })?;
    Some(kvm_cpuid_entry2 {
        eax: entry.eax & leaf.eax,
        ebx: entry.ebx & leaf.ebx,
        ecx: entry.ecx & leaf.ecx,
        edx: entry.edx & leaf.edx,
        ..*entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        }
    }

    /// A processor that says yes to everything.
    fn all_ones() -> Vec<kvm_cpuid_entry2> {
        let ranges =
            [0..=0x40, 0x4000_0000..=0x4000_0020, 0x8000_0000..=0x8000_0040, 0xc000_0000..=0xc000_0008];
        let functions = ranges.into_iter().flatten();
        functions.flat_map(|function| (0..32).map(move |index| entry(function, index, ALL))).collect()
    }

    fn seen(function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let table = filter(&all_ones());
        table.into_iter().find(|entry| entry.function == function && entry.index == index)
    }

    #[test]
    fn cpuid_offers_no_nested_virtualization() {
        let (basic, extended) = (seen(1, 0).unwrap(), seen(0x8000_0001, 0).unwrap());
        assert_eq!(basic.ecx & (1 << 5), 0, "VMX");
        assert_eq!(basic.ecx & (1 << 6), 0, "SMX");
        assert_eq!(extended.ecx & (1 << 2), 0, "SVM");
        assert_eq!(extended.ecx & (1 << 12), 0, "SKINIT");
        assert!(seen(0x8000_000a, 0).is_none(), "SVM's features");
    }

    #[test]
    fn cpuid_offers_no_counters_enclaves_traces_or_encryption() {
        for (function, what) in [
            (0x5, "MONITOR"),
            (0xa, "performance counters"),
            (0xf, "PQM"),
            (0x10, "PQE"),
            (0x12, "SGX"),
            (0x14, "processor trace"),
            (0x19, "key locker"),
            (0x1c, "last branch records"),
            (0x1d, "AMX"),
            (0x8000_001b, "IBS"),
            (0x8000_001c, "LWP"),
            (0x8000_001f, "memory encryption"),
            (0x8000_0022, "performance counters"),
            (0xc000_0001, "another vendor's"),
        ] {
            assert!(seen(function, 0).is_none(), "{what}: leaf {function:#x}");
        }
        assert_eq!(seen(0x8000_0001, 0).unwrap().ecx & ((1 << 23) | (1 << 24) | (1 << 28)), 0);
    }

    #[test]
    fn cpuid_offers_only_states_that_a_snapshot_holds() {
        let whole = seen(0xd, 0).unwrap();
        assert_eq!((whole.eax, whole.edx), (0x2e7, 0));
        let features = seen(0xd, 1).unwrap();
        assert_eq!((features.eax, features.ecx, features.edx), (0xf, 0, 0));
        for state in 2..32 {
            let allowed = whole.eax & (1 << state) != 0;
            assert_eq!(seen(0xd, state).is_some(), allowed, "state {state}");
        }
        let extensions = seen(7, 0).unwrap();
        assert_eq!(extensions.ecx & (1 << 7), 0, "shadow stacks");
        assert_eq!(extensions.edx & ((1 << 20) | (1 << 22) | (1 << 24) | (1 << 25)), 0, "IBT and AMX");
    }

    #[test]
    fn cpuid_keeps_what_the_levels_of_x86_64_ask_for() {
        // x86-64-v4, as the psABI lists it.
        let (basic, extended, leaf7) =
            (seen(1, 0).unwrap(), seen(0x8000_0001, 0).unwrap(), seen(7, 0).unwrap());
        let v2 = bits(&[0, 9, 13, 19, 20, 23]);
        let v3 = bits(&[12, 22, 26, 27, 28, 29]);
        assert_eq!(basic.ecx & (v2 | v3), v2 | v3);
        assert_eq!(extended.ecx & bits(&[0, 5]), bits(&[0, 5]));
        let v3_and_v4 = bits(&[3, 5, 8, 16, 17, 28, 30, 31]);
        assert_eq!(leaf7.ebx & v3_and_v4, v3_and_v4);
    }

    #[test]
    fn cpuid_is_filtered_once_and_for_all() {
        let once = filter(&all_ones());
        assert_eq!(filter(&once), once);
        assert!(filter(&[entry(0x77, 0, ALL), entry(7, 9, ALL)]).is_empty(), "unknown leaves vanish");
    }

    #[test]
    fn cpuid_leaves_are_listed_once() {
        for (at, leaf) in LEAVES.iter().enumerate() {
            let twice = LEAVES[..at].iter().any(|other| {
                other.function == leaf.function && (other.index.is_none() || other.index == leaf.index)
            });
            assert!(!twice, "leaf {:#x}", leaf.function);
        }
    }
}
