//! From the configuration that containerd writes for a container on this host to the one that the agent runs in the
//! guest.
//!
//! What speaks of the host is replaced: the root, namespaces by path, sources of bind mounts. What only the host could
//! honour is left out (its security modules, its processors' numbers), or refused where leaving it out would surprise
//! (the host's own namespaces). Everything else goes to the guest as it is.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use caisson_protocol::v1;
use serde_json::{Map, Value, json};

use super::disks::{Number, Wanted};
use crate::bundle::{SANDBOX_UID, Spec};
use crate::share::Volume;
use crate::sizing::{Change, SizingError};

/// Why a configuration can't be run in a guest.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It can't be written for the guest.
    #[error("encode it")]
    Encode(#[from] serde_json::Error),
    /// A member of another type than the specification says.
    #[error("{0}: not as the OCI runtime specification has it")]
    Malformed(String),
    /// Limits that make no sense.
    #[error("linux.resources")]
    Limits(#[from] SizingError),
    /// One of the host's namespaces.
    #[error("linux.namespaces: a container in a machine of its own can't be in the host's {0} namespace")]
    HostNamespace(&'static str),
}

/// Where a container is, as far as its configuration has to know.
#[derive(Debug)]
pub struct Place<'a> {
    /// Whether it belongs to a sandbox, whose namespaces it shares.
    pub member: bool,
    /// Its root in the guest.
    pub root: &'a str,
    /// Where the pod's shared memory is in the guest.
    pub shm: &'a str,
    /// Where the host has the pod's own files, if nobody else has made them.
    pub files: Option<&'a Path>,
    /// The pod's namespaces in the guest.
    pub names: &'a v1::CreateSandboxResponse,
}

/// A path of the host's to be shown to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its index in the configuration's mounts.
    pub index: usize,
    /// The mount.
    pub volume: Volume,
}

/// A configuration for the guest.
#[derive(Debug)]
pub struct GuestSpec {
    /// The whole of it.
    pub spec: Value,
    /// What has to be shared for it.
    pub binds: Vec<Bind>,
}

impl GuestSpec {
    /// Has the mount at `index` come from another place in the guest.
    pub fn set_source(&mut self, index: usize, source: &str) {
        if let Some(mount) = self.spec.pointer_mut(&format!("/mounts/{index}/source")) {
            *mount = json!(source);
        }
    }

    /// Makes a new mount of huge pages of the one at `index`, which was of the host's.
    pub fn set_huge_pages(&mut self, index: usize, page_size: u64) {
        let Some(mount) = self.spec.pointer_mut(&format!("/mounts/{index}")).and_then(Value::as_object_mut)
        else {
            return;
        };
        mount.insert("type".into(), json!("hugetlbfs"));
        mount.insert("source".into(), json!("hugetlbfs"));
        mount.insert("options".into(), json!(["nosuid", "nodev", format!("pagesize={page_size}")]));
    }

    /// The host's block devices that are given to the container, each by its index.
    pub fn block_devices(&self) -> Vec<(usize, Wanted)> {
        let list = self.spec.pointer("/linux/devices").and_then(Value::as_array).into_iter().flatten();
        let one = |(index, device): (usize, &Value)| {
            let number = Number::of(device)?;
            let block = device.get("type").and_then(Value::as_str) == Some("b");
            let read_only = !self.rules().any(|rule| {
                let rule_is =
                    |key: &str, value: &Value| rule.get(key).is_none_or(|it| it.is_null() || it == value);
                let access = rule.get("access").and_then(Value::as_str).unwrap_or("rwm");
                rule.get("allow") == Some(&json!(true))
                    && rule
                        .get("type")
                        .and_then(Value::as_str)
                        .is_none_or(|kind| matches!(kind, "b" | "a" | ""))
                    && rule_is("major", &json!(number.major))
                    && rule_is("minor", &json!(number.minor))
                    && access.contains('w')
            });
            block.then_some((index, Wanted { host: number, read_only }))
        };
        list.enumerate().filter_map(one).collect()
    }

    fn rules(&self) -> impl Iterator<Item = &Value> {
        let rules = self.spec.pointer("/linux/resources/devices");
        rules.and_then(Value::as_array).into_iter().flatten()
    }

