//! A container's statistics as a message.

use caisson_protocol::v1 as proto;

use crate::container::cgroup::stats::{Pressure, PressureStats, Stats};

pub(super) fn message(stats: Stats) -> proto::StatsResponse {
    proto::StatsResponse {
        cpu: stats.cpu.map(|cpu| proto::CpuStats {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            pressure: cpu.pressure.map(pressure_stats),
        }),
        memory: stats.memory.map(|memory| proto::MemoryStats {
            usage: memory.usage,
            usage_limit: memory.usage_limit,
            swap_usage: memory.swap_usage,
            swap_limit: memory.swap_limit,
            peak: memory.peak,
            stat: memory.stat.into_iter().collect(),
            pressure: memory.pressure.map(pressure_stats),
        }),
        pids: stats.pids.map(|pids| proto::PidsStats { current: pids.current, limit: pids.limit }),
        io: stats
            .io
            .into_iter()
            .map(|io| proto::IoStats {
                major: io.major,
                minor: io.minor,
                rbytes: io.rbytes,
                wbytes: io.wbytes,
                rios: io.rios,
                wios: io.wios,
                dbytes: io.dbytes,
                dios: io.dios,
            })
            .collect(),
        hugetlb: stats
            .hugetlb
            .into_iter()
            .map(|pages| proto::HugetlbStats {
                page_size: pages.page_size,
                current: pages.current,
                max: pages.max,
                failcnt: pages.failcnt,
            })
            .collect(),
        memory_events: stats.memory_events.map(|events| proto::MemoryEvents {
            low: events.low,
            high: events.high,
            max: events.max,
            oom: events.oom,
            oom_kill: events.oom_kill,
        }),
    }
}

fn pressure_stats(stats: PressureStats) -> proto::PressureStats {
    let pressure = |pressure: Pressure| proto::Pressure {
        avg10: pressure.avg10,
        avg60: pressure.avg60,
        avg300: pressure.avg300,
        total_usec: pressure.total_usec,
    };
    proto::PressureStats { some: Some(pressure(stats.some)), full: Some(pressure(stats.full)) }
}
