//! What a control group says about itself, in the units of its files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::container::Error;
use crate::guest::decimal;

/// Statistics of a control group; absent parts have no controller.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // Named as the controllers.
pub struct Stats {
    pub cpu: Option<CpuStats>,
    pub memory: Option<MemoryStats>,
    pub memory_events: Option<MemoryEvents>,
    pub pids: Option<PidsStats>,
    pub io: Vec<IoStats>,
    pub hugetlb: Vec<HugetlbStats>,
    pub io_pressure: Option<PressureStats>,
}

/// cpu.stat, in microseconds, and cpu.pressure.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // Named as in the file.
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_periods: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
    pub pressure: Option<PressureStats>,
}

/// memory.*, in bytes; no limit is `u64::MAX`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)] // Named as containerd's metrics.
pub struct MemoryStats {
    pub usage: u64,
    pub usage_limit: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub peak: u64,
    /// memory.stat, whole.
    pub stat: BTreeMap<String, u64>,
    pub pressure: Option<PressureStats>,
}

/// memory.events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the file.
pub struct MemoryEvents {
    pub low: u64,
    pub high: u64,
    pub max: u64,
    pub oom: u64,
    pub oom_kill: u64,
}

/// pids.current and pids.max (0: no limit).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as the files.
pub struct PidsStats {
    pub current: u64,
    pub limit: u64,
}

/// A line of io.stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the file.
pub struct IoStats {
    pub major: u64,
    pub minor: u64,
    pub rbytes: u64,
    pub wbytes: u64,
    pub rios: u64,
    pub wios: u64,
    pub dbytes: u64,
    pub dios: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugetlbStats {
    /// "2MB", "1GB".
    pub page_size: String,
    /// In use.
    pub current: u64,
    /// Limit, `u64::MAX`: none.
    pub max: u64,
    /// Times an allocation failed for the limit.
    pub failcnt: u64,
}

/// A pressure file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)] // Named as in the file.
pub struct PressureStats {
    pub some: Pressure,
    pub full: Pressure,
}

/// A line of a pressure file: percentages of time, and its total.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)] // Named as in the file.
pub struct Pressure {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total_usec: u64,
}

/// Reads the control group `path`.
///
/// # Errors
/// When it is gone.
pub(super) fn read(path: &Path) -> Result<Stats, Error> {
    fs::metadata(path).map_err(Error::system("read the container's control group"))?;
    let text = |file: &str| fs::read_to_string(path.join(file)).ok();
    let number = |file: &str| text(file).map_or(0, |text| limit(&text));
    let pressure = |file: &str| text(file).map(|text| parse_pressure(&text));
    let cpu = text("cpu.stat").map(|text| {
        let key = |key| keyed(&text, key).unwrap_or(0);
        CpuStats {
            usage_usec: key("usage_usec"),
            user_usec: key("user_usec"),
            system_usec: key("system_usec"),
            nr_periods: key("nr_periods"),
            nr_throttled: key("nr_throttled"),
            throttled_usec: key("throttled_usec"),
            pressure: pressure("cpu.pressure"),
        }
    });
    let memory = text("memory.current").map(|usage| MemoryStats {
        usage: limit(&usage),
        usage_limit: number("memory.max"),
        swap_usage: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        peak: number("memory.peak"),
        stat: text("memory.stat").map(|text| pairs(&text)).unwrap_or_default(),
        pressure: pressure("memory.pressure"),
    });
    let memory_events = text("memory.events").map(|text| {
        let key = |key| keyed(&text, key).unwrap_or(0);
        let (low, high, max) = (key("low"), key("high"), key("max"));
        MemoryEvents { low, high, max, oom: key("oom"), oom_kill: key("oom_kill") }
    });
    let pids = text("pids.current").map(|current| {
        let maximum = number("pids.max");
        PidsStats { current: limit(&current), limit: if maximum == u64::MAX { 0 } else { maximum } }
    });
    let io = text("io.stat").map(|text| text.lines().filter_map(parse_io).collect()).unwrap_or_default();
    Ok(Stats {
        cpu,
        memory,
        memory_events,
        pids,
        io,
        hugetlb: hugetlb(path),
        io_pressure: pressure("io.pressure"),
    })
}

fn hugetlb(path: &Path) -> Vec<HugetlbStats> {
    let number = |file: String| fs::read_to_string(path.join(file)).map_or(0, |text| limit(&text));
    let names =
        fs::read_dir(path).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut sizes: Vec<_> = names
        .filter_map(|name| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort_unstable();
    let stats = sizes.into_iter().map(|size| {
        let events = fs::read_to_string(path.join(format!("hugetlb.{size}.events"))).unwrap_or_default();
        HugetlbStats {
            current: number(format!("hugetlb.{size}.current")),
            max: number(format!("hugetlb.{size}.max")),
            failcnt: keyed(&events, "max").unwrap_or(0),
            page_size: size,
        }
    });
    stats.collect()
}

/// A number, or "max".
fn limit(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// The value of `key` in a flat keyed file.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn pairs(text: &str) -> BTreeMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?))).collect()
}

fn parse_io(line: &str) -> Option<IoStats> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stats = IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoStats::default() };
    for (key, value) in rest.split_whitespace().filter_map(|pair| pair.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => stats.rbytes = value,
            "wbytes" => stats.wbytes = value,
            "rios" => stats.rios = value,
            "wios" => stats.wios = value,
            "dbytes" => stats.dbytes = value,
            "dios" => stats.dios = value,
            _ => {}
        }
    }
    Some(stats)
}