    /// Gives devices the numbers that they have in the guest, in the container's rules as well.
    pub fn renumber(&mut self, devices: &[(usize, Wanted, Number)]) {
        let rules = self.spec.pointer_mut("/linux/resources/devices").and_then(Value::as_array_mut);
        for rule in rules.into_iter().flatten() {
            let block = rule.get("type").and_then(Value::as_str) == Some("b");
            let number = Number::of(rule);
            let found = devices.iter().find(|(_, wanted, _)| block && number == Some(wanted.host));
            if let Some((_, _, guest)) = found {
                guest.write_to(rule);
            }
        }
        for (index, _, guest) in devices {
            if let Some(device) = self.spec.pointer_mut(&format!("/linux/devices/{index}")) {
                guest.write_to(device);
            }
        }
    }
}

impl Number {
    fn of(device: &Value) -> Option<Number> {
        let number = |key: &str| device.get(key)?.as_u64()?.try_into().ok();
        Some(Number { major: number("major")?, minor: number("minor")? })
    }

    fn write_to(self, device: &mut Value) {
        if let Some(device) = device.as_object_mut() {
            device.insert("major".into(), json!(self.major));
            device.insert("minor".into(), json!(self.minor));
        }
    }
}

/// What the sandbox is to be, as the first container of a pod has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SandboxSpec {
    /// The host name.
    pub hostname: String,
    /// The domain name.
    pub domainname: String,
    /// The network namespace, when it is there already.
    pub network_namespace: Option<PathBuf>,
    /// Kernel parameters of the pod's namespaces.
    pub sysctls: Vec<(String, String)>,
    /// The cgroup that the container would be in.
    pub cgroups_path: String,
    /// The annotations.
    pub annotations: HashMap<String, String>,
    /// The Kubernetes namespace that the pod is in, if it is in one.
    pub kubernetes_namespace: Option<String>,
    /// What it may use; a pod of one is its container.
    pub limits: Change,
    /// Files that its containers are to see, by name and content. None when somebody else makes them.
    pub files: Vec<(&'static str, Vec<u8>)>,
}

/// Where containers have shared memory.
const DEV_SHM: &str = "/dev/shm";
/// The file with the pod's host name.
pub const HOSTNAME: &str = "hostname";
/// The file with the names of hosts that the pod knows.
pub const HOSTS: &str = "hosts";
/// The file that configures the pod's resolver.
pub const RESOLV_CONF: &str = "resolv.conf";
/// Where containers see these files.
pub(super) const FILES: [(&str, &str); 3] =
    [("/etc/hostname", HOSTNAME), ("/etc/hosts", HOSTS), ("/etc/resolv.conf", RESOLV_CONF)];

/// containerd's annotation with the pod's Kubernetes namespace.
const KUBERNETES_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

/// Namespaces and what containerd calls them.
const HOST_NAMESPACES: [&str; 4] = ["network", "pid", "ipc", "uts"];

/// Reads what a pod's first container says of the pod.
///
/// # Errors
/// When it asks for one of the host's namespaces, or for limits that make no sense.
pub fn sandbox(first: &Spec) -> Result<SandboxSpec, SpecError> {
    let spec = &first.config;
    let namespaces = namespaces(spec.pointer("/linux/namespaces"))?;
    let network = namespaces.into_iter().find(|namespace| namespace.kind == "network");
    let string = |pointer: &str| spec.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let sysctls = spec.pointer("/linux/sysctl").and_then(Value::as_object).into_iter().flatten();
    Ok(SandboxSpec {
        hostname: string("/hostname"),
        domainname: string("/domainname"),
        network_namespace: network.and_then(|network| network.path).map(PathBuf::from),
        sysctls: sysctls.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect(),
        cgroups_path: string("/linux/cgroupsPath"),
        annotations: first.annotations.clone(),
        kubernetes_namespace: first.annotations.get(KUBERNETES_NAMESPACE).cloned(),
        limits: limits(spec),
        files: Vec::new(),
    })
}

/// What a container may use.
pub fn limits(spec: &Value) -> Change {
    Change::of_resources(spec.pointer("/linux/resources"))
}

/// Rewrites a container's configuration.
///
/// # Errors
/// When it is malformed, or asks for one of the host's namespaces.
pub fn container(mut spec: Value, place: &Place<'_>) -> Result<GuestSpec, SpecError> {
    let object = spec.as_object_mut().ok_or_else(|| SpecError::Malformed("the whole".into()))?;
    let root = member(object, "root")?;
    root.insert("path".into(), json!(place.root));
    process(member(object, "process")?);
    let linux = member(object, "linux")?;
    linux_section(linux);
    set_namespaces(linux, place)?;
    let binds = mounts(object, place)?;
    Ok(GuestSpec { spec, binds })
}

