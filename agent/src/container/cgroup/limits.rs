//! The specification's resources as contents of a control group's files.

use std::fs;
use std::io;
use std::path::Path;

use crate::container::Error;
use crate::oci::Resources;
use crate::oci::resources::{BlockIo, Cpu, HugepageLimit, Memory, Rdma, ThrottleDevice};

/// A file to be written for a member of the specification.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    field: String,
    file: String,
    value: String,
}

impl Setting {
    fn new(field: &str, file: &str, value: impl ToString) -> Setting {
        Setting { field: format!("linux.resources.{field}"), file: file.to_owned(), value: value.to_string() }
    }
}

/// Writes what `resources` asks for into the control group `path`.
///
/// # Errors
/// The member at fault; earlier members stay written.
pub(super) fn apply(path: &Path, resources: &Resources) -> Result<(), Error> {
    let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let mut settings = Vec::new();
    if let Some(cpu) = &resources.cpu {
        cpu_settings(cpu, &mut settings);
    }
    if let Some(memory) = &resources.memory {
        check_usage(memory, &read("memory.current"))?;
        memory_settings(memory, &read("memory.max"), &mut settings)?;
    }
    if let Some(limit) = resources.pids.as_ref().and_then(|pids| pids.limit) {
        settings.push(Setting::new("pids.limit", "pids.max", maximum(limit)));
    }
    if let Some(io) = &resources.block_io {
        let bfq = path.join("io.bfq.weight").exists();
        io_settings(io, bfq, &mut settings);
    }
    hugepage_settings(&resources.hugepage_limits, &mut settings);
    for (device, limit) in &resources.rdma {
        settings.push(rdma_setting(device, limit));
    }
    for (file, value) in &resources.unified {
        settings.push(Setting::new(&format!("unified[{file}]"), file, value));
    }
    settings.iter().try_for_each(|setting| write(path, setting))
}

fn write(path: &Path, setting: &Setting) -> Result<(), Error> {
    let failed = |source: io::Error| {
        let action = format!("write {:?} to {}", setting.value, setting.file);
        Error::apply(setting.field.clone(), action)(source)
    };
    // Opening what is not there reads as a lack of permission; that it is not there says more.
    if !path.join(&setting.file).exists() {
        // A kernel without swap gives nobody any.
        let idle = setting.file == "memory.swap.max" && matches!(setting.value.as_str(), "0" | "max");
        return if idle { Ok(()) } else { Err(failed(io::Error::from_raw_os_error(libc::ENOENT))) };
    }
    fs::write(path.join(&setting.file), &setting.value).map_err(failed)
}

/// 0 or less is no limit.
fn maximum(limit: i64) -> String {
    if limit > 0 { limit.to_string() } else { "max".to_owned() }
}

fn cpu_settings(cpu: &Cpu, settings: &mut Vec<Setting>) {
    if let Some(shares) = cpu.shares.filter(|&shares| shares != 0) {
        settings.push(Setting::new("cpu.shares", "cpu.weight", weight_of_shares(shares)));
    }
    // A burst above the quota is refused whichever comes first, so a smaller one is written first as well.
    if let Some(quota) = cpu.quota.filter(|&quota| quota != 0) {
        let period =
            cpu.period.filter(|&period| period != 0).map(|period| format!(" {period}")).unwrap_or_default();
        settings.push(Setting::new("cpu.quota", "cpu.max", maximum(quota) + &period));
    } else if let Some(period) = cpu.period.filter(|&period| period != 0) {
        settings.push(Setting::new("cpu.period", "cpu.max", format!("max {period}")));
    }
    if let Some(burst) = cpu.burst {
        settings.push(Setting::new("cpu.burst", "cpu.max.burst", burst));
    }
    if let Some(idle) = cpu.idle {
        settings.push(Setting::new("cpu.idle", "cpu.idle", idle));
    }
    if !cpu.cpus.is_empty() {
        settings.push(Setting::new("cpu.cpus", "cpuset.cpus", &cpu.cpus));
    }
    if !cpu.mems.is_empty() {
        settings.push(Setting::new("cpu.mems", "cpuset.mems", &cpu.mems));
    }
}

