//! The OCI runtime specification's configuration (`config.json`), version 1.x: the common and the Linux part.
//!
//! Plain structures instead of the `oci-spec` crate, whose regular expression engine alone would take more than half of
//! the agent's size budget. Unknown members are ignored, as the specification demands ("Extensibility");
//! known ones that this runtime does not honour are kept and refused by [`crate::container::validate`].
//!
//! - [`Document`]: an object together with its text; [`json`]: how a text is read.
//! - [`linux`]: the `linux` object.
//! - [`process`]: the `process` object.
//! - [`resources`]: limits, `linux.resources`.
//! - [`seccomp`]: the system call filter, `linux.seccomp`.

pub mod json;
pub mod linux;
pub mod process;
pub mod resources;
pub mod seccomp;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;

pub use json::ParseError;
use json::members;
pub use linux::{Device, IdMapping, Linux, Namespace, NamespaceKind, TimeOffset};
pub use process::{Capabilities, Process, Rlimit, User};
pub use resources::Resources;
pub use seccomp::Seccomp;

/// An object of the specification, and the text that it was read from, which another process can read again.
#[derive(Clone, Debug)]
pub struct Document<T> {
    text: Vec<u8>,
    object: T,
}

impl<T> Document<T> {
    /// The object, and its JSON.
    pub(crate) fn into_parts(self) -> (T, Vec<u8>) {
        (self.object, self.text)
    }
}

impl<T> Deref for Document<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object
    }
}

impl Document<Spec> {
    /// A container's configuration, `config.json`.
    ///
    /// # Errors
    /// When it is not JSON, or a member has a type or value that the specification does not allow.
    pub fn spec(text: Vec<u8>) -> Result<Self, ParseError> {
        let mut object: Spec = json::parse("", &text)?;
        for namespace in object.linux.iter_mut().flat_map(|linux| &mut linux.namespaces) {
            // Go has an empty path for none.
            namespace.path.take_if(|path| path.as_os_str().is_empty());
        }
        Ok(Document { text, object })
    }
}

impl Document<Process> {
    /// A `process` object.
    ///
    /// # Errors
    /// As [`Document::spec`].
    pub fn process(text: Vec<u8>) -> Result<Self, ParseError> {
        Ok(Document { object: json::parse("process", &text)?, text })
    }
}

/// A container's configuration.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// Version of the specification that the bundle complies with (SemVer 2.0.0).
    pub version: String,
    /// The container's root file system.
    pub root: Option<Root>,
    /// Mounts beside the root, in the order in which they are made.
    pub mounts: Vec<Mount>,
    /// The container's first process.
    pub process: Option<Process>,
    /// Host name in the container's UTS namespace.
    pub hostname: String,
    /// NIS domain name in the container's UTS namespace.
    pub domainname: String,
    /// Commands to run at points of the container's life.
    pub hooks: Option<Hooks>,
    /// Arbitrary metadata; kept, never interpreted.
    pub annotations: BTreeMap<String, String>,
    /// Linux-specific configuration.
    pub linux: Option<Linux>,
    /// Other platforms' sections, kept so that they can be refused.
    pub windows: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    pub solaris: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    pub vm: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    pub zos: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    pub freebsd: Option<serde_json::Value>,
}

members! { Spec {
    "ociVersion": version, "root": root, "mounts": mounts, "process": process, "hostname": hostname,
    "domainname": domainname, "hooks": hooks, "annotations": annotations, "linux": linux,
    "windows": windows, "solaris": solaris, "vm": vm, "zos": zos, "freebsd": freebsd,
} }

impl Spec {
    /// The `linux` object, empty when absent.
    pub(crate) fn linux(&self) -> std::borrow::Cow<'_, Linux> {
        match &self.linux {
            Some(linux) => std::borrow::Cow::Borrowed(linux),
            None => std::borrow::Cow::Owned(Linux::default()),
        }
    }
}

/// The root file system.
#[derive(Clone, Debug, Default)]
pub struct Root {
    /// Its directory.
    pub path: PathBuf,
    /// Whether the container may not write to it.
    pub readonly: bool,
}

members! { Root { "path": path, "readonly": readonly } }

/// A mount beside the root.
#[derive(Clone, Debug, Default)]
pub struct Mount {
    /// Absolute path inside the container.
    pub destination: PathBuf,
    /// Device, directory or dummy name.
    pub source: Option<PathBuf>,
    /// File system type, "bind" or empty for bind mounts.
    pub kind: Option<String>,
    /// As in fstab(5), and the specification's own.
    pub options: Vec<String>,
    /// User id mappings of an id-mapped mount.
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of an id-mapped mount.
    pub gid_mappings: Vec<IdMapping>,
}

members! { Mount {
    "destination": destination, "source": source, "type": kind, "options": options,
    "uidMappings": uid_mappings, "gidMappings": gid_mappings,
} }

/// Commands to run at points of the life cycle. Only those inside the container are; the others are kept so that they
/// can be refused by name.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Hooks {
    pub prestart: Vec<serde_json::Value>,
    pub create_runtime: Vec<serde_json::Value>,
    pub create_container: Vec<serde_json::Value>,
    pub start_container: Vec<Hook>,
    pub poststart: Vec<serde_json::Value>,
    pub poststop: Vec<serde_json::Value>,
}