/// Takes out of a `process` what only the host could honour.
pub fn process(process: &mut Map<String, Value>) {
    // Labels of the host's security modules: the guest has none, its own walls stand around the whole pod.
    for key in ["apparmorProfile", "selinuxLabel"] {
        process.remove(key);
    }
}

fn member<'a>(
    object: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, SpecError> {
    let value = object.entry(key).or_insert_with(|| json!({}));
    value.as_object_mut().ok_or_else(|| SpecError::Malformed(key.to_owned()))
}

fn linux_section(linux: &mut Map<String, Value>) {
    for key in ["mountLabel", "intelRdt", "cgroupsPath"] {
        linux.remove(key);
    }
    resources(linux.get_mut("resources"));
}

/// Takes the host's processor and memory node numbers out of `linux.resources`.
pub fn resources(resources: Option<&mut Value>) {
    if let Some(cpu) = resources.and_then(|it| it.get_mut("cpu")).and_then(Value::as_object_mut) {
        for key in ["cpus", "mems"] {
            cpu.remove(key);
        }
    }
}

struct Namespace {
    kind: String,
    path: Option<String>,
}

/// Reads `linux.namespaces`, which must hold all that would otherwise be the host's.
fn namespaces(list: Option<&Value>) -> Result<Vec<Namespace>, SpecError> {
    let malformed = || SpecError::Malformed("linux.namespaces".into());
    let list = match list {
        Some(list) => list.as_array().ok_or_else(malformed)?.as_slice(),
        None => &[],
    };
    let one = |entry: &Value| {
        let text = |key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
        let path = text("path").filter(|path| !path.is_empty());
        Some(Namespace { kind: text("type")?, path })
    };
    let found: Vec<_> =
        list.iter().map(|entry| one(entry).ok_or_else(malformed)).collect::<Result<_, _>>()?;
    match HOST_NAMESPACES.iter().find(|kind| !found.iter().any(|namespace| namespace.kind == **kind)) {
        Some(missing) => Err(SpecError::HostNamespace(missing)),
        None => Ok(found),
    }
}

/// Namespaces by path are the pod's. A container that is a pod of its own has the pod's network, and new ones else.
fn set_namespaces(linux: &mut Map<String, Value>, place: &Place<'_>) -> Result<(), SpecError> {
    let found = namespaces(linux.get("namespaces"))?;
    let ours = |namespace: Namespace| {
        let pods = match namespace.kind.as_str() {
            "network" => Some(&place.names.network_namespace),
            "ipc" if place.member => Some(&place.names.ipc_namespace),
            "uts" if place.member => Some(&place.names.uts_namespace),
            "pid" if namespace.path.is_some() => Some(&place.names.pid_namespace),
            _ => None,
        };
        match pods {
            Some(path) => json!({ "type": namespace.kind, "path": path }),
            None => json!({ "type": namespace.kind }),
        }
    };
    let list = found.into_iter().map(ours).collect();
    linux.insert("namespaces".into(), Value::Array(list));
    // The pod's network is the pod's to configure: the sandbox was made with these.
    if let Some(sysctls) = linux.get_mut("sysctl").and_then(Value::as_object_mut) {
        sysctls.retain(|key, _| !key.starts_with("net."));
    }
    Ok(())
}

fn mounts(object: &mut Map<String, Value>, place: &Place<'_>) -> Result<Vec<Bind>, SpecError> {
    let malformed = |what: &str| SpecError::Malformed(format!("mounts: {what}"));
    let mut binds = Vec::new();
    let read_only = object.get("root").and_then(|root| root.get("readonly")) == Some(&Value::Bool(true));
    let pod = object.get("annotations").and_then(|all| all.get(SANDBOX_UID)).and_then(Value::as_str);
    let pod = pod.map(str::to_owned);
    let Some(list) = object.get_mut("mounts").filter(|list| !list.is_null()) else { return Ok(binds) };
    let list = list.as_array_mut().ok_or_else(|| malformed("the list"))?;
    if let Some(files) = place.files {
        add_files(list, files, read_only);
        share_memory(list, place.shm);
    }
    for (index, mount) in list.iter_mut().enumerate() {
        let mount = mount.as_object_mut().ok_or_else(|| malformed("an entry"))?;
        let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (kind, source, destination) = (text("type"), text("source"), text("destination"));
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let options: Vec<_> = options.filter_map(Value::as_str).map(str::to_owned).collect();
        if kind != "bind" && !options.iter().any(|option| option == "bind" || option == "rbind") {
            continue;
        }
        if destination == DEV_SHM && (is_sandboxes(&source) || source == place.shm) {
            mount.insert("source".into(), json!(place.shm));
        } else {
            let source = pods_file(&destination, source.into(), place.files);
            // Where it is in the guest is known when it is shared.
            mount.insert("source".into(), json!(""));
            binds.push(Bind { index, volume: Volume { source, options, pod: pod.clone() } });
        }
    }
    Ok(binds)
}

