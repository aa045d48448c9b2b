//! The `process` object.

use std::path::PathBuf;

use super::json::members;

/// A process to be run in a container.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// Whether the process has a terminal of its own.
    pub terminal: bool,
    /// Size of the terminal in characters.
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Windows only; kept so that it can be refused.
    pub command_line: String,
    /// `NAME=value` entries.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Capability sets. Absent: none at all.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
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
    pub io_priority: Option<IoPriority>,
    /// CPU affinity of execs while and after they enter; refused.
    pub exec_cpu_affinity: Option<serde_json::Value>,
}

members! { Process {
    "terminal": terminal, "consoleSize": console_size, "user": user, "args": args,
    "commandLine": command_line, "env": env, "cwd": cwd, "capabilities": capabilities, "rlimits": rlimits,
    "noNewPrivileges": no_new_privileges, "apparmorProfile": apparmor_profile,
    "selinuxLabel": selinux_label, "oomScoreAdj": oom_score_adj, "scheduler": scheduler,
    "ioPriority": io_priority, "execCPUAffinity": exec_cpu_affinity,
} }

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the specification.
pub struct ConsoleSize {
    pub height: u32,
    pub width: u32,
}

members! { ConsoleSize { "height": height, "width": width } }

/// Who a process runs as, in ids of the container's user namespace.
#[derive(Clone, Debug, Default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// File mode creation mask; absent: 0022.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// Windows only; kept so that it can be refused.
    pub username: String,
}

members! { User {
    "uid": uid, "gid": gid, "umask": umask, "additionalGids": additional_gids, "username": username,
} }

/// The five capability sets, capabilities(7), names as in `CAP_CHOWN`.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Capabilities {
    pub bounding: Vec<String>,
    pub effective: Vec<String>,
    pub inheritable: Vec<String>,
    pub permitted: Vec<String>,
    pub ambient: Vec<String>,
}

members! { Capabilities {
    "bounding": bounding, "effective": effective, "inheritable": inheritable, "permitted": permitted,
    "ambient": ambient,
} }

/// A resource limit, getrlimit(2).
#[derive(Clone, Debug, Default)]
pub struct Rlimit {
    /// As in `RLIMIT_NOFILE`.
    pub kind: String,
    /// Soft limit; `u64::MAX` is RLIM_INFINITY.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

members! { Rlimit { required "type": kind, required "soft": soft, required "hard": hard } }

/// CPU scheduling attributes, sched_setattr(2).
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Scheduler {
    pub policy: String,
    pub nice: i32,
    pub priority: i32,
    pub flags: Vec<String>,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

members! { Scheduler {
    "policy": policy, "nice": nice, "priority": priority, "flags": flags, "runtime": runtime,
    "deadline": deadline, "period": period,
} }

/// I/O scheduling class and priority, ioprio_set(2).
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct IoPriority {
    pub class: String,
    pub priority: i64,
}

members! { IoPriority { required "class": class, "priority": priority } }
