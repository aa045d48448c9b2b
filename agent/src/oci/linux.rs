//! The `linux` object.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::json::{members, names};
use super::{Resources, Seccomp};

/// Linux-specific configuration.
#[derive(Clone, Debug, Default)]
pub struct Linux {
    /// Namespaces that are not the runtime's.
    pub namespaces: Vec<Namespace>,
    /// User id mappings of a new user namespace.
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of a new user namespace.
    pub gid_mappings: Vec<IdMapping>,
    /// Clock offsets of a new time namespace, by clock: "monotonic", "boottime".
    pub time_offsets: BTreeMap<String, TimeOffset>,
    /// Device nodes to be made, beside the default ones.
    pub devices: Vec<Device>,
    /// Path of the control group; the runtime places all its containers itself, and this is kept only.
    pub cgroups_path: String,
    /// Control group limits.
    pub resources: Option<Resources>,
    /// Sub-directory name under resctrl; refused, no guest has RDT.
    pub intel_rdt: Option<serde_json::Value>,
    /// Memory policy of the first process; refused.
    pub memory_policy: Option<serde_json::Value>,
    /// Network devices to be moved in; refused, the pod owns its network.
    pub net_devices: BTreeMap<String, serde_json::Value>,
    /// Kernel parameters, dotted names.
    pub sysctl: BTreeMap<String, String>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Propagation of the root mount: "shared", "slave", "private", "unbindable", or recursive forms of these.
    pub rootfs_propagation: String,
    /// Paths that can not be read.
    pub masked_paths: Vec<PathBuf>,
    /// Paths that can not be written.
    pub readonly_paths: Vec<PathBuf>,
    /// SELinux label of the mounts.
    pub mount_label: String,
    /// Execution domain.
    pub personality: Option<Personality>,
}

members! { Linux {
    "namespaces": namespaces, "uidMappings": uid_mappings, "gidMappings": gid_mappings,
    "timeOffsets": time_offsets, "devices": devices, "cgroupsPath": cgroups_path, "resources": resources,
    "intelRdt": intel_rdt, "memoryPolicy": memory_policy, "netDevices": net_devices, "sysctl": sysctl,
    "seccomp": seccomp, "rootfsPropagation": rootfs_propagation, "maskedPaths": masked_paths,
    "readonlyPaths": readonly_paths, "mountLabel": mount_label, "personality": personality,
} }

impl Linux {
    /// The namespace of this kind, if the container does not share the runtime's.
    pub(crate) fn namespace(&self, kind: NamespaceKind) -> Option<&Namespace> {
        self.namespaces.iter().find(|namespace| namespace.kind == kind)
    }

    /// Whether the container gets a new namespace of this kind.
    pub(crate) fn creates(&self, kind: NamespaceKind) -> bool {
        self.namespace(kind).is_some_and(|namespace| namespace.path.is_none())
    }
}

/// A namespace to be made or, with a path, to be joined.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    /// Which kind.
    pub kind: NamespaceKind,
    /// An nsfs file, absolute.
    pub path: Option<PathBuf>,
}

members! { Namespace { required "type": kind, "path": path } }

/// Kinds of namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // Named as in the specification and namespaces(7).
pub enum NamespaceKind {
    #[default]
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

names! { NamespaceKind {
    "pid": Pid, "network": Network, "mount": Mount, "ipc": Ipc, "uts": Uts, "user": User, "cgroup": Cgroup,
    "time": Time,
} }

/// A range of ids and what it is mapped to, user_namespaces(7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the specification.
pub struct IdMapping {
    pub container_id: u32,
    pub host_id: u32,
    pub size: u32,
}

members! { IdMapping {
    required "containerID": container_id, required "hostID": host_id, required "size": size,
} }

/// Offset of a clock, time_namespaces(7).
#[derive(Clone, Copy, Debug, Default)]
pub struct TimeOffset {
    /// Seconds, may be negative.
    pub secs: i64,
    /// Nanoseconds.
    pub nanosecs: u32,
}

members! { TimeOffset { "secs": secs, "nanosecs": nanosecs } }

/// A device node.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// Absolute path inside the container.
    pub path: PathBuf,
    /// "c" or "u" (character), "b" (block), "p" (FIFO).
    pub kind: String,
    /// Major number; absent for a FIFO.
    pub major: i64,
    /// Minor number; absent for a FIFO.
    pub minor: i64,
    /// Permission bits, 0666 when absent.
    pub file_mode: Option<u32>,
    /// Owner inside the container.
    pub uid: Option<u32>,
    /// Group inside the container.
    pub gid: Option<u32>,
}

members! { Device {
    required "path": path, required "type": kind, "major": major, "minor": minor, "fileMode": file_mode,
    "uid": uid, "gid": gid,
} }

/// Execution domain, personality(2).
#[derive(Clone, Debug, Default)]
pub struct Personality {
    /// "LINUX" or "LINUX32".
    pub domain: String,
    /// The specification defines none so far.
    pub flags: Vec<String>,
}

members! { Personality { required "domain": domain, "flags": flags } }
