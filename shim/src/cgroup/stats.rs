//! What a control group uses, in version 2's names and units whichever version counts it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caisson_protocol::v1;

use super::CgroupError;

/// Version 1 tells processor time of user and system in these parts of a second (USER_HZ), as proc(5) does.
const TICKS: u64 = 100;
/// Version 1's word for no memory limit is the largest multiple of a page; nobody limits memory to more than this.
const NO_LIMIT: u64 = 1 << 60;

/// What version 1 calls the entries of version 2's memory.stat, descendants included.
const MEMORY_STAT: [(&str, &str); 10] = [
    ("anon", "total_rss"),
    ("file", "total_cache"),
    ("shmem", "total_shmem"),
    ("file_mapped", "total_mapped_file"),
    ("file_dirty", "total_dirty"),
    ("file_writeback", "total_writeback"),
    ("inactive_file", "total_inactive_file"),
    ("active_file", "total_active_file"),
    ("pgfault", "total_pgfault"),
    ("pgmajfault", "total_pgmajfault"),
];

/// The files of one group, in one of its directories. A controller that is not there has none.
struct Files<'a>(&'a Path);

impl Files<'_> {
    fn text(&self, name: &str) -> Result<Option<String>, CgroupError> {
        let path: PathBuf = self.0.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // Files of a controller that is switched off, such as pressure.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            Err(source) => Err(CgroupError::Io { action: "read", path, source }),
        }
    }

    /// A file with one number; `max` is the largest.
    fn number(&self, name: &str) -> Result<Option<u64>, CgroupError> {
        Ok(self.text(name)?.and_then(|text| match text.trim() {
            "max" => Some(u64::MAX),
            number => number.parse().ok(),
        }))
    }

    /// A file of names and numbers.
    fn table(&self, name: &str) -> Result<Option<HashMap<String, u64>>, CgroupError> {
        let pair = |line: &str| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        Ok(self.text(name)?.map(|text| text.lines().filter_map(pair).collect()))
    }
}

fn of(table: &HashMap<String, u64>, name: &str) -> u64 {
    table.get(name).copied().unwrap_or(0)
}

/// From a directory of version 2.
pub(super) fn unified(directory: &Path) -> Result<v1::StatsResponse, CgroupError> {
    let files = Files(directory);
    let cpu = files.table("cpu.stat")?.map(|stat| v1::CpuStats {
        usage_usec: of(&stat, "usage_usec"),
        user_usec: of(&stat, "user_usec"),
        system_usec: of(&stat, "system_usec"),
        nr_periods: of(&stat, "nr_periods"),
        nr_throttled: of(&stat, "nr_throttled"),
        throttled_usec: of(&stat, "throttled_usec"),
        pressure: None,
    });
    let memory = match files.number("memory.current")? {
        None => None,
        Some(usage) => Some(v1::MemoryStats {
            usage,
            usage_limit: files.number("memory.max")?.unwrap_or(u64::MAX),
            swap_usage: files.number("memory.swap.current")?.unwrap_or(0),
            swap_limit: files.number("memory.swap.max")?.unwrap_or(u64::MAX),
            peak: files.number("memory.peak")?.unwrap_or(0),
            stat: files.table("memory.stat")?.unwrap_or_default(),
            pressure: None,
        }),
    };
    let memory_events = files.table("memory.events")?.map(|events| v1::MemoryEvents {
        low: of(&events, "low"),
        high: of(&events, "high"),
        max: of(&events, "max"),
        oom: of(&events, "oom"),
        oom_kill: of(&events, "oom_kill"),
    });
    let io = files.text("io.stat")?.unwrap_or_default().lines().filter_map(device).collect();
    Ok(v1::StatsResponse { cpu, memory, pids: pids(&files)?, io, hugetlb: Vec::new(), memory_events })
}

