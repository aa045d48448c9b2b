//! containerd's message for control groups of version 1.

use std::collections::HashMap;

use caisson_protocol::v1;
use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat,
    Metrics, PidsStat, Throttle,
};

/// The name of the message's type.
pub(super) const TYPE: &str = "io.containerd.cgroups.v1.Metrics";

/// What version 1 says where there is no limit of memory: the largest multiple of a page.
const NO_LIMIT: u64 = (i64::MAX as u64) & !0xfff;

/// The message. What version 1 counts and version 2 does not is zero.
pub(super) fn metrics(stats: v1::StatsResponse) -> Metrics {
    let events = stats.memory_events.unwrap_or_default();
    let pids =
        |pids: v1::PidsStats| PidsStat { current: pids.current, limit: pids.limit, ..Default::default() };
    Metrics {
        hugetlb: stats.hugetlb.into_iter().map(hugetlb).collect(),
        pids: stats.pids.map(pids).into(),
        cpu: stats.cpu.map(cpu).into(),
        memory: stats.memory.map(|stats| memory(&stats, events.max)).into(),
        blkio: Some(blkio(&stats.io)).into(),
        memory_oom_control: Some(MemoryOomControl { oom_kill: events.oom_kill, ..Default::default() }).into(),
        ..Default::default()
    }
}

/// In nanoseconds.
fn cpu(cpu: v1::CpuStats) -> CPUStat {
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
    let usage = CPUUsage {
        total: nanoseconds(cpu.usage_usec),
        kernel: nanoseconds(cpu.system_usec),
        user: nanoseconds(cpu.user_usec),
        ..Default::default()
    };
    let throttling = Throttle {
        periods: cpu.nr_periods,
        throttled_periods: cpu.nr_throttled,
        throttled_time: nanoseconds(cpu.throttled_usec),
        ..Default::default()
    };
    CPUStat { usage: Some(usage).into(), throttling: Some(throttling).into(), ..Default::default() }
}

/// Version 2 always counts those below a group with it, so both sets of counters are the same.
fn memory(memory: &v1::MemoryStats, failures: u64) -> MemoryStat {
    let of = |stat: &HashMap<String, u64>, name: &str| stat.get(name).copied().unwrap_or(0);
    let stat = |name: &str| of(&memory.stat, name);
    let (limit, swap_limit) = (memory.usage_limit.min(NO_LIMIT), memory.swap_limit.min(NO_LIMIT));
    let with_swap_limit = limit.saturating_add(swap_limit).min(NO_LIMIT);
    let usage =
        MemoryEntry { limit, usage: memory.usage, max: memory.peak, failcnt: failures, ..Default::default() };
    // Version 1's is of memory and swap together.
    let swap = MemoryEntry {
        limit: with_swap_limit,
        usage: memory.usage.saturating_add(memory.swap_usage),
        ..Default::default()
    };
    MemoryStat {
        cache: stat("file"),
        rss: stat("anon"),
        rss_huge: stat("anon_thp"),
        mapped_file: stat("file_mapped"),
        dirty: stat("file_dirty"),
        writeback: stat("file_writeback"),
        pg_fault: stat("pgfault"),
        pg_maj_fault: stat("pgmajfault"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        hierarchical_memory_limit: limit,
        hierarchical_swap_limit: with_swap_limit,
        total_cache: stat("file"),
        total_rss: stat("anon"),
        total_rss_huge: stat("anon_thp"),
        total_mapped_file: stat("file_mapped"),
        total_dirty: stat("file_dirty"),
        total_writeback: stat("file_writeback"),
        total_pg_fault: stat("pgfault"),
        total_pg_maj_fault: stat("pgmajfault"),
        total_inactive_anon: stat("inactive_anon"),
        total_active_anon: stat("active_anon"),
        total_inactive_file: stat("inactive_file"),
        total_active_file: stat("active_file"),
        total_unevictable: stat("unevictable"),
        usage: Some(usage).into(),
        swap: Some(swap).into(),
        ..Default::default()
    }
}

/// A counter of a device is an entry of its own.
fn blkio(devices: &[v1::IoStats]) -> BlkIOStat {
    let entries = |counters: fn(&v1::IoStats) -> [(&'static str, u64); 3]| {
        let of = |device: &v1::IoStats| {
            counters(device).map(|(operation, value)| BlkIOEntry {
                op: operation.into(),
                major: device.major,
                minor: device.minor,
                value,
                ..Default::default()
            })
        };
        devices.iter().flat_map(of).collect()
    };
    BlkIOStat {
        io_service_bytes_recursive: entries(|io| {
            [("Read", io.rbytes), ("Write", io.wbytes), ("Discard", io.dbytes)]
        }),
        io_serviced_recursive: entries(|io| [("Read", io.rios), ("Write", io.wios), ("Discard", io.dios)]),
        ..Default::default()
    }
}

fn hugetlb(stat: v1::HugetlbStats) -> HugetlbStat {
    HugetlbStat {
        usage: stat.current,
        max: stat.max,
        failcnt: stat.failcnt,
        pagesize: stat.page_size,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_the_units_of_version_1() {
        let stat = HashMap::from([("anon".to_owned(), 10), ("inactive_file".to_owned(), 5)]);
        let cpu = v1::CpuStats { usage_usec: 7, system_usec: 2, throttled_usec: 3, ..Default::default() };
        let memory = v1::MemoryStats {
            usage: 100,
            usage_limit: 1000,
            swap_usage: 20,
            swap_limit: u64::MAX,
            peak: 200,
            stat,
            ..Default::default()
        };
        let io = v1::IoStats { major: 8, minor: 1, rbytes: 4096, wios: 2, ..Default::default() };
        let metrics = metrics(v1::StatsResponse {
            cpu: Some(cpu),
            memory: Some(memory),
            io: vec![io],
            memory_events: Some(v1::MemoryEvents { max: 4, oom_kill: 1, ..Default::default() }),
            ..Default::default()
        });
        assert_eq!((metrics.cpu.usage.total, metrics.cpu.usage.kernel), (7000, 2000));
        assert_eq!(metrics.cpu.throttling.throttled_time, 3000);
        assert_eq!((metrics.memory.rss, metrics.memory.total_inactive_file), (10, 5));
        let usage = &metrics.memory.usage;
        assert_eq!((usage.usage, usage.limit, usage.max, usage.failcnt), (100, 1000, 200, 4));
        assert_eq!((metrics.memory.swap.usage, metrics.memory.swap.limit), (120, NO_LIMIT));
        assert_eq!(metrics.memory_oom_control.oom_kill, 1);
        let bytes = &metrics.blkio.io_service_bytes_recursive;
        assert_eq!((bytes[0].op.as_str(), bytes[0].major, bytes[0].value), ("Read", 8, 4096));
        assert_eq!(metrics.blkio.io_serviced_recursive[1].value, 2);
        assert!(metrics.pids.is_none());
    }

    #[test]
    fn no_limit_is_said_as_version_1_does() {
        let memory = v1::MemoryStats { usage_limit: u64::MAX, ..Default::default() };
        let metrics = metrics(v1::StatsResponse { memory: Some(memory), ..Default::default() });
        assert_eq!(metrics.memory.usage.limit, 9_223_372_036_854_771_712);
    }
}
