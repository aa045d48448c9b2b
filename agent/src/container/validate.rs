//! Refuses what is not honoured, by name, before anything is made.

use std::path::{Component, Path};

use libc::c_int;
use rustix::process::Resource;

use super::sys::SchedAttr;
use super::{Error, init};
use crate::oci::process::{IoPriority, Process, Rlimit, Scheduler};
use crate::oci::{Linux, NamespaceKind, Resources, Spec};

const MAX_ID: usize = 128;

/// Checks an id: `[A-Za-z0-9_.-]{1,128}`, not "." or "..".
///
/// # Errors
/// [`Error::Invalid`].
pub fn id(field: &str, id: &str) -> Result<(), Error> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if id.is_empty() || id.len() > MAX_ID || matches!(id, "." | "..") || !id.chars().all(fits) {
        return Err(Error::invalid(field, format!("{id:?} does not match [A-Za-z0-9_.-]{{1,128}}")));
    }
    Ok(())
}

/// Checks a container's configuration.
///
/// # Errors
/// The first member that is malformed or not honoured.
pub fn spec(spec: &Spec) -> Result<(), Error> {
    let major = spec.version.split('.').next().unwrap_or_default();
    if major != "1" {
        return Err(Error::unsupported("ociVersion", format!("{:?} is not 1.x", spec.version)));
    }
    let foreign = [
        ("windows", &spec.windows),
        ("solaris", &spec.solaris),
        ("vm", &spec.vm),
        ("zos", &spec.zos),
        ("freebsd", &spec.freebsd),
    ];
    for (field, section) in foreign {
        if section.is_some() {
            return Err(Error::unsupported(field, "this is Linux"));
        }
    }
    let root = spec.root.as_ref().ok_or_else(|| Error::invalid("root", "is required"))?;
    absolute("root.path", &root.path)?;
    process(spec.process.as_ref().ok_or_else(|| Error::invalid("process", "is required"))?)?;
    hooks(spec)?;
    for (index, mount) in spec.mounts.iter().enumerate() {
        init::mounts::validate(&format!("mounts[{index}]"), mount)?;
    }
    let linux = spec.linux();
    names(spec, &linux)?;
    namespaces(&linux)?;
    devices(&linux)?;
    init::sysctl::validate(&linux)?;
    refused(&linux)?;
    if let Some(resources) = &linux.resources {
        self::resources(resources)?;
        super::cgroup::devices::compile(&resources.devices)?;
    }
    for (field, paths) in [("maskedPaths", &linux.masked_paths), ("readonlyPaths", &linux.readonly_paths)] {
        for (index, path) in paths.iter().enumerate() {
            absolute(&format!("linux.{field}[{index}]"), path)?;
        }
    }
    Ok(())
}

fn names(spec: &Spec, linux: &Linux) -> Result<(), Error> {
    for (field, name) in [("hostname", &spec.hostname), ("domainname", &spec.domainname)] {
        if name.len() > 64 {
            return Err(Error::invalid(field, "is longer than 64 bytes"));
        }
        // A namespace by path is the pod's, and its names are the pod's to set: the same ones, as containerd has it.
        if !name.is_empty() && linux.namespace(NamespaceKind::Uts).is_none() {
            return Err(Error::invalid(field, "needs a UTS namespace"));
        }
    }
    Ok(())
}

/// But for those that run in the container, their programs are the host's: in a guest there is nothing to run.
fn hooks(spec: &Spec) -> Result<(), Error> {
    let Some(hooks) = &spec.hooks else { return Ok(()) };
    let kinds = [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("createContainer", &hooks.create_container),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ];
    if let Some((kind, _)) = kinds.iter().find(|(_, hooks)| !hooks.is_empty()) {
        return Err(Error::unsupported(format!("hooks.{kind}"), "the guest has no hook programs"));
    }
    for (index, hook) in hooks.start_container.iter().enumerate() {
        let field = format!("hooks.startContainer[{index}]");
        absolute(&format!("{field}.path"), &hook.path)?;
        if hook.timeout.is_some_and(|seconds| seconds <= 0) {
            return Err(Error::invalid(format!("{field}.timeout"), "is not positive"));
        }
    }
    Ok(())
}