/// cgroup v1 shares (2 to 262,144, default 1,024) as a v2 weight (1 to 10,000, default 100): a curve through the
/// three pairs of minima, defaults and maxima, so that a container with default shares competes as others with a
/// default weight do.
pub fn weight_of_shares(shares: u64) -> u64 {
    #[allow(clippy::cast_precision_loss)] // At most 18 bits.
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Within 1 and 10,000.
    let weight = (10_f64.powf(exponent) - 1e-9).ceil() as u64;
    weight.clamp(1, 10_000)
}

fn check_usage(memory: &Memory, current: &str) -> Result<(), Error> {
    let usage: i64 = current.trim().parse().unwrap_or(0);
    match memory.limit {
        Some(limit) if memory.check_before_update == Some(true) && limit > 0 && limit < usage => {
            let reason = format!("{limit} is less than the {usage} bytes in use");
            Err(Error::invalid("linux.resources.memory.limit", reason))
        }
        _ => Ok(()),
    }
}

fn memory_settings(memory: &Memory, current_max: &str, settings: &mut Vec<Setting>) -> Result<(), Error> {
    let limit = memory.limit.filter(|&limit| limit != 0);
    if let Some(swap) = memory.swap.filter(|&swap| swap != 0) {
        // The specification counts memory and swap together, the file swap alone.
        let limit = limit.or_else(|| current_max.trim().parse().ok()).filter(|&limit| limit > 0);
        let value = match limit {
            _ if swap < 0 => "max".to_owned(),
            Some(limit) if limit <= swap => swap.saturating_sub(limit).to_string(),
            Some(limit) => {
                let reason = format!("{swap} is less than the memory limit, {limit}");
                return Err(Error::invalid("linux.resources.memory.swap", reason));
            }
            None => return Err(Error::invalid("linux.resources.memory.swap", "there is no memory limit")),
        };
        settings.push(Setting::new("memory.swap", "memory.swap.max", value));
    } else if limit.is_some_and(|limit| limit < 0) {
        // No limit for memory alone would be none.
        settings.push(Setting::new("memory.limit", "memory.swap.max", "max"));
    }
    if let Some(limit) = limit {
        settings.push(Setting::new("memory.limit", "memory.max", maximum(limit)));
    }
    if let Some(reservation) = memory.reservation.filter(|&reservation| reservation != 0) {
        settings.push(Setting::new("memory.reservation", "memory.low", maximum(reservation)));
    }
    Ok(())
}

fn io_settings(io: &BlockIo, bfq: bool, settings: &mut Vec<Setting>) {
    // BFQ takes 1 to 1,000 as the specification does, io.weight 1 to 10,000.
    let file = if bfq { "io.bfq.weight" } else { "io.weight" };
    let scaled = |weight: u16| if bfq { u32::from(weight) } else { weight_of_blkio(weight) };
    if let Some(weight) = io.weight.filter(|&weight| weight != 0) {
        settings.push(Setting::new("blockIO.weight", file, scaled(weight)));
    }
    for device in &io.weight_device {
        if let Some(weight) = device.weight.filter(|&weight| weight != 0) {
            let value = format!("{}:{} {}", device.major, device.minor, scaled(weight));
            settings.push(Setting::new("blockIO.weightDevice", file, value));
        }
    }
    let throttles = [
        ("throttleReadBpsDevice", "rbps", &io.throttle_read_bps_device),
        ("throttleWriteBpsDevice", "wbps", &io.throttle_write_bps_device),
        ("throttleReadIOPSDevice", "riops", &io.throttle_read_iops_device),
        ("throttleWriteIOPSDevice", "wiops", &io.throttle_write_iops_device),
    ];
    for (field, key, devices) in throttles {
        for ThrottleDevice { major, minor, rate } in devices {
            let rate = if *rate == 0 { "max".to_owned() } else { rate.to_string() };
            let value = format!("{major}:{minor} {key}={rate}");
            settings.push(Setting::new(&format!("blockIO.{field}"), "io.max", value));
        }
    }
}