/// The source of a bind mount: with the sandbox API, where nobody has made the file that CRI names for the pod's host
/// name and the like, the one that was made here.
fn pods_file(destination: &str, source: PathBuf, files: Option<&Path>) -> PathBuf {
    let ours = FILES.iter().find(|(path, _)| Path::new(path) == Path::new(destination));
    match (files, ours) {
        (Some(files), Some((_, name))) if !source.exists() => files.join(name),
        _ => source,
    }
}

/// Adds the pod's own files, each unless something is mounted in its place. With the sandbox API CRI has them mounted only
/// where it finds them made already.
fn add_files(mounts: &mut Vec<Value>, files: &Path, read_only: bool) {
    let access = if read_only { "ro" } else { "rw" };
    for (destination, name) in FILES {
        let taken = |mount: &Value| mount.get("destination").and_then(Value::as_str) == Some(destination);
        if !mounts.iter().any(taken) {
            mounts.push(json!({"destination": destination, "type": "bind", "source": files.join(name),
                               "options": ["rbind", "rprivate", access]}));
        }
    }
}

/// Has the pod's shared memory in a container's, unless something else is mounted in its place. With the sandbox API CRI
/// has no memory of the pod's to be mounted, and each container would have its own.
fn share_memory(mounts: &mut Vec<Value>, shm: &str) {
    let pods = json!({"destination": DEV_SHM, "type": "bind", "source": shm, "options": ["rbind", "rprivate", "rw"]});
    match mounts.iter_mut().find(|mount| mount.get("destination") == Some(&json!(DEV_SHM))) {
        None => mounts.push(pods),
        Some(mount) if mount.get("type") == Some(&json!("tmpfs")) => *mount = pods,
        Some(_) => {}
    }
}

