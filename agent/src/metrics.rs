//! Counters and gauges of the guest and of the agent, read from procfs when asked for.

use std::collections::HashMap;

use caisson_protocol::v1::Metric;
use caisson_protocol::v1::metric::Kind;

use crate::guest::{decimal, read};
use crate::state::State;

/// Bytes, from /proc/meminfo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Usable memory.
    pub total: u64,
    /// Not used by anyone.
    pub free: u64,
    /// What could be had without swapping.
    pub available: u64,
}

/// All metrics; what can not be read is left out.
pub fn collect(state: &State) -> Vec<Metric> {
    let mut metrics = Vec::new();
    if let Ok(text) = read("/proc/meminfo") {
        let memory = memory(&text);
        metrics.push(gauge("memory_total_bytes", memory.total));
        metrics.push(gauge("memory_free_bytes", memory.free));
        metrics.push(gauge("memory_available_bytes", memory.available));
    }
    if let Ok(text) = read("/proc/stat") {
        metrics.extend(cpu_seconds(&text));
    }
    if let Some(load) = read("/proc/loadavg").ok().and_then(|text| decimal(text.split(' ').next()?)) {
        metrics.push(metric("load1", Kind::Gauge, load));
    }
    if let Ok(text) = read("/proc/self/status") {
        for (field, name) in [("RssAnon", "agent_anonymous_bytes"), ("VmRSS", "agent_resident_bytes")] {
            metrics.extend(kibibytes(&text, field).map(|bytes| gauge(name, bytes)));
        }
    }
    let descriptors = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    metrics.push(gauge("agent_open_descriptors", descriptors as u64));
    metrics.push(gauge("agent_streams", state.streams.count() as u64));
    metrics.push(metric(
        "agent_events_total",
        Kind::Counter,
        approximate(state.events.next().saturating_sub(1)),
    ));
    metrics
}

/// The figures of /proc/meminfo; absent ones are 0.
pub fn memory(meminfo: &str) -> Memory {
    let field = |name| kibibytes(meminfo, name).unwrap_or(0);
    Memory { total: field("MemTotal"), free: field("MemFree"), available: field("MemAvailable") }
}

/// The field "Name:   123 kB", in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let value: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(value.saturating_mul(1024))
}

/// CPU time by mode, from the first line of /proc/stat, whose unit is 10 ms (USER_HZ is 100 on every Linux ABI).
fn cpu_seconds(stat: &str) -> Vec<Metric> {
    const MODES: [&str; 8] = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"];
    let Some(line) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else { return Vec::new() };
    let ticks = line.split_whitespace().map_while(|field| field.parse::<u64>().ok());
    MODES
        .iter()
        .zip(ticks)
        .map(|(mode, ticks)| {
            let mut metric = metric("cpu_seconds_total", Kind::Counter, approximate(ticks) / 100.0);
            metric.labels = HashMap::from([("mode".to_owned(), (*mode).to_owned())]);
            metric
        })
        .collect()
}

fn gauge(name: &str, value: u64) -> Metric {
    metric(name, Kind::Gauge, approximate(value))
}

fn metric(name: &str, kind: Kind, value: f64) -> Metric {
    Metric { name: name.to_owned(), kind: kind.into(), labels: HashMap::new(), value }
}

/// Metrics are floating point, exact to 2^53.
#[allow(clippy::cast_precision_loss)]
fn approximate(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_meminfo() {
        let text =
            "MemTotal:       1024 kB\nMemFree:         512 kB\nMemAvailable:    768 kB\nMemTotalX: 9 kB";
        assert_eq!(memory(text), Memory { total: 1 << 20, free: 512 << 10, available: 768 << 10 });
        assert_eq!(memory("MemTotal: x kB\n"), Memory::default());
    }

    #[test]
    fn cpu_time_by_mode() {
        let metrics = cpu_seconds("cpu  100 0 250 1 2 3 4 5 0 0\ncpu0 1 2 3\n");
        assert_eq!(metrics.len(), 8);
        assert_eq!((metrics[2].labels["mode"].as_str(), metrics[2].value), ("system", 2.5));
    }
}
