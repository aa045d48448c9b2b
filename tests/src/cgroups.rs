//! This machine's control groups, of whichever version it has.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Where the hierarchies are mounted.
const MOUNTS: &str = "/sys/fs/cgroup";

/// A mounted hierarchy.
#[derive(Clone, Debug)]
struct Hierarchy {
    root: PathBuf,
    /// As proc_pid_cgroup(5) names it: version 1's controllers, empty for version 2.
    controllers: String,
}

/// The hierarchies: one of version 2, or version 1's and perhaps one of version 2 beside them.
fn hierarchies() -> Result<Vec<Hierarchy>> {
    let table = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    let mounted = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let root = fields.next().filter(|root| Path::new(root).starts_with(MOUNTS))?;
        // Version 1 is mounted as `root/CONTROLLERS`, which is also what the kernel calls it, but for systemd's own.
        let controllers = match (fields.next()?, root.rsplit('/').next()?) {
            ("cgroup2", _) => String::new(),
            ("cgroup", "systemd") => "name=systemd".to_owned(),
            ("cgroup", name) => name.to_owned(),
            _ => return None,
        };
        Some(Hierarchy { root: root.into(), controllers })
    };
    Ok(table.lines().filter_map(mounted).collect())
}

/// Whether version 2 is all there is.
#[must_use]
pub fn is_unified() -> bool {
    Path::new(MOUNTS).join("cgroup.controllers").exists()
}

/// A group's directories, one in each hierarchy.
///
/// # Errors
/// When the mount table can't be read.
pub fn directories(group: &str) -> Result<Vec<PathBuf>> {
    let group = group.trim_start_matches('/');
    Ok(hierarchies()?.into_iter().map(|hierarchy| hierarchy.root.join(group)).collect())
}

/// The groups that a process or thread is in, by its directory in `/proc`: one in each hierarchy.
///
/// # Errors
/// When there is none.
pub fn of(process: &Path) -> Result<BTreeSet<PathBuf>> {
    let path = process.join("cgroup");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let hierarchies = hierarchies()?;
    let groups = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let hierarchy = hierarchies.iter().find(|hierarchy| hierarchy.controllers == controllers)?;
        Some(hierarchy.root.join(group.trim_start_matches('/')))
    });
    Ok(groups.collect())
}

/// A group of a test's own, which is removed at its end.
#[derive(Debug)]
pub struct Group {
    name: String,
}

impl Group {
    /// Makes it in each hierarchy.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn make(name: &str) -> Result<Self> {
        for directory in directories(name)? {
            fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        }
        Ok(Self { name: name.to_owned() })
    }

    /// Its name, as in a specification's `cgroupsPath`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory in version 2's hierarchy, or in that of one of version 1's controllers.
    #[must_use]
    pub fn directory(&self, controller: &str) -> PathBuf {
        let hierarchy = Path::new(MOUNTS).join(if is_unified() { "" } else { controller });
        hierarchy.join(self.name.trim_start_matches('/'))
    }

    /// Limits its memory to so many bytes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit_memory(&self, bytes: i64) -> Result<()> {
        let file = if is_unified() { "memory.max" } else { "memory.limit_in_bytes" };
        let path = self.directory("memory").join(file);
        fs::write(&path, bytes.to_string()).with_context(|| format!("writing to {}", path.display()))
    }

    /// The most memory that was ever used in it, in bytes.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn memory_peak(&self) -> Result<u64> {
        let file = if is_unified() { "memory.peak" } else { "memory.max_usage_in_bytes" };
        let text = fs::read_to_string(self.directory("memory").join(file))?;
        text.trim().parse().with_context(|| text.clone())
    }

    /// How many processes the kernel has killed as it was out of memory.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn oom_kills(&self) -> Result<u64> {
        let file = if is_unified() { "memory.events" } else { "memory.oom_control" };
        // Version 1 counts each group's own; the pod's is below this one.
        let mut groups = vec![self.directory("memory")];
        let below = fs::read_dir(self.directory("memory"))?.flatten().map(|entry| entry.path());
        groups.extend(below.filter(|path| !is_unified() && path.is_dir()));
        let mut kills = 0;
        for group in groups {
            let text = fs::read_to_string(group.join(file))?;
            let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
            kills += count.and_then(|count| count.parse::<u64>().ok()).with_context(|| text.clone())?;
        }
        Ok(kills)
    }

    /// Stops all that is in it and all that comes, or lets it go on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let (file, word) = match (is_unified(), frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        let path = self.directory("freezer").join(file);
        fs::write(&path, word).with_context(|| format!("writing to {}", path.display()))
    }

    /// Removes it, empty as it must be.
    ///
    /// # Errors
    /// When something is in it.
    pub fn remove(self) -> Result<()> {
        for directory in directories(&self.name)? {
            fs::remove_dir(&directory).with_context(|| format!("removing {}", directory.display()))?;
        }
        Ok(())
    }
}