/// cgroup v1 block I/O weight (10 to 1,000) as io.weight (1 to 10,000), linear.
fn weight_of_blkio(weight: u16) -> u32 {
    1 + u32::from(weight.clamp(10, 1_000) - 10) * 9_999 / 990
}

fn hugepage_settings(limits: &[HugepageLimit], settings: &mut Vec<Setting>) {
    for HugepageLimit { page_size, limit } in limits {
        // The reservation is what mmap(2) is refused by; without it the process gets a SIGBUS later.
        for file in ["max", "rsvd.max"] {
            let file = format!("hugetlb.{page_size}.{file}");
            settings.push(Setting::new("hugepageLimits", &file, limit));
        }
    }
}

fn rdma_setting(device: &str, limit: &Rdma) -> Setting {
    let value = |limit: Option<u32>| limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string());
    let line =
        format!("{device} hca_handle={} hca_object={}", value(limit.hca_handles), value(limit.hca_objects));
    Setting::new("rdma", "rdma.max", line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(settings: &[Setting]) -> Vec<(&str, &str)> {
        settings.iter().map(|setting| (setting.file.as_str(), setting.value.as_str())).collect()
    }

    #[test]
    fn shares_meet_weights_at_the_ends_and_the_defaults() {
        assert_eq!([0, 2, 1024, 262_144, u64::MAX].map(weight_of_shares), [1, 1, 100, 10_000, 10_000]);
    }

    #[test]
    fn cpu_time_is_a_quota_of_a_period() {
        let mut settings = Vec::new();
        cpu_settings(&Cpu { quota: Some(50_000), period: Some(100_000), ..Cpu::default() }, &mut settings);
        cpu_settings(&Cpu { quota: Some(-1), ..Cpu::default() }, &mut settings);
        cpu_settings(&Cpu { shares: Some(0), ..Cpu::default() }, &mut settings);
        assert_eq!(values(&settings), [("cpu.max", "50000 100000"), ("cpu.max", "max")]);
    }

    #[test]
    fn swap_is_what_the_two_together_exceed_memory_by() {
        let memory = |limit, swap| Memory { limit, swap, ..Memory::default() };
        let swap = |memory: Memory, current: &str| {
            let mut settings = Vec::new();
            memory_settings(&memory, current, &mut settings).map(|()| {
                settings.into_iter().find(|s| s.file == "memory.swap.max").map(|setting| setting.value)
            })
        };
        assert_eq!(swap(memory(Some(100), Some(100)), "").unwrap().as_deref(), Some("0"));
        assert_eq!(swap(memory(Some(100), Some(150)), "").unwrap().as_deref(), Some("50"));
        assert_eq!(swap(memory(None, Some(150)), "100\n").unwrap().as_deref(), Some("50"));
        assert_eq!(swap(memory(Some(100), Some(-1)), "").unwrap().as_deref(), Some("max"));
        assert_eq!(swap(memory(Some(100), None), "").unwrap(), None);
        assert!(swap(memory(Some(100), Some(50)), "").is_err());
        assert!(swap(memory(None, Some(50)), "max\n").is_err());
    }

    #[test]
    fn a_limit_below_the_usage_is_refused_when_asked_to() {
        let memory = Memory { limit: Some(10), check_before_update: Some(true), ..Memory::default() };
        assert!(check_usage(&memory, "11\n").is_err());
        assert!(check_usage(&memory, "10\n").is_ok());
    }

    proptest! {
        #[test]
        fn more_shares_are_never_less_weight(a in 2..=262_144_u64, b in 2..=262_144_u64) {
            prop_assert_eq!(weight_of_shares(a.min(b)) <= weight_of_shares(a.max(b)), true);
        }
    }
}