fn namespaces(linux: &Linux) -> Result<(), Error> {
    for (index, namespace) in linux.namespaces.iter().enumerate() {
        let field = format!("linux.namespaces[{index}]");
        if linux.namespaces.iter().skip(index + 1).any(|other| other.kind == namespace.kind) {
            return Err(Error::invalid(field, "this kind is there twice"));
        }
        if let Some(path) = &namespace.path {
            absolute(&format!("{field}.path"), path)?;
            if namespace.kind == NamespaceKind::Mount {
                return Err(Error::unsupported(format!("{field}.path"), "a container has its own mounts"));
            }
        }
    }
    if !linux.creates(NamespaceKind::Mount) {
        return Err(Error::unsupported("linux.namespaces", "a container needs a mount namespace of its own"));
    }
    let maps = [("uidMappings", &linux.uid_mappings), ("gidMappings", &linux.gid_mappings)];
    for (field, mappings) in maps {
        if linux.creates(NamespaceKind::User) == mappings.is_empty() {
            let reason = "are for a new user namespace, and that needs them";
            return Err(Error::invalid(format!("linux.{field}"), reason));
        }
    }
    if !linux.time_offsets.is_empty() && !linux.creates(NamespaceKind::Time) {
        return Err(Error::invalid("linux.timeOffsets", "need a new time namespace"));
    }
    match linux.time_offsets.keys().find(|clock| !matches!(clock.as_str(), "monotonic" | "boottime")) {
        Some(clock) => Err(Error::invalid("linux.timeOffsets", format!("there is no clock {clock:?}"))),
        None => Ok(()),
    }
}

fn devices(linux: &Linux) -> Result<(), Error> {
    for (index, device) in linux.devices.iter().enumerate() {
        let field = format!("linux.devices[{index}]");
        absolute(&format!("{field}.path"), &device.path)?;
        if !matches!(device.kind.as_str(), "c" | "u" | "b" | "p") {
            return Err(Error::invalid(
                format!("{field}.type"),
                format!("{:?} is none of c, u, b, p", device.kind),
            ));
        }
        if device.kind != "p" && (device.major, device.minor) == (0, 0) {
            return Err(Error::invalid(format!("{field}.major"), "is required"));
        }
        for (name, number) in [("major", device.major), ("minor", device.minor)] {
            if u32::try_from(number).is_err() {
                return Err(Error::invalid(
                    format!("{field}.{name}"),
                    format!("{number} is no device number"),
                ));
            }
        }
    }
    Ok(())
}

fn refused(linux: &Linux) -> Result<(), Error> {
    let refusals = [
        (linux.intel_rdt.is_some(), "intelRdt", "the guest has no resctrl"),
        (linux.memory_policy.is_some(), "memoryPolicy", "the guest has one memory node"),
        (!linux.net_devices.is_empty(), "netDevices", "the pod owns its interfaces"),
        (!linux.mount_label.is_empty(), "mountLabel", "the guest has no SELinux"),
    ];
    for (set, field, reason) in refusals {
        if set {
            return Err(Error::unsupported(format!("linux.{field}"), reason));
        }
    }
    let propagation = linux.rootfs_propagation.as_str();
    if !propagation.is_empty() && init::mounts::propagation(propagation).is_none() {
        return Err(Error::invalid("linux.rootfsPropagation", format!("{propagation:?} is unknown")));
    }
    init::identity::personality(linux).map(|_| ())
}

