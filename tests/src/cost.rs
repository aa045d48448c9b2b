//! What a pod costs: the time of each call of its life, and the memory of the processes that it needs.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, Cri, Pod},
};

/// The processes of a pod in a machine of its own, by the names of their files.
const PROCESSES: [&str; 2] = [SHIM, "caisson-vmm"];
const SHIM: &str = "containerd-shim-caisson-v2";

/// How long each call took, in the order of a pod's life.
#[derive(Clone, Debug, Default)]
pub struct Times(pub Vec<(&'static str, Duration)>);

impl Times {
    /// From the request of the pod to its container's start.
    pub fn until_started(&self) -> Duration {
        self.0.iter().filter(|(call, _)| STARTING.contains(call)).map(|(_, time)| *time).sum()
    }
}

/// The names of the calls that start a pod.
const STARTING: [&str; 3] = ["run_pod_sandbox", "create_container", "start_container"];

/// A pod with one busybox in it, started through this handler.
///
/// # Errors
/// CRI's own.
pub async fn start_pod(cri: &mut Cri, name: &str, handler: &str) -> Result<(Pod, String, Times)> {
    let mut clock = Clock::start();
    let pod = cri.run_pod(cri::pod_config(name), handler).await?;
    let [sandbox, create, start] = STARTING;
    clock.lap(sandbox);
    let config = cri::container_config("busybox", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let container = cri.create_container(&pod, config).await?;
    clock.lap(create);
    cri.start_container(&container).await?;
    clock.lap(start);
    Ok((pod, container, clock.times))
}

/// Starts a pod, lets its container run a command, removes it.
///
/// # Errors
/// CRI's own.
pub async fn a_pods_life(cri: &mut Cri, name: &str, handler: &str) -> Result<Times> {
    let (pod, container, times) = start_pod(cri, name, handler).await?;
    let mut clock = Clock { times, since: Instant::now() };
    cri.exec(&container, &["true"]).await?;
    clock.lap("exec");
    cri.remove_pod(&pod).await?;
    clock.lap("remove");
    Ok(clock.times)
}

struct Clock {
    times: Times,
    since: Instant,
}

impl Clock {
    fn start() -> Self {
        Self { times: Times::default(), since: Instant::now() }
    }

    fn lap(&mut self, call: &'static str) {
        let now = Instant::now();
        self.times.0.push((call, now - self.since));
        self.since = now;
    }
}

/// What the shim says of the time that something took, by the message of its line in containerd's log.
pub mod timed {
    /// A pod's machine and all around it: most of RunPodSandbox.
    pub const START: &str = "the pod is up";
    /// A container's removal.
    pub const REMOVE_CONTAINER: &str = "removed";
    /// A machine's end in order.
    pub const STOP: &str = "the machine is stopped";
    /// The undoing of all that a pod has on the host.
    pub const UNDO: &str = "the pod is undone";
}

/// The parts of each time that our shim logs under this message, in milliseconds:
/// `the pod is up phases=260.1 ms (cgroup 1.2, share 5.0, …)`.
pub fn phases<'a>(log: &'a str, message: &str) -> Vec<Vec<(&'a str, f64)>> {
    let message = format!("{message} ");
    let lines = log.lines().filter(|line| line.contains(&message));
    let lists = lines.filter_map(|line| Some(line.split_once(" ms (")?.1.split_once(')')?.0));
    lists.map(|list| list.split(", ").filter_map(phase).collect()).collect()
}

fn phase(part: &str) -> Option<(&str, f64)> {
    let (name, time) = part.split_once(' ')?;
    Some((name, time.parse().ok()?))
}

/// The proportional set size of all pods' processes, in KiB by the name of their file: memory that several processes
/// share counts for each by its part. A machine's memory is its VMM's.
///
/// # Errors
/// When `/proc` can't be read.
pub fn pss_kib() -> Result<BTreeMap<&'static str, u64>> {
    held_kib("Pss:")
}

/// The resident set size of all pods' shims, in KiB.
///
/// # Errors
/// When `/proc` can't be read.
pub fn shims_rss_kib() -> Result<u64> {
    Ok(held_kib("Rss:")?.get(SHIM).copied().unwrap_or_default())
}

/// What all pods' processes hold, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Their proportional set size.
    pub pss: u64,
    /// Memory that no other process maps.
    pub private: u64,
}

impl Memory {
    /// That of all pods of ours.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn of_pods() -> Result<Self> {
        let sum = |field| Ok::<u64, anyhow::Error>(held_kib(field)?.values().sum());
        Ok(Self { pss: sum("Pss:")?, private: sum("Private_Clean:")? + sum("Private_Dirty:")? })
    }
}

/// The memory that could be had without swapping, in KiB: `MemAvailable` of proc_meminfo(5).
///
/// # Errors
/// When the kernel does not tell.
pub fn available_kib() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).context("no MemAvailable")
}

/// The sums of a field of `/proc/PID/smaps_rollup` (proc_pid_smaps(5)).
fn held_kib(field: &str) -> Result<BTreeMap<&'static str, u64>> {
    let mut found = BTreeMap::new();
    for (name, pid) in processes()? {
        // One that has ended since holds nothing.
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let held = rollup.lines().find_map(|line| line.strip_prefix(field));
        let held = held.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
        *found.entry(name).or_default() += held;
    }
    Ok(found)
}

/// All pods' processes, by the names of their files.
///
/// # Errors
/// When `/proc` can't be read.
pub fn processes() -> Result<Vec<(&'static str, u32)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let entry = entry.context("reading /proc")?;
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        found.extend(name_of(&entry.path()).zip(pid));
    }
    Ok(found)
}

/// Which of a pod's programs a process runs. In a jail the link's path is another, and its last part the same.
fn name_of(process: &Path) -> Option<&'static str> {
    let program = fs::read_link(process.join("exe")).ok()?;
    let program = program.file_name()?.to_string_lossy().into_owned();
    PROCESSES.into_iter().find(|name| program == *name || program == format!("{name} (deleted)"))
}