/// A line of io.stat: `8:0 rbytes=1 wbytes=2 …`.
fn device(line: &str) -> Option<v1::IoStats> {
    let (device, fields) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stats =
        v1::IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..v1::IoStats::default() };
    for (name, value) in fields.split(' ').filter_map(|field| field.split_once('=')) {
        let value = value.parse().ok()?;
        match name {
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

fn pids(files: &Files<'_>) -> Result<Option<v1::PidsStats>, CgroupError> {
    let Some(current) = files.number("pids.current")? else { return Ok(None) };
    let limit = files.number("pids.max")?.filter(|limit| *limit != u64::MAX).unwrap_or(0);
    Ok(Some(v1::PidsStats { current, limit }))
}

/// Adds what the directory of one of version 1's hierarchies tells.
pub(super) fn add(stats: &mut v1::StatsResponse, directory: &Path) -> Result<(), CgroupError> {
    let files = Files(directory);
    if let Some(nanoseconds) = files.number("cpuacct.usage")? {
        let split = files.table("cpuacct.stat")?.unwrap_or_default();
        let time = |name| of(&split, name).saturating_mul(1_000_000 / TICKS);
        let cpu = stats.cpu.get_or_insert_default();
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec) = (nanoseconds / 1000, time("user"), time("system"));
    }
    if let Some(throttling) = files.table("cpu.stat")? {
        let cpu = stats.cpu.get_or_insert_default();
        cpu.nr_periods = of(&throttling, "nr_periods");
        cpu.nr_throttled = of(&throttling, "nr_throttled");
        cpu.throttled_usec = of(&throttling, "throttled_time") / 1000;
    }
    if let Some(usage) = files.number("memory.usage_in_bytes")? {
        let limit = |number: Option<u64>| number.filter(|limit| *limit < NO_LIMIT).unwrap_or(u64::MAX);
        let table = files.table("memory.stat")?.unwrap_or_default();
        let stat = MEMORY_STAT.iter().filter_map(|(name, old)| Some(((*name).to_owned(), *table.get(*old)?)));
        // Together with swap, where swap is accounted.
        let with_swap = files.number("memory.memsw.usage_in_bytes")?.unwrap_or(usage);
        stats.memory = Some(v1::MemoryStats {
            usage,
            usage_limit: limit(files.number("memory.limit_in_bytes")?),
            swap_usage: with_swap.saturating_sub(usage),
            swap_limit: limit(files.number("memory.memsw.limit_in_bytes")?),
            peak: files.number("memory.max_usage_in_bytes")?.unwrap_or(0),
            stat: stat.collect(),
            pressure: None,
        });
        let control = files.table("memory.oom_control")?.unwrap_or_default();
        let oom_kill = of(&control, "oom_kill");
        stats.memory_events = Some(v1::MemoryEvents {
            max: files.number("memory.failcnt")?.unwrap_or(0),
            oom: oom_kill,
            oom_kill,
            ..v1::MemoryEvents::default()
        });
    }
    if let Some(found) = pids(&files)? {
        stats.pids = Some(found);
    }
    for (file, bytes) in
        [("blkio.throttle.io_service_bytes_recursive", true), ("blkio.throttle.io_serviced_recursive", false)]
    {
        for line in files.text(file)?.unwrap_or_default().lines() {
            add_device(&mut stats.io, line, bytes);
        }
    }
    Ok(())
}

/// A line of version 1's counters of devices: `8:0 Read 1`.
fn add_device(io: &mut Vec<v1::IoStats>, line: &str, bytes: bool) -> Option<()> {
    let mut fields = line.split(' ');
    let (device, operation, value) = (fields.next()?, fields.next()?, fields.next()?.parse().ok()?);
    let (major, minor) = device.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let known = io.iter().position(|stats| (stats.major, stats.minor) == (major, minor));
    let index = known.unwrap_or_else(|| {
        io.push(v1::IoStats { major, minor, ..v1::IoStats::default() });
        io.len() - 1
    });
    let stats = io.get_mut(index)?;
    match (operation, bytes) {
        ("Read", true) => stats.rbytes = value,
        ("Write", true) => stats.wbytes = value,
        ("Discard", true) => stats.dbytes = value,
        ("Read", false) => stats.rios = value,
        ("Write", false) => stats.wios = value,
        ("Discard", false) => stats.dios = value,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(directory.path().join(name), content).unwrap();
        }
        directory
    }

    #[test]
    fn reads_version_2() {
        let group = directory(&[
            ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_throttled 4\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\ninactive_file 2\n"),
            ("memory.events", "low 0\noom_kill 3\n"),
            ("pids.current", "5\n"),
            ("pids.max", "max\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:1 \nnonsense\n"),
        ]);
        let stats = unified(group.path()).unwrap();
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.nr_throttled), (30, 20, 4));
        let memory = stats.memory.unwrap();
        assert_eq!(
            (memory.usage, memory.usage_limit, of(&memory.stat, "inactive_file")),
            (4096, u64::MAX, 2)
        );
        assert_eq!(stats.memory_events.unwrap().oom_kill, 3);
        assert_eq!(stats.pids, Some(v1::PidsStats { current: 5, limit: 0 }));
        let disk = &stats.io[0];
        assert_eq!((disk.major, disk.rbytes, disk.wios, disk.dios), (254, 1, 4, 6));
    }

    #[test]
    fn reads_version_1_in_the_same_units() {
        let hierarchies = [
            directory(&[("cpuacct.usage", "30000\n"), ("cpuacct.stat", "user 2\nsystem 1\n")]),
            directory(&[("cpu.stat", "nr_periods 1\nnr_throttled 2\nthrottled_time 3000\n")]),
            directory(&[
                ("memory.usage_in_bytes", "4096\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.memsw.usage_in_bytes", "5000\n"),
                ("memory.stat", "cache 1\ntotal_cache 7\ntotal_inactive_file 2\n"),
                ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
            ]),
            directory(&[
                ("blkio.throttle.io_service_bytes_recursive", "8:0 Read 1\n8:0 Write 2\nTotal 3\n"),
                ("blkio.throttle.io_serviced_recursive", "8:0 Read 4\n"),
            ]),
        ];
        let mut stats = v1::StatsResponse::default();
        for hierarchy in &hierarchies {
            add(&mut stats, hierarchy.path()).unwrap();
        }
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.throttled_usec), (30, 20_000, 3));
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage, memory.usage_limit, memory.swap_usage), (4096, u64::MAX, 904));
        assert_eq!((of(&memory.stat, "file"), of(&memory.stat, "inactive_file")), (7, 2));
        assert_eq!(stats.memory_events.unwrap().oom_kill, 3);
        let [disk] = &stats.io[..] else { panic!("{:?}", stats.io) };
        assert_eq!((disk.major, disk.rbytes, disk.wbytes, disk.rios), (8, 1, 2, 4));
    }

    #[test]
    fn a_group_without_controllers_tells_nothing() {
        assert_eq!(unified(directory(&[]).path()).unwrap(), v1::StatsResponse::default());
    }
}
