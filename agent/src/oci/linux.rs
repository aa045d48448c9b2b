//! The `linux` object.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Resources, Seccomp, null_default};

/// Linux-specific configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Namespaces that are not the runtime's.
    #[serde(deserialize_with = "null_default")]
    pub namespaces: Vec<Namespace>,
    /// User id mappings of a new user namespace.
    #[serde(deserialize_with = "null_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of a new user namespace.
    #[serde(deserialize_with = "null_default")]
    pub gid_mappings: Vec<IdMapping>,
    /// Clock offsets of a new time namespace, by clock: "monotonic", "boottime".
    #[serde(deserialize_with = "null_default")]
    pub time_offsets: BTreeMap<String, TimeOffset>,
    /// Device nodes to be made, beside the default ones.
    #[serde(deserialize_with = "null_default")]
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
    #[serde(deserialize_with = "null_default")]
    pub net_devices: BTreeMap<String, serde_json::Value>,
    /// Kernel parameters, dotted names.
    #[serde(deserialize_with = "null_default")]
    pub sysctl: BTreeMap<String, String>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Propagation of the root mount: "shared", "slave", "private", "unbindable", or recursive forms of these.
    pub rootfs_propagation: String,
    /// Paths that can not be read.
    #[serde(deserialize_with = "null_default")]
    pub masked_paths: Vec<PathBuf>,
    /// Paths that can not be written.
    #[serde(deserialize_with = "null_default")]
    pub readonly_paths: Vec<PathBuf>,
    /// SELinux label of the mounts.
    pub mount_label: String,
    /// Execution domain.
    pub personality: Option<Personality>,
}

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
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Namespace {
    /// Which kind.
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    /// An nsfs file, absolute.
    #[serde(default, deserialize_with = "empty_is_none")]
    pub path: Option<PathBuf>,
}

/// Kinds of namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // Named as in the specification and namespaces(7).
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

fn empty_is_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = Option::<PathBuf>::deserialize(deserializer)?;
    Ok(path.filter(|path| !path.as_os_str().is_empty()))
}

/// A range of ids and what it is mapped to, user_namespaces(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)] // Named as in the specification.
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

/// Offset of a clock, time_namespaces(7).
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeOffset {
    /// Seconds, may be negative.
    pub secs: i64,
    /// Nanoseconds.
    pub nanosecs: u32,
}

/// A device node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Absolute path inside the container.
    pub path: PathBuf,
    /// "c" or "u" (character), "b" (block), "p" (FIFO).
    #[serde(rename = "type")]
    pub kind: String,
    /// Major number; absent for a FIFO.
    #[serde(default)]
    pub major: i64,
    /// Minor number; absent for a FIFO.
    #[serde(default)]
    pub minor: i64,
    /// Permission bits, 0666 when absent.
    #[serde(default)]
    pub file_mode: Option<u32>,
    /// Owner inside the container.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group inside the container.
    #[serde(default)]
    pub gid: Option<u32>,
}

/// Execution domain, personality(2).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Personality {
    /// "LINUX" or "LINUX32".
    pub domain: String,
    /// The specification defines none so far.
    #[serde(default, deserialize_with = "null_default")]
    pub flags: Vec<String>,
}
