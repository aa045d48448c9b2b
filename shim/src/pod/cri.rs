//! What CRI says of a pod, where the sandbox API hands it on: no runtime configuration comes with that.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;

use super::error::PodError;
use super::spec::{SandboxSpec, SpecError};
use crate::sizing::Change;

/// The type of the options that describe a pod.
pub const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// Files of the host's that pods have copies of, as they do with other runtimes.
const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// CRI's `PodSandboxConfig`, as far as it matters here.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "4")]
    dns: Option<Dns>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<Linux>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Metadata {
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Dns {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Linux {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<Security>,
    #[prost(map = "string, string", tag = "3")]
    sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    resources: Option<Resources>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Security {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Namespaces {
    #[prost(enumeration = "Mode", tag = "1")]
    network: i32,
    #[prost(enumeration = "Mode", tag = "2")]
    pid: i32,
    #[prost(enumeration = "Mode", tag = "3")]
    ipc: i32,
}

/// Whose a namespace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Mode {
    Pod = 0,
    Container = 1,
    Node = 2,
    Target = 3,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Resources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "4")]
    memory_limit: i64,
}

impl PodSandboxConfig {
    /// The sandbox of this pod.
    ///
    /// # Errors
    /// When it asks for one of the host's namespaces, or for limits that make no sense.
    pub fn sandbox(self, id: &str, network_namespace: &str) -> Result<SandboxSpec, PodError> {
        let linux = self.linux.unwrap_or_default();
        let namespaces = linux.security.unwrap_or_default().namespaces.unwrap_or_default();
        let asked = [("network", namespaces.network()), ("pid", namespaces.pid()), ("ipc", namespaces.ipc())];
        if let Some((kind, _)) = asked.into_iter().find(|(_, mode)| *mode == Mode::Node) {
            return Err(SpecError::HostNamespace(kind).into());
        }
        let resources = linux.resources.unwrap_or_default();
        let limits = Change::of_numbers(resources.memory_limit, resources.cpu_quota, resources.cpu_period)?;
        Ok(SandboxSpec {
            files: vec![
                (super::spec::HOSTNAME, format!("{}\n", self.hostname).into_bytes()),
                (super::spec::HOSTS, copy_of(HOSTS)?),
                (super::spec::RESOLV_CONF, resolv_conf(self.dns.as_ref())?),
            ],
            hostname: self.hostname,
            domainname: String::new(),
            network_namespace: (!network_namespace.is_empty()).then(|| PathBuf::from(network_namespace)),
            sysctls: linux.sysctls.into_iter().collect(),
            cgroups_path: cgroups_path(&linux.cgroup_parent, id),
            annotations: of_author(self.annotations),
            kubernetes_namespace: self.metadata.map(|metadata| metadata.namespace),
            limits,
        })
    }
}

/// The annotations of a pod's author, who must not pass for containerd: in bundles it says things by some of them.
pub fn of_author(mut annotations: HashMap<String, String>) -> HashMap<String, String> {
    annotations.retain(|key, _| !key.starts_with("io.kubernetes.cri."));
    annotations
}

/// The pod's resolver, which is the host's when nothing is said of it.
fn resolv_conf(dns: Option<&Dns>) -> Result<Vec<u8>, PodError> {
    match dns.map(Dns::text).transpose()? {
        Some(text) if !text.is_empty() => Ok(text),
        _ => copy_of(RESOLV_CONF),
    }
}

impl Dns {
    /// As resolv.conf(5) has it.
    fn text(&self) -> Result<Vec<u8>, PodError> {
        let all = [&self.servers, &self.searches, &self.options];
        if all.into_iter().flatten().any(|word| word.contains(['\n', '\0'])) {
            return Err(PodError::Invalid("dns_config: a line break in a word".into()));
        }
        let mut text = String::new();
        for (key, words) in [("search", &self.searches), ("options", &self.options)] {
            if !words.is_empty() {
                text.push_str(&format!("{key} {}\n", words.join(" ")));
            }
        }
        for server in &self.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        Ok(text.into_bytes())
    }
}

/// Where the sandbox's control group is below its parent's, in the form that the parent has; none without a parent.
fn cgroups_path(parent: &str, id: &str) -> String {
    match parent.rsplit('/').next() {
        Some("") | None => String::new(),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("{parent}/{id}"),
    }
}

fn copy_of(path: &str) -> Result<Vec<u8>, PodError> {
    match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        result => {
            result.map_err(|source| PodError::Io { action: "read", path: Path::new(path).to_owned(), source })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PodSandboxConfig {
        PodSandboxConfig {
            hostname: "h".into(),
            linux: Some(Linux { cgroup_parent: "/kubepods/podx".into(), ..Linux::default() }),
            ..PodSandboxConfig::default()
        }
    }

    #[test]
    fn a_pod_is_described() {
        let mut asked = config();
        asked.dns = Some(Dns {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:5".into()],
        });
        let linux = asked.linux.as_mut().unwrap();
        linux.resources = Some(Resources { cpu_period: 100_000, cpu_quota: 150_000, memory_limit: 3 << 20 });
        let sandbox = asked.sandbox("s", "/run/netns/x").unwrap();
        assert_eq!(sandbox.network_namespace, Some("/run/netns/x".into()));
        assert_eq!(sandbox.cgroups_path, "/kubepods/podx/s");
        assert_eq!(sandbox.limits.apply(Default::default()).cpu, 1_500_000);
        let (_, resolv) =
            sandbox.files.iter().find(|(name, _)| *name == super::super::spec::RESOLV_CONF).unwrap();
        let text = "search a.b c\noptions ndots:5\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n";
        assert_eq!(String::from_utf8_lossy(resolv), text);
    }

    #[test]
    fn nobody_speaks_for_containerd() {
        let mut asked = config();
        asked.metadata = Some(Metadata { namespace: "team-a".into() });
        let annotations =
            ["io.kubernetes.cri.sandbox-memory", "io.kubernetes.cri.sandbox-namespace", "example.com/kept"];
        asked.annotations = annotations.map(|key| (key.to_owned(), "68719476736".to_owned())).into();
        let sandbox = asked.sandbox("s", "").unwrap();
        assert_eq!(sandbox.annotations.keys().collect::<Vec<_>>(), ["example.com/kept"]);
        assert_eq!(sandbox.kubernetes_namespace.as_deref(), Some("team-a"));
    }

    #[test]
    fn the_hosts_namespaces_are_refused() {
        let mut asked = config();
        let namespaces = Namespaces { network: Mode::Node.into(), ..Namespaces::default() };
        asked.linux.as_mut().unwrap().security = Some(Security { namespaces: Some(namespaces) });
        let refused = asked.sandbox("s", "");
        assert!(matches!(refused, Err(PodError::Spec(SpecError::HostNamespace("network")))));
    }

    #[test]
    fn a_word_with_a_line_break_is_no_word() {
        let mut asked = config();
        asked.dns = Some(Dns { searches: vec!["a\nnameserver 6.6.6.6".into()], ..Dns::default() });
        assert!(matches!(asked.sandbox("s", ""), Err(PodError::Invalid(_))));
    }

    #[test]
    fn control_groups_are_named_in_their_parents_form() {
        assert_eq!(cgroups_path("", "s"), "");
        assert_eq!(cgroups_path("/a", "s"), "/a/s");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-podx.slice", "s"),
            "kubepods-podx.slice:cri-containerd:s"
        );
    }
}
