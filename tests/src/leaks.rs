//! What a machine holds that a container can leave behind, and what came on top since.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// How long after the last call the machine may still be tidying up: the kernel frees namespaces, and with them
/// veth pairs and mounts, from a work queue.
const SETTLE: Duration = Duration::from_secs(15);

/// Everything of this machine that a container can leave behind.
///
/// Processes are told by name alone, as their ids differ from one look to the next; kernel threads are not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    processes: BTreeMap<String, usize>,
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    links: BTreeSet<String>,
    netns: BTreeSet<String>,
    devices: BTreeSet<String>,
    qdiscs: BTreeSet<String>,
    files: BTreeSet<String>,
}

/// Where runtimes have entries for what lives, each with the name of such an entry: our pods' directories, our claims of
/// ids, all shims' sockets, and memory that has a name.
const DIRECTORIES: [(&str, &str); 4] = [
    ("pod directory", "/run/caisson"),
    ("claim of ids", "/run/caisson-ids"),
    ("shim's socket", "/run/containerd/s"),
    ("shared memory", "/dev/shm"),
];

impl Holdings {
    /// Looks at the machine as it is now.
    ///
    /// # Errors
    /// When `/proc` or `/sys` can't be read.
    pub fn now() -> Result<Self> {
        Ok(Self {
            processes: processes()?,
            mounts: mounts()?,
            cgroups: subdirectories(Path::new("/sys/fs/cgroup")),
            links: names("/sys/class/net")?,
            netns: names("/run/netns").unwrap_or_default(),
            devices: devices()?,
            qdiscs: qdiscs()?,
            files: files(),
        })
    }

    /// Waits for the machine to hold nothing that it does not hold in `self`.
    ///
    /// # Errors
    /// When something is still there after a while; the error lists it.
    pub fn assert_nothing_added(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let added = Self::now()?.since(self);
            if added.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left behind: {added}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn since(&self, before: &Self) -> Added {
        let mut added = Vec::new();
        for (name, count) in &self.processes {
            let had = before.processes.get(name).copied().unwrap_or(0);
            if *count > had {
                added.push(format!("{} process(es) {name}", count - had));
            }
        }
        for (kind, now, had) in [
            ("mount", &self.mounts, &before.mounts),
            ("cgroup", &self.cgroups, &before.cgroups),
            ("network link", &self.links, &before.links),
            ("network namespace", &self.netns, &before.netns),
            ("block device", &self.devices, &before.devices),
            ("qdisc", &self.qdiscs, &before.qdiscs),
        ] {
            added.extend(now.difference(had).map(|name| format!("{kind} {name}")));
        }
        added.extend(self.files.difference(&before.files).cloned());
        Added(added)
    }
}

/// What one look found on top of another.
struct Added(Vec<String>);

impl Added {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Added {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// Unmounts every mount below a directory, the last mounted first.
///
/// # Errors
/// When the mount table can't be read, or a mount is busy.
pub fn unmount_below(directory: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    let points: Vec<_> = table.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    for point in points.into_iter().rev().filter(|point| Path::new(point).starts_with(directory)) {
        let status = Command::new("umount").arg(point).status().context("starting umount")?;
        ensure!(status.success(), "unmounting {point}: {status}");
    }
    Ok(())
}

/// Removes a cgroup and all below it; it is no error if there is none.
///
/// # Errors
/// When a process is still in it.
pub fn remove_cgroup(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    // Children sort after their parents, so backwards is bottom up.
    for child in subdirectories(root).iter().rev() {
        fs::remove_dir(child).with_context(|| format!("removing the cgroup {child}"))?;
    }
    fs::remove_dir(root).with_context(|| format!("removing the cgroup {}", root.display()))
}

fn processes() -> Result<BTreeMap<String, usize>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let path = entry?.path();
        let is_process =
            path.file_name().is_some_and(|n| n.to_string_lossy().bytes().all(|b| b.is_ascii_digit()));
        if !is_process {
            continue;
        }
        // A process may end between the two reads; a kernel thread has no command line, nor has a zombie, which
        // counts: someone failed to reap it.
        let (Ok(status), Ok(cmdline)) =
            (fs::read_to_string(path.join("status")), fs::read(path.join("cmdline")))
        else {
            continue;
        };
        let field = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
        let zombie = field("State:").is_some_and(|s| s.starts_with('Z'));
        if cmdline.is_empty() && !zombie {
            continue;
        }
        let name = field("Name:").unwrap_or("?");
        let name = if zombie { format!("{name} (zombie)") } else { name.to_owned() };
        *found.entry(name).or_default() += 1;
    }
    Ok(found)
}

fn mounts() -> Result<BTreeSet<String>> {
    let table = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect())
}

fn names(directory: &str) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(directory).with_context(|| format!("reading {directory}"))?;
    Ok(entries.filter_map(Result::ok).map(|e| e.file_name().to_string_lossy().into_owned()).collect())
}

fn subdirectories(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        // A cgroup may vanish while we look.
        for entry in fs::read_dir(&directory).into_iter().flatten().filter_map(Result::ok) {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                found.insert(entry.path().to_string_lossy().into_owned());
                pending.push(entry.path());
            }
        }
    }
    found
}

/// Loop devices that are bound to a file, and all of the device mapper.
fn devices() -> Result<BTreeSet<String>> {
    let in_use = |name: &String| {
        let device = Path::new("/sys/block").join(name);
        device.join("loop/backing_file").exists() || device.join("dm").exists()
    };
    Ok(names("/sys/block")?.into_iter().filter(in_use).collect())
}

/// The queueing disciplines of this machine's interfaces: kind, number and interface of each. Those of other namespaces go
/// with them.
fn qdiscs() -> Result<BTreeSet<String>> {
    let output = Command::new("tc").args(["qdisc", "show"]).output().context("starting tc")?;
    ensure!(output.status.success(), "tc: {}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8_lossy(&output.stdout);
    // "qdisc ingress ffff: dev eth0 …"; what comes then counts users, too.
    let named = |line: &str| line.split_whitespace().skip(1).take(4).collect::<Vec<_>>().join(" ");
    Ok(table.lines().map(named).collect())
}

/// The entries of [`DIRECTORIES`], each behind what it is.
fn files() -> BTreeSet<String> {
    let of = |(kind, directory): (&str, &str)| {
        // Made with the first entry, and some gone with the last.
        let names = names(directory).unwrap_or_default();
        names.into_iter().map(move |name| format!("{kind} {directory}/{name}")).collect::<Vec<_>>()
    };
    DIRECTORIES.into_iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(mounts: &[&str], shims: usize) -> Holdings {
        Holdings {
            mounts: mounts.iter().map(ToString::to_string).collect(),
            processes: [("shim".to_owned(), shims)].into(),
            ..Holdings::default()
        }
    }

    #[test]
    fn names_what_was_added() {
        let added = holding(&["/", "/run/x"], 2).since(&holding(&["/"], 1));
        assert_eq!(added.to_string(), "1 process(es) shim, mount /run/x");
    }

    #[test]
    fn names_what_was_not_removed() {
        let files = ["shim's socket /run/containerd/s/abc".to_owned()].into();
        let now = Holdings { files, qdiscs: ["ingress ffff: dev x".to_owned()].into(), ..holding(&[], 0) };
        let added = now.since(&Holdings::default()).to_string();
        assert_eq!(added, "qdisc ingress ffff: dev x, shim's socket /run/containerd/s/abc");
    }

    #[test]
    fn what_went_away_is_no_leak() {
        assert!(holding(&["/"], 0).since(&holding(&["/", "/run/x"], 1)).is_empty());
    }
}
