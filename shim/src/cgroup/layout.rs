//! The control group hierarchies that the node has mounted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::CgroupError;
use crate::mountinfo::{self, Mount};

/// Whether the node is one of version 2 to containerd, which asks no more than what is mounted here.
pub fn is_unified() -> bool {
    const CGROUP2_SUPER_MAGIC: rustix::fs::FsWord = 0x6367_7270;
    rustix::fs::statfs("/sys/fs/cgroup").is_ok_and(|mounted| mounted.f_type == CGROUP2_SUPER_MAGIC)
}

/// What a hierarchy is there for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Version 2: all controllers that version 1 has not taken.
    Unified,
    /// Version 1, with these controllers (or a name, as `name=systemd`).
    Controllers(Vec<String>),
}

/// Options of version 1's mounts that are no controllers.
const OPTIONS: [&str; 7] =
    ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "favordynmods"];

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) root: PathBuf,
    pub(super) kind: Kind,
}

impl Hierarchy {
    /// Whether it is of version 1, with this controller.
    pub(super) fn has(&self, controller: &str) -> bool {
        matches!(&self.kind, Kind::Controllers(names) if names.iter().any(|name| name == controller))
    }
}

/// All hierarchies, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) hierarchies: Vec<Hierarchy>,
}

impl Layout {
    /// What this node has: version 2 alone, or version 1's hierarchies and maybe version 2 beside them.
    ///
    /// # Errors
    /// When none is mounted, or the mount table cannot be read.
    pub fn of_host() -> Result<Layout, CgroupError> {
        let table = mountinfo::read().map_err(super::at("read", Path::new(mountinfo::PATH)))?;
        Layout::of(mountinfo::parse(&table)).ok_or(CgroupError::NoHierarchy)
    }

    /// Chooses among mounts. Hierarchies that are mounted from below their root are somebody's view of a part, and left
    /// out.
    fn of(mounts: impl Iterator<Item = Mount>) -> Option<Layout> {
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        for mount in mounts.filter(|mount| mount.root == Path::new("/")) {
            let kind = match mount.kind.as_str() {
                "cgroup2" => Kind::Unified,
                "cgroup" => {
                    let names = mount.options.split(',').filter(|option| !OPTIONS.contains(option));
                    Kind::Controllers(names.filter(|name| !name.contains('/')).map(str::to_owned).collect())
                }
                _ => continue,
            };
            if hierarchies.iter().all(|known| known.kind != kind) {
                hierarchies.push(Hierarchy { root: mount.point, kind });
            }
        }
        (!hierarchies.is_empty()).then_some(Layout { hierarchies })
    }

    /// The hierarchy of version 2.
    pub(super) fn unified(&self) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|hierarchy| hierarchy.kind == Kind::Unified)
    }

    /// Whether version 2 is all there is.
    pub fn is_unified(&self) -> bool {
        self.unified().is_some() && self.hierarchies.len() == 1
    }

    /// Where the calling process is in each hierarchy (cgroups(7)), as directories.
    pub(super) fn own(&self) -> io::Result<Vec<PathBuf>> {
        let text = fs::read_to_string("/proc/self/cgroup")?;
        let mut own = Vec::new();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(names), Some(path)) = (fields.next(), fields.next()) else { continue };
            let kind = match names {
                "" => Kind::Unified,
                names => Kind::Controllers(names.split(',').map(str::to_owned).collect()),
            };
            let hierarchy = self.hierarchies.iter().find(|hierarchy| hierarchy.kind == kind);
            own.extend(hierarchy.map(|hierarchy| hierarchy.root.join(path.trim_start_matches('/'))));
        }
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "\
        31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        33 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,favordynmods,memory\n\
        34 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x/y,name=systemd\n\
        35 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        36 31 0:32 /docker/1 /other/memory rw - cgroup cgroup rw,memory\n\
        37 31 0:32 / /again/memory rw - cgroup cgroup rw,favordynmods,memory\n";

    fn parsed(table: &str) -> Option<Layout> {
        Layout::of(mountinfo::parse(table.as_bytes()))
    }

    #[test]
    fn version_2_alone() {
        let layout = parsed(V2).unwrap();
        assert!(layout.is_unified());
        assert_eq!(layout.unified().unwrap().root, Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn version_1_and_both() {
        let layout = parsed(V1).unwrap();
        assert!(!layout.is_unified());
        let roots: Vec<_> =
            layout.hierarchies.iter().map(|hierarchy| hierarchy.root.to_str().unwrap()).collect();
        assert_eq!(
            roots,
            ["cpu,cpuacct", "memory", "systemd", "unified"].map(|name| format!("/sys/fs/cgroup/{name}"))
        );
        assert!(layout.hierarchies[0].has("cpuacct") && !layout.hierarchies[0].has("memory"));
        assert!(layout.hierarchies[2].has("name=systemd"));
    }

    #[test]
    fn none_at_all() {
        assert_eq!(parsed("22 27 0:21 / /proc rw - proc proc rw\n nonsense"), None);
    }

    #[test]
    fn finds_itself() {
        let layout = Layout::of_host().unwrap();
        let own = layout.own().unwrap();
        assert_eq!(own.len(), layout.hierarchies.len());
        let process = std::process::id().to_string();
        for directory in own {
            let members = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
            assert!(members.lines().any(|line| line == process), "{directory:?}");
        }
    }
}
