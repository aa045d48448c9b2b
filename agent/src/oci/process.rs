//! The `process` object.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::null_default;

/// A process to be run in a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Whether the process has a terminal of its own.
    pub terminal: bool,
    /// Size of the terminal in characters.
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// Program and arguments.
    #[serde(deserialize_with = "null_default")]
    pub args: Vec<String>,
    /// Windows only; kept so that it can be refused.
    pub command_line: String,
    /// `NAME=value` entries.
    #[serde(deserialize_with = "null_default")]
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Capability sets. Absent: none at all.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    #[serde(deserialize_with = "null_default")]
    pub rlimits: Vec<Rlimit>,
    /// Whether exec can not gain privileges, prctl(2) PR_SET_NO_NEW_PRIVS.
    pub no_new_privileges: bool,
    /// AppArmor profile.
    pub apparmor_profile: String,
    /// SELinux label.
    pub selinux_label: String,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// CPU scheduling policy, sched(7).
    pub scheduler: Option<Scheduler>,
    /// I/O priority, ioprio_set(2).
    #[serde(rename = "ioPriority")]
    pub io_priority: Option<IoPriority>,
    /// CPU affinity of execs while and after they enter; refused.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<serde_json::Value>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct ConsoleSize {
    pub height: u32,
    pub width: u32,
}

/// Who a process runs as, in ids of the container's user namespace.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// File mode creation mask; absent: 0022.
    pub umask: Option<u32>,
    /// Supplementary groups.
    #[serde(deserialize_with = "null_default")]
    pub additional_gids: Vec<u32>,
    /// Windows only; kept so that it can be refused.
    pub username: String,
}

/// The five capability sets, capabilities(7), names as in `CAP_CHOWN`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Capabilities {
    #[serde(deserialize_with = "null_default")]
    pub bounding: Vec<String>,
    #[serde(deserialize_with = "null_default")]
    pub effective: Vec<String>,
    #[serde(deserialize_with = "null_default")]
    pub inheritable: Vec<String>,
    #[serde(deserialize_with = "null_default")]
    pub permitted: Vec<String>,
    #[serde(deserialize_with = "null_default")]
    pub ambient: Vec<String>,
}

/// A resource limit, getrlimit(2).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rlimit {
    /// As in `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Soft limit; `u64::MAX` is RLIM_INFINITY.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// CPU scheduling attributes, sched_setattr(2).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Scheduler {
    pub policy: String,
    pub nice: i32,
    pub priority: i32,
    #[serde(deserialize_with = "null_default")]
    pub flags: Vec<String>,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// I/O scheduling class and priority, ioprio_set(2).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)] // Named as in the specification.
pub struct IoPriority {
    pub class: String,
    #[serde(default)]
    pub priority: i64,
}