/// Whether it is the memory that CRI makes for each sandbox, and not a volume that stands in for it.
fn is_sandboxes(source: &str) -> bool {
    let path = Path::new(source);
    let sandboxes = path.parent().and_then(Path::parent).and_then(Path::file_name);
    path.file_name().is_some_and(|name| name == "shm") && sandboxes.is_some_and(|name| name == "sandboxes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> v1::CreateSandboxResponse {
        v1::CreateSandboxResponse {
            network_namespace: "/run/ns/net".into(),
            ipc_namespace: "/run/ns/ipc".into(),
            uts_namespace: "/run/ns/uts".into(),
            pid_namespace: "/run/ns/pid".into(),
            resolv_conf: String::new(),
        }
    }

    fn rewrite(spec: &Value, member: bool) -> Result<(Value, Vec<Bind>), SpecError> {
        let names = names();
        let place = Place { member, root: "/g/root", shm: "/g/shm", files: None, names: &names };
        let made = container(spec.clone(), &place)?;
        Ok((made.spec, made.binds))
    }

    fn first(config: Value) -> Spec {
        Spec { config, ..Spec::default() }
    }

    fn all_namespaces() -> Value {
        json!([{"type": "pid"}, {"type": "network", "path": "/proc/7/ns/net"}, {"type": "ipc"}, {"type": "uts"},
               {"type": "mount"}])
    }

    #[test]
    fn a_member_shares_the_pods_namespaces_and_one_alone_its_network() {
        let spec =
            json!({"root": {"path": "rootfs", "readonly": true}, "linux": {"namespaces": all_namespaces()}});
        let (member, _) = rewrite(&spec, true).unwrap();
        let path = |spec: &Value, index: usize| spec["linux"]["namespaces"][index].get("path").cloned();
        assert_eq!(path(&member, 0), None);
        assert_eq!(path(&member, 1), Some(json!("/run/ns/net")));
        assert_eq!(path(&member, 2), Some(json!("/run/ns/ipc")));
        assert_eq!(member["root"], json!({"path": "/g/root", "readonly": true}));
        let (alone, _) = rewrite(&spec, false).unwrap();
        assert_eq!(path(&alone, 1), Some(json!("/run/ns/net")));
        assert_eq!(path(&alone, 3), None);
    }

    #[test]
    fn a_shared_pid_namespace_is_the_pods() {
        let mut list = all_namespaces();
        list[0]["path"] = json!("/proc/7/ns/pid");
        let (spec, _) = rewrite(&json!({"linux": {"namespaces": list}}), true).unwrap();
        assert_eq!(spec["linux"]["namespaces"][0]["path"], "/run/ns/pid");
    }

    #[test]
    fn the_hosts_namespaces_are_refused() {
        for (index, kind) in [(0, "pid"), (1, "network"), (2, "ipc"), (3, "uts")] {
            let mut list = all_namespaces();
            list.as_array_mut().unwrap().remove(index);
            let spec = json!({"linux": {"namespaces": list}});
            assert!(matches!(rewrite(&spec, true), Err(SpecError::HostNamespace(k)) if k == kind));
            assert!(matches!(sandbox(&first(spec)), Err(SpecError::HostNamespace(k)) if k == kind));
        }
    }

    #[test]
    fn bind_mounts_come_from_the_share_and_shared_memory_from_the_guest() {
        let spec = json!({"linux": {"namespaces": all_namespaces()}, "annotations": {SANDBOX_UID: "u"}, "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/h/hosts", "options": ["rbind", "ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/sandboxes/p/shm", "options": ["rbind"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/h/shm", "options": ["rbind"]},
            {"destination": "/data", "source": "/h/data", "options": ["bind", "rprivate"]},
        ]});
        let (spec, binds) = rewrite(&spec, true).unwrap();
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(spec["mounts"][2]["source"], "/g/shm");
        assert_eq!(spec["mounts"][3]["source"], "");
        let options = vec!["rbind".to_owned(), "ro".to_owned()];
        let pod = Some("u".to_owned());
        let hosts = Bind { index: 1, volume: Volume { source: "/h/hosts".into(), options, pod } };
        assert_eq!(binds[0], hosts);
        assert_eq!(binds[1].index, 3);
    }

    #[test]
    fn files_that_nobody_made_are_the_pods() {
        let files = Some(Path::new("/run/pod"));
        let source = |destination: &str, source: &str| pods_file(destination, source.into(), files);
        assert_eq!(source("/etc/hosts", "/nonexistent/hosts"), Path::new("/run/pod/hosts"));
        assert_eq!(source("/etc/hosts", "/proc/self/stat"), Path::new("/proc/self/stat"));
        assert_eq!(source("/etc/other", "/nonexistent/other"), Path::new("/nonexistent/other"));
        assert_eq!(pods_file("/etc/hosts", "/nonexistent".into(), None), Path::new("/nonexistent"));
    }

    #[test]
    fn the_pods_files_are_mounted_unless_something_else_is() {
        let names = names();
        let files = Some(Path::new("/run/pod"));
        let place = Place { member: true, root: "/g/root", shm: "/g/shm", files, names: &names };
        let with = |mounts: Value| {
            let spec = json!({"root": {"readonly": true}, "linux": {"namespaces": all_namespaces()},
                              "mounts": mounts});
            container(spec, &place).unwrap()
        };
        let made = with(json!([{"destination": "/proc", "type": "proc", "source": "proc"}]));
        assert_eq!(made.spec["mounts"][1]["destination"], "/etc/hostname");
        assert_eq!(made.binds[0].volume.source, Path::new("/run/pod/hostname"));
        assert_eq!(made.binds[0].volume.options, ["rbind", "rprivate", "ro"]);
        let made = with(json!([{"destination": "/etc/hosts", "type": "tmpfs", "source": "tmpfs"}]));
        let sources: Vec<_> = made.binds.iter().map(|bind| bind.volume.source.as_path()).collect();
        assert_eq!(sources, ["/run/pod/hostname", "/run/pod/resolv.conf"].map(Path::new));
        assert_eq!(made.spec["mounts"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn shared_memory_is_the_pods_unless_something_else_is_mounted() {
        let names = names();
        let place = Place {
            member: true,
            root: "/g/root",
            shm: "/g/shm",
            files: Some(Path::new("/p")),
            names: &names,
        };
        let with = |mount: Value| {
            let spec = json!({"root": {}, "linux": {"namespaces": all_namespaces()}, "mounts": [mount]});
            let made = container(spec, &place).unwrap();
            let mounts = made.spec["mounts"].as_array().unwrap();
            let shm: Vec<_> =
                mounts.iter().filter(|mount| mount["destination"] == DEV_SHM).cloned().collect();
            assert_eq!(shm.len(), 1);
            (shm[0]["type"].as_str().unwrap().to_owned(), shm[0]["source"].as_str().unwrap().to_owned())
        };
        let pods = ("bind".to_owned(), "/g/shm".to_owned());
        assert_eq!(with(json!({"destination": "/proc", "type": "proc", "source": "proc"})), pods);
        assert_eq!(with(json!({"destination": DEV_SHM, "type": "tmpfs", "source": "shm"})), pods);
        // A volume, whose place in the guest is known later.
        let volume =
            json!({"destination": DEV_SHM, "type": "bind", "source": "/h/shm", "options": ["rbind"]});
        assert_eq!(with(volume), ("bind".to_owned(), String::new()));
    }

    #[test]
    fn what_only_the_host_has_is_left_out() {
        let spec = json!({
            "process": {"apparmorProfile": "cri-containerd.apparmor.d", "args": ["true"]},
            "linux": {"namespaces": all_namespaces(), "cgroupsPath": "/kubepods/x", "mountLabel": "l",
                      "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "1"},
                      "resources": {"cpu": {"cpus": "3-4", "shares": 2}}},
        });
        let (spec, _) = rewrite(&spec, false).unwrap();
        assert_eq!(spec["process"], json!({"args": ["true"]}));
        assert_eq!(spec["linux"]["resources"], json!({"cpu": {"shares": 2}}));
        assert_eq!(spec["linux"]["sysctl"], json!({"kernel.shmmax": "1"}));
        assert!(spec["linux"].get("cgroupsPath").is_none());
    }

    #[test]
    fn block_devices_get_the_guests_numbers() {
        let spec = json!({"linux": {
            "namespaces": all_namespaces(),
            "devices": [
                {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
                {"path": "/dev/disk", "type": "b", "major": 7, "minor": 1},
                {"path": "/dev/looked-at", "type": "b", "major": 7, "minor": 2},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 2, "access": "r"},
                {"allow": true, "type": "c", "major": 7, "minor": 2, "access": "rwm"},
            ]},
        }});
        let names = names();
        let place = Place { member: true, root: "", shm: "", files: None, names: &names };
        let mut made = container(spec, &place).unwrap();
        let wanted = made.block_devices();
        let is = |minor, read_only| Wanted { host: Number { major: 7, minor }, read_only };
        assert_eq!(wanted, [(1, is(1, false)), (2, is(2, true))]);
        let guest = |minor| Number { major: 254, minor };
        made.renumber(&[(1, wanted[0].1, guest(0)), (2, wanted[1].1, guest(16))]);
        let linux = &made.spec["linux"];
        assert_eq!((&linux["devices"][2]["major"], &linux["devices"][2]["minor"]), (&json!(254), &json!(16)));
        assert_eq!(linux["devices"][0]["major"], 10);
        assert_eq!(linux["resources"]["devices"][1]["major"], 254);
        assert_eq!(linux["resources"]["devices"][2]["minor"], 16);
        assert_eq!(linux["resources"]["devices"][3]["major"], 7);
    }

    #[test]
    fn nonsense_is_an_error() {
        let names = names();
        let place = Place { member: true, root: "", shm: "", files: None, names: &names };
        for spec in [
            json!([]),
            json!({"mounts": 3, "linux": {"namespaces": all_namespaces()}}),
            json!({"linux": 1}),
            json!({"linux": {"namespaces": 1}}),
            json!({"linux": {"namespaces": [{"path": "/"}]}}),
        ] {
            assert!(matches!(container(spec.clone(), &place), Err(SpecError::Malformed(_))), "{spec}");
        }
    }

    #[test]
    fn the_first_container_describes_the_sandbox() {
        let spec = json!({"hostname": "h", "linux": {"namespaces": all_namespaces(), "cgroupsPath": "/k/p",
                          "sysctl": {"net.core.somaxconn": "9"}}});
        let sandbox = sandbox(&first(spec)).unwrap();
        assert_eq!(sandbox.hostname, "h");
        assert_eq!(sandbox.network_namespace, Some("/proc/7/ns/net".into()));
        assert_eq!(sandbox.sysctls, [("net.core.somaxconn".to_owned(), "9".to_owned())]);
        assert_eq!(sandbox.cgroups_path, "/k/p");
    }
}