/// Checks limits.
///
/// # Errors
/// The first member that is malformed or not honoured.
pub fn resources(resources: &Resources) -> Result<(), Error> {
    let unsupported =
        |field: &str, reason: &str| Err(Error::unsupported(format!("linux.resources.{field}"), reason));
    if let Some(memory) = &resources.memory {
        // Deprecated by the specification as "do nothing on v2" but kernel memory is part of the limit there.
        if memory.kernel_tcp.is_some_and(|limit| limit > 0) {
            return unsupported("memory.kernelTCP", "cgroup v2 counts it as memory");
        }
        if memory.kernel.is_some_and(|limit| limit > 0) {
            return unsupported("memory.kernel", "cgroup v2 counts it as memory");
        }
        if memory.swappiness.is_some() {
            return unsupported("memory.swappiness", "cgroup v2 has none");
        }
        if memory.use_hierarchy == Some(false) {
            return unsupported("memory.useHierarchy", "cgroup v2 always has one");
        }
        if memory.disable_oom_killer == Some(true) {
            return unsupported("memory.disableOOMKiller", "cgroup v2 has no such switch");
        }
    }
    if let Some(cpu) = &resources.cpu {
        if cpu.realtime_runtime.is_some_and(|time| time != 0)
            || cpu.realtime_period.is_some_and(|time| time != 0)
        {
            return unsupported("cpu.realtimeRuntime", "cgroup v2 has no realtime shares");
        }
        if cpu.idle.is_some_and(|idle| !matches!(idle, 0 | 1)) {
            return Err(Error::invalid("linux.resources.cpu.idle", "is neither 0 nor 1"));
        }
    }
    if let Some(io) = &resources.block_io {
        let leaves =
            io.weight_device.iter().any(|device| device.leaf_weight.is_some_and(|weight| weight != 0));
        if leaves || io.leaf_weight.is_some_and(|weight| weight != 0) {
            return unsupported("blockIO.leafWeight", "cgroup v2 has none");
        }
    }
    if let Some(network) = &resources.network
        && (network.class_id.is_some_and(|id| id != 0) || !network.priorities.is_empty())
    {
        return unsupported("network", "cgroup v2 has no such controller");
    }
    for limit in &resources.hugepage_limits {
        if limit.page_size.is_empty() || !limit.page_size.chars().all(|c| c.is_ascii_alphanumeric()) {
            let reason = format!("{:?} is no page size", limit.page_size);
            return Err(Error::invalid("linux.resources.hugepageLimits", reason));
        }
    }
    for file in resources.unified.keys() {
        // What the runtime itself steers by stays in its hands.
        let steered = file.starts_with("cgroup.") && !file.starts_with("cgroup.max.");
        if steered || !file.contains('.') || file.contains('/') || file.starts_with('.') {
            return Err(Error::invalid(format!("linux.resources.unified[{file}]"), "is not to be written"));
        }
    }
    Ok(())
}

/// Checks a process.
///
/// # Errors
/// The first member that is malformed or not honoured.
pub fn process(process: &Process) -> Result<(), Error> {
    let field = |name: &str| format!("process.{name}");
    if process.args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid(field("args"), "needs a program"));
    }
    absolute(&field("cwd"), &process.cwd)?;
    let strings = [("args", &process.args), ("env", &process.env)];
    for (name, list) in strings {
        if list.iter().any(|text| text.contains('\0')) {
            return Err(Error::invalid(field(name), "has a null byte"));
        }
    }
    let refusals = [
        (!process.command_line.is_empty(), "commandLine", "this is Linux"),
        (!process.user.username.is_empty(), "user.username", "this is Linux"),
        (
            !matches!(process.apparmor_profile.as_str(), "" | "unconfined"),
            "apparmorProfile",
            "the guest has no AppArmor",
        ),
        (!process.selinux_label.is_empty(), "selinuxLabel", "the guest has no SELinux"),
        (process.exec_cpu_affinity.is_some(), "execCPUAffinity", "not available in a guest"),
    ];
    for (set, name, reason) in refusals {
        if set {
            return Err(Error::unsupported(field(name), reason));
        }
    }
    if process.oom_score_adj.is_some_and(|adjustment| !(-1000..=1000).contains(&adjustment)) {
        return Err(Error::invalid(field("oomScoreAdj"), "is not between -1000 and 1000"));
    }
    if process.user.umask.is_some_and(|mask| mask > 0o777) {
        return Err(Error::invalid(field("user.umask"), "is more than 0777"));
    }
    if let Some(size) = process.console_size
        && (u16::try_from(size.width).is_err() || u16::try_from(size.height).is_err())
    {
        return Err(Error::invalid(field("consoleSize"), "is more than 65535 characters"));
    }
    init::identity::CapabilitySets::parse(process.capabilities.as_ref())?;
    for (index, limit) in process.rlimits.iter().enumerate() {
        let name = field(&format!("rlimits[{index}]"));
        rlimit(&name, limit)?;
        if process.rlimits.iter().skip(index + 1).any(|other| other.kind == limit.kind) {
            return Err(Error::invalid(name, format!("{} is there twice", limit.kind)));
        }
    }
    process.io_priority.as_ref().map(io_priority).transpose()?;
    process.scheduler.as_ref().map(scheduler).transpose()?;
    Ok(())
}

