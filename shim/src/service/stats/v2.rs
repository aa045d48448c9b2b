//! containerd's message for control groups of version 2.

use std::collections::HashMap;

use caisson_protocol::v1;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;

/// The name of the message's type.
pub(super) const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// The message.
pub(super) fn metrics(stats: v1::StatsResponse) -> Metrics {
    Metrics {
        cpu: stats.cpu.map(cpu).into(),
        memory: stats.memory.map(memory).into(),
        pids: stats
            .pids
            .map(|pids| PidsStat { current: pids.current, limit: pids.limit, ..Default::default() })
            .into(),
        io: MessageField::some(IOStat {
            usage: stats.io.into_iter().map(io).collect(),
            ..Default::default()
        }),
        hugetlb: stats.hugetlb.into_iter().map(hugetlb).collect(),
        memory_events: stats
            .memory_events
            .map(|events| MemoryEvents {
                low: events.low,
                high: events.high,
                max: events.max,
                oom: events.oom,
                oom_kill: events.oom_kill,
                ..Default::default()
            })
            .into(),
        ..Default::default()
    }
}

fn cpu(cpu: v1::CpuStats) -> CPUStat {
    CPUStat {
        usage_usec: cpu.usage_usec,
        user_usec: cpu.user_usec,
        system_usec: cpu.system_usec,
        nr_periods: cpu.nr_periods,
        nr_throttled: cpu.nr_throttled,
        throttled_usec: cpu.throttled_usec,
        psi: cpu.pressure.map(pressure).into(),
        ..Default::default()
    }
}

fn memory(memory: v1::MemoryStats) -> MemoryStat {
    let of = |stat: &HashMap<String, u64>, name: &str| stat.get(name).copied().unwrap_or(0);
    let stat = |name: &str| of(&memory.stat, name);
    MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        workingset_refault: stat("workingset_refault_anon").saturating_add(stat("workingset_refault_file")),
        workingset_activate: stat("workingset_activate_anon")
            .saturating_add(stat("workingset_activate_file")),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.usage_limit,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        max_usage: memory.peak,
        psi: memory.pressure.map(pressure).into(),
        ..Default::default()
    }
}

fn io(entry: v1::IoStats) -> IOEntry {
    IOEntry {
        major: entry.major,
        minor: entry.minor,
        rbytes: entry.rbytes,
        wbytes: entry.wbytes,
        rios: entry.rios,
        wios: entry.wios,
        ..Default::default()
    }
}

fn hugetlb(stat: v1::HugetlbStats) -> HugeTlbStat {
    HugeTlbStat {
        current: stat.current,
        max: stat.max,
        pagesize: stat.page_size,
        failcnt: stat.failcnt,
        ..Default::default()
    }
}

fn pressure(pressure: v1::PressureStats) -> PSIStats {
    let data = |pressure: v1::Pressure| PSIData {
        avg10: pressure.avg10,
        avg60: pressure.avg60,
        avg300: pressure.avg300,
        total: pressure.total_usec,
        ..Default::default()
    };
    PSIStats {
        some: pressure.some.map(data).into(),
        full: pressure.full.map(data).into(),
        ..Default::default()
    }
}