fn parse_pressure(text: &str) -> PressureStats {
    let line = |kind: &str| {
        let mut pressure = Pressure::default();
        let line =
            text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' ')).unwrap_or_default();
        for (key, value) in line.split_whitespace().filter_map(|pair| pair.split_once('=')) {
            match key {
                "avg10" => pressure.avg10 = decimal(value).unwrap_or(0.0),
                "avg60" => pressure.avg60 = decimal(value).unwrap_or(0.0),
                "avg300" => pressure.avg300 = decimal(value).unwrap_or(0.0),
                "total" => pressure.total_usec = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        pressure
    };
    PressureStats { some: line("some"), full: line("full") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_whole() {
        let text = "oom 1\noom_kill 2\noom_group_kill 3\n";
        assert_eq!(keyed(text, "oom"), Some(1));
        assert_eq!(keyed(text, "oom_kill"), Some(2));
        assert_eq!(keyed(text, "kill"), None);
    }

    #[test]
    fn a_group_is_read_and_what_is_not_there_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put("memory.stat", "anon 12\nfile 34\n");
        put("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n\n");
        put("hugetlb.2MB.current", "0\n");
        put("hugetlb.2MB.max", "max\n");
        put("hugetlb.2MB.events", "max 7\n");
        put("hugetlb.2MB.rsvd.current", "0\n");
        put("cpu.stat", "usage_usec 10\nuser_usec 6\nsystem_usec 4\n");
        put("cpu.pressure", "some avg10=0.50 avg60=0.00 avg300=0.00 total=99\n");
        let stats = read(dir.path()).unwrap();
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage, memory.usage_limit, memory.stat["file"]), (4096, u64::MAX, 34));
        let io = IoStats { major: 254, minor: 0, rbytes: 1, wbytes: 2, rios: 3, wios: 4, dbytes: 5, dios: 6 };
        assert_eq!(stats.io, [io]);
        assert_eq!(stats.hugetlb.len(), 1);
        assert_eq!(stats.hugetlb[0].failcnt, 7);
        let cpu = stats.cpu.unwrap();
        let some = cpu.pressure.unwrap().some;
        assert_eq!((cpu.user_usec, some.avg10, some.total_usec), (6, 0.5, 99));
        assert_eq!(stats.pids, None);
        assert!(read(&dir.path().join("gone")).is_err());
    }
}