/// The resource of a limit, getrlimit(2).
pub(super) fn rlimit(field: &str, limit: &Rlimit) -> Result<Resource, Error> {
    if limit.soft > limit.hard {
        return Err(Error::invalid(field, "the soft limit is above the hard one"));
    }
    Ok(match limit.kind.as_str() {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        other => return Err(Error::invalid(format!("{field}.type"), format!("there is no {other:?}"))),
    })
}

/// The argument of ioprio_set(2).
pub(super) fn io_priority(priority: &IoPriority) -> Result<c_int, Error> {
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => return Err(Error::invalid("process.ioPriority.class", format!("there is no {other:?}"))),
    };
    match c_int::try_from(priority.priority) {
        Ok(level @ 0..=7) => Ok(class << 13 | level),
        _ => Err(Error::invalid("process.ioPriority.priority", "is not between 0 and 7")),
    }
}

/// The argument of sched_setattr(2).
pub(super) fn scheduler(scheduler: &Scheduler) -> Result<SchedAttr, Error> {
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(Error::invalid("process.scheduler.policy", format!("there is no {other:?}"))),
    };
    let flags = scheduler.flags.iter().try_fold(0, |flags, flag| match flag.as_str() {
        "SCHED_FLAG_RESET_ON_FORK" => Ok(flags | 0x01),
        "SCHED_FLAG_RECLAIM" => Ok(flags | 0x02),
        "SCHED_FLAG_DL_OVERRUN" => Ok(flags | 0x04),
        "SCHED_FLAG_KEEP_POLICY" => Ok(flags | 0x08),
        "SCHED_FLAG_KEEP_PARAMS" => Ok(flags | 0x10),
        other => Err(Error::unsupported("process.scheduler.flags", format!("unknown flag {other:?}"))),
    })?;
    if !(-20..=19).contains(&scheduler.nice) {
        return Err(Error::invalid("process.scheduler.nice", "is not between -20 and 19"));
    }
    let priority = u32::try_from(scheduler.priority)
        .map_err(|_| Error::invalid("process.scheduler.priority", "is negative"))?;
    Ok(SchedAttr {
        size: 48,
        policy,
        flags,
        nice: scheduler.nice,
        priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    })
}

