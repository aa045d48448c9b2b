//! The OCI runtime specification's configuration (`config.json`), version 1.x: the common and the Linux part.
//!
//! Plain serde structures instead of the `oci-spec` crate, whose regular expression engine alone would take more than
//! half of the agent's size budget. Unknown members are ignored, as the specification demands ("Extensibility");
//! known ones that this runtime does not honour are kept and refused by [`crate::container::validate`].
//!
//! - [`linux`]: the `linux` object.
//! - [`process`]: the `process` object.
//! - [`resources`]: limits, `linux.resources`.
//! - [`seccomp`]: the system call filter, `linux.seccomp`.

pub mod linux;
pub mod process;
pub mod resources;
pub mod seccomp;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use linux::{Device, IdMapping, Linux, Namespace, NamespaceKind, TimeOffset};
pub use process::{Capabilities, Process, Rlimit, User};
pub use resources::Resources;
pub use seccomp::Seccomp;

/// A container's configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Version of the specification that the bundle complies with (SemVer 2.0.0).
    #[serde(rename = "ociVersion")]
    pub version: String,
    /// The container's root file system.
    pub root: Option<Root>,
    /// Mounts beside the root, in the order in which they are made.
    #[serde(deserialize_with = "null_default")]
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
    #[serde(deserialize_with = "null_default")]
    pub annotations: BTreeMap<String, String>,
    /// Linux-specific configuration.
    pub linux: Option<Linux>,
    /// Other platforms' sections, kept so that they can be refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub windows: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solaris: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<serde_json::Value>,
    /// See [`Spec::windows`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zos: Option<serde_json::Value>,
}

impl Spec {
    /// Parses a `config.json`.
    ///
    /// # Errors
    /// When it is not JSON, or a member has a type or value that the specification does not allow.
    pub fn from_json(json: &[u8]) -> Result<Spec, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// The `linux` object, empty when absent.
    pub(crate) fn linux(&self) -> std::borrow::Cow<'_, Linux> {
        match &self.linux {
            Some(linux) => std::borrow::Cow::Borrowed(linux),
            None => std::borrow::Cow::Owned(Linux::default()),
        }
    }
}

/// The root file system.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Its directory.
    pub path: PathBuf,
    /// Whether the container may not write to it.
    pub readonly: bool,
}

/// A mount beside the root.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Absolute path inside the container.
    pub destination: PathBuf,
    /// Device, directory or dummy name.
    pub source: Option<PathBuf>,
    /// File system type, "bind" or empty for bind mounts.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// As in fstab(5), and the specification's own.
    #[serde(deserialize_with = "null_default")]
    pub options: Vec<String>,
    /// User id mappings of an id-mapped mount.
    #[serde(deserialize_with = "null_default")]
    pub uid_mappings: Vec<IdMapping>,
    /// Group id mappings of an id-mapped mount.
    #[serde(deserialize_with = "null_default")]
    pub gid_mappings: Vec<IdMapping>,
}

/// Hooks of all points of the life cycle, kept so that they can be refused by name.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Hooks {
    #[serde(deserialize_with = "null_default")]
    pub prestart: Vec<serde_json::Value>,
    #[serde(deserialize_with = "null_default")]
    pub create_runtime: Vec<serde_json::Value>,
    #[serde(deserialize_with = "null_default")]
    pub create_container: Vec<serde_json::Value>,
    #[serde(deserialize_with = "null_default")]
    pub start_container: Vec<serde_json::Value>,
    #[serde(deserialize_with = "null_default")]
    pub poststart: Vec<serde_json::Value>,
    #[serde(deserialize_with = "null_default")]
    pub poststop: Vec<serde_json::Value>,
}

/// Go writes an empty slice or map as `null`.
pub(crate) fn null_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_members_are_ignored_and_nulls_are_empty() {
        let spec = Spec::from_json(
            br#"{"ociVersion":"1.2.0","future":{"x":1},"mounts":null,"annotations":null,
                "process":{"args":["sh"],"cwd":"/","env":null,"user":{"uid":1,"gid":2}},
                "linux":{"namespaces":[{"type":"pid"}],"devices":null}}"#,
        )
        .unwrap();
        assert!(spec.mounts.is_empty());
        assert_eq!(spec.process.unwrap().user.uid, 1);
        assert_eq!(spec.linux.unwrap().namespaces[0].kind, NamespaceKind::Pid);
    }

    #[test]
    fn values_outside_their_enumeration_are_refused() {
        assert!(Spec::from_json(br#"{"linux":{"namespaces":[{"type":"moon"}]}}"#).is_err());
        assert!(Spec::from_json(br#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_MAYBE"}}}"#).is_err());
        assert!(Spec::from_json(br#"{"process":{"user":{"uid":-1}}}"#).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..512)) {
            let _ = Spec::from_json(&bytes);
        }
    }
}