members! { Hooks {
    "prestart": prestart, "createRuntime": create_runtime, "createContainer": create_container,
    "startContainer": start_container, "poststart": poststart, "poststop": poststop,
} }

/// A command of a hook.
#[derive(Clone, Debug, Default)]
pub struct Hook {
    /// The program, absolute.
    pub path: PathBuf,
    /// Its arguments, with its name for itself.
    pub args: Vec<String>,
    /// `NAME=value` entries.
    pub env: Vec<String>,
    /// Seconds that it may take.
    pub timeout: Option<i64>,
}

members! { Hook { required "path": path, "args": args, "env": env, "timeout": timeout } }

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Document::spec(text.into()).unwrap_err().to_string()
    }

    #[test]
    fn unknown_members_are_ignored_and_nulls_are_empty() {
        let spec = Document::spec(
            br#"{"ociVersion":"1.2.0","future":{"x":1},"mounts":null,"annotations":null,"root":null,
                "process":{"args":["sh"],"cwd":"/","env":null,"user":{"uid":1,"gid":2}},
                "linux":{"namespaces":[{"type":"pid"},{"type":"ipc","path":""}],"devices":null}}"#
                .to_vec(),
        )
        .unwrap();
        assert!(spec.mounts.is_empty() && spec.root.is_none());
        assert_eq!(spec.process.as_ref().unwrap().user.uid, 1);
        let namespaces = &spec.linux().namespaces;
        assert_eq!((namespaces[0].kind, &namespaces[1].path), (NamespaceKind::Pid, &None));
    }

    #[test]
    fn members_arrive_in_their_fields() {
        let spec = Document::spec(
            br#"{"mounts":[{"destination":"/x","type":"bind","options":["ro"],
                    "uidMappings":[{"containerID":1,"hostID":2,"size":3}]}],
                "process":{"consoleSize":{"height":5,"width":6},"oomScoreAdj":-7,"ioPriority":{"class":"c","priority":3}},
                "linux":{"sysctl":{"a":"b"},"timeOffsets":{"boottime":{"secs":-1,"nanosecs":2}},
                    "resources":{"memory":{"limit":-1,"disableOOMKiller":true},"blockIO":{"weight":10},
                        "unified":{"memory.high":"1"},"rdma":{"mlx":{"hcaHandles":4}}}}}"#
                .to_vec(),
        )
        .unwrap();
        let mount = &spec.mounts[0];
        assert_eq!(
            (mount.kind.as_deref(), mount.options.len(), mount.uid_mappings[0].host_id),
            (Some("bind"), 1, 2)
        );
        let process = spec.process.as_ref().unwrap();
        assert_eq!((process.console_size.unwrap().width, process.oom_score_adj), (6, Some(-7)));
        assert_eq!(process.io_priority.as_ref().unwrap().priority, 3);
        let linux = spec.linux();
        assert_eq!((linux.sysctl["a"].as_str(), linux.time_offsets["boottime"].secs), ("b", -1));
        let resources = linux.resources.as_ref().unwrap();
        let memory = resources.memory.as_ref().unwrap();
        assert_eq!((memory.limit, memory.disable_oom_killer), (Some(-1), Some(true)));
        assert_eq!(resources.block_io.as_ref().unwrap().weight, Some(10));
        assert_eq!((resources.unified.len(), resources.rdma["mlx"].hca_handles), (1, Some(4)));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (text, error) in [
            (
                r#"{"linux":{"namespaces":[{"type":"moon"}]}}"#,
                "linux.namespaces[0].type: there is no \"moon\"",
            ),
            (r#"{"linux":{"namespaces":[{"path":"/x"}]}}"#, "linux.namespaces[0].type: is required"),
            (
                r#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_MAYBE"}}}"#,
                "linux.seccomp.defaultAction: there is no",
            ),
            (r#"{"linux":{"seccomp":{"defaultAction":null}}}"#, "linux.seccomp.defaultAction: is required"),
            (
                r#"{"process":{"user":{"uid":-1}}}"#,
                "process.user.uid: is not an integer from 0 to 4294967295",
            ),
            (r#"{"process":{"user":{"uid":1.5}}}"#, "process.user.uid: is not an integer"),
            (
                r#"{"process":{"rlimits":[{"type":"RLIMIT_CPU","soft":1}]}}"#,
                "process.rlimits[0].hard: is required",
            ),
            (r#"{"process":[]}"#, "process: is not an object"),
            (r#"{"process":{"args":["a",1]}}"#, "process.args[1]: is not a string"),
            (r#"{"linux":{"sysctl":{"a":1}}}"#, "linux.sysctl[a]: is not a string"),
            (r#"{"root":{"readonly":"yes"}}"#, "root.readonly: is neither true nor false"),
            (r#"{"mounts":{}}"#, "mounts: is not an array"),
            ("[]", ": is not an object"),
            ("{", "not JSON"),
        ] {
            assert!(refusal(text).starts_with(error), "{text}: {}", refusal(text));
        }
        let process = Document::process(br#"{"user":{"gid":"x"}}"#.to_vec()).unwrap_err().to_string();
        assert!(process.starts_with("process.user.gid: "), "{process}");
        let resources = Resources::from_json(br#"{"pids":{"limit":"x"}}"#).unwrap_err().to_string();
        assert!(resources.starts_with("linux.resources.pids.limit: "), "{resources}");
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..512)) {
            let _ = Document::spec(bytes);
        }
    }
}