fn absolute(field: &str, path: &Path) -> Result<(), Error> {
    if !path.is_absolute() {
        return Err(Error::invalid(field, format!("{:?} is not absolute", path)));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(Error::invalid(field, "has a null byte"));
    }
    // ".." is resolved inside the root anyway, but a specification that has it means something else.
    if path.components().any(|component| component == Component::ParentDir) && !field.ends_with("cwd") {
        return Err(Error::invalid(field, "has a \"..\""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Document;

    fn minimal() -> serde_json::Value {
        serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/root"},
            "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}]},
        })
    }

    fn verdict(at: &str, value: serde_json::Value) -> Result<(), String> {
        let mut json = minimal();
        let (parent, key) = at.rsplit_once('/').unwrap();
        json.pointer_mut(parent).unwrap()[key] = value;
        let parsed = Document::spec(json.to_string().into_bytes()).map_err(|error| error.to_string())?;
        spec(&parsed).map_err(|error| error.to_string())
    }

    #[test]
    fn the_least_is_enough() {
        assert_eq!(verdict("/ociVersion", "1.0.0".into()), Ok(()));
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name() {
        use serde_json::json;
        let cases = [
            ("/ociVersion", json!("2.0.0"), "ociVersion"),
            ("/windows", json!({}), "windows"),
            ("/root/path", json!("relative"), "root.path"),
            ("/hostname", json!("pod"), "hostname"),
            ("/hooks", json!({"prestart": [{"path": "/bin/x"}]}), "hooks.prestart"),
            ("/hooks", json!({"poststop": [{"path": "/bin/x"}]}), "hooks.poststop"),
            ("/hooks", json!({"startContainer": [{"path": "x"}]}), "hooks.startContainer[0].path"),
            (
                "/hooks",
                json!({"startContainer": [{"path": "/x", "timeout": 0}]}),
                "hooks.startContainer[0].timeout",
            ),
            ("/freebsd", json!({}), "freebsd"),
            ("/mounts", json!([{"destination": "x", "type": "tmpfs"}]), "mounts[0].destination"),
            (
                "/mounts",
                json!([{"destination": "/x", "source": "/y", "options": ["bind", "warp"]}]),
                "mounts[0].options",
            ),
            ("/process/args", json!([]), "process.args"),
            ("/process/cwd", json!(""), "process.cwd"),
            ("/process/apparmorProfile", json!("docker-default"), "process.apparmorProfile"),
            ("/process/selinuxLabel", json!("s"), "process.selinuxLabel"),
            ("/process/oomScoreAdj", json!(1001), "process.oomScoreAdj"),
            (
                "/process/rlimits",
                json!([{"type": "RLIMIT_WARP", "soft": 1, "hard": 1}]),
                "process.rlimits[0].type",
            ),
            ("/process/rlimits", json!([{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]), "process.rlimits[0]"),
            ("/process/capabilities", json!({"effective": ["CAP_KILL"]}), "process.capabilities.effective"),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
                "process.ioPriority.priority",
            ),
            ("/process/scheduler", json!({"policy": "SCHED_WARP"}), "process.scheduler.policy"),
            ("/linux/namespaces", json!([]), "linux.namespaces"),
            ("/linux/namespaces", json!([{"type": "mount"}, {"type": "user"}]), "linux.uidMappings"),
            ("/linux/namespaces", json!([{"type": "mount", "path": "/x"}]), "linux.namespaces[0].path"),
            ("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}), "linux.timeOffsets"),
            ("/linux/devices", json!([{"path": "/dev/x", "type": "z"}]), "linux.devices[0].type"),
            ("/linux/devices", json!([{"path": "/dev/x", "type": "c"}]), "linux.devices[0].major"),
            (
                "/linux/resources",
                json!({"memory": {"useHierarchy": false}}),
                "linux.resources.memory.useHierarchy",
            ),
            ("/linux/sysctl", json!({"vm.swappiness": "1"}), "linux.sysctl"),
            ("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}), "linux.sysctl"),
            ("/linux/intelRdt", json!({}), "linux.intelRdt"),
            ("/linux/mountLabel", json!("s"), "linux.mountLabel"),
            ("/linux/rootfsPropagation", json!("sideways"), "linux.rootfsPropagation"),
            ("/linux/maskedPaths", json!(["proc"]), "linux.maskedPaths[0]"),
            ("/linux/personality", json!({"domain": "SOLARIS"}), "linux.personality"),
            ("/linux/resources", json!({"memory": {"swappiness": 1}}), "linux.resources.memory.swappiness"),
            ("/linux/resources", json!({"unified": {"../x.y": "1"}}), "linux.resources.unified"),
            ("/linux/resources", json!({"unified": {"cgroup.procs": "1"}}), "linux.resources.unified"),
            ("/linux/resources", json!({"devices": [{"type": "z"}]}), "linux.resources.devices[0].type"),
        ];
        for (at, value, field) in cases {
            let error = verdict(at, value).expect_err(at);
            assert!(error.starts_with(field), "{at}: {error}");
        }
    }

    #[test]
    fn ids_are_narrow() {
        for good in ["a", "A-1_b.c", &"x".repeat(128)] {
            assert!(id("id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(id("id", bad).is_err(), "{bad}");
        }
    }
}
