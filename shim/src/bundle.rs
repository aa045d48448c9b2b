//! Which pod a container belongs to.
//!
//! CRI says so by annotations in the bundle's `config.json`. A container without them is a pod of one.
//!
//! The file is read once for a container, and what is made of it handed on.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::id::{Id, IdError};

/// The annotation that names a container among its pod's.
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";

/// The largest `config.json` that is read, in bytes.
pub const MAX_SPEC: u64 = 8 << 20;

/// The annotation that says what a container is to its pod.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The annotation that names the pod's sandbox.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// The annotation with the pod's uid, by which a kubelet names the pod's directory.
pub const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// A container's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A plain container: a pod of one.
    Alone,
    /// The sandbox itself, whose pause container is answered for and never run.
    Sandbox,
    /// A container in the pod of this sandbox.
    Member(Id),
}

/// Why a bundle does not tell.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read.
    #[error("read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than [`MAX_SPEC`].
    #[error("{0:?} is larger than {MAX_SPEC} bytes")]
    TooLarge(PathBuf),
    /// The file is no runtime configuration.
    #[error("parse {path:?}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where it ends to make sense.
        source: serde_json::Error,
    },
    /// Neither `sandbox` nor `container`.
    #[error("annotation {CONTAINER_TYPE}: {0:?} is neither \"sandbox\" nor \"container\"")]
    ContainerType(String),
    /// A member of no sandbox.
    #[error("annotation {SANDBOX_ID} is missing")]
    NoSandbox,
    /// A sandbox with a bad name.
    #[error("annotation {SANDBOX_ID}")]
    Sandbox(#[source] IdError),
}

/// A container's runtime configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spec {
    /// The container's annotations.
    pub annotations: HashMap<String, String>,
    /// All of it.
    pub config: Value,
}

impl Spec {
    /// Reads `config.json` of `bundle`.
    ///
    /// # Errors
    /// When it cannot be read, is too large, or is not a runtime configuration.
    pub fn read(bundle: &Path) -> Result<Spec, BundleError> {
        let path = bundle.join("config.json");
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_SPEC + 1).read_to_end(&mut text));
        match read {
            Err(source) => Err(BundleError::Read { path, source }),
            Ok(length) if length as u64 > MAX_SPEC => Err(BundleError::TooLarge(path)),
            Ok(_) => Spec::parse(&text).map_err(|source| BundleError::Parse { path, source }),
        }
    }

    fn parse(text: &[u8]) -> serde_json::Result<Spec> {
        let config: Value = serde_json::from_slice(text)?;
        let annotations = match config.get("annotations") {
            Some(annotations) => Option::deserialize(annotations)?.unwrap_or_default(),
            None => HashMap::new(),
        };
        Ok(Spec { annotations, config })
    }

    /// What the container is called in its pod, where its successors are called the same.
    pub fn name(&self) -> Option<&str> {
        self.annotations.get(CONTAINER_NAME).map(String::as_str)
    }

    /// The container's place in its pod.
    ///
    /// # Errors
    /// When the annotations contradict themselves: guessing could put a container into the wrong machine.
    pub fn role(&self) -> Result<Role, BundleError> {
        match self.annotations.get(CONTAINER_TYPE).map(String::as_str) {
            None => Ok(Role::Alone),
            Some("sandbox") => Ok(Role::Sandbox),
            Some("container") => {
                let sandbox = self.annotations.get(SANDBOX_ID).ok_or(BundleError::NoSandbox)?;
                sandbox.parse().map(Role::Member).map_err(BundleError::Sandbox)
            }
            Some(other) => Err(BundleError::ContainerType(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read(text: &str) -> Result<Spec, BundleError> {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), text).unwrap();
        Spec::read(bundle.path())
    }

    fn annotated(pairs: &[(&str, &str)]) -> Result<Role, BundleError> {
        let annotations: HashMap<_, _> = pairs.iter().copied().collect();
        read(&serde_json::json!({"ociVersion": "1.2.0", "annotations": annotations}).to_string())?.role()
    }

    #[test]
    fn groups_by_the_sandbox() {
        assert_eq!(read("{}").unwrap().role().unwrap(), Role::Alone);
        assert_eq!(annotated(&[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "s1")]).unwrap(), Role::Sandbox);
        let member = annotated(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "s1")]).unwrap();
        assert_eq!(member, Role::Member("s1".parse().unwrap()));
    }

    #[test]
    fn never_guesses() {
        assert!(matches!(annotated(&[(CONTAINER_TYPE, "container")]), Err(BundleError::NoSandbox)));
        assert!(matches!(annotated(&[(CONTAINER_TYPE, "pod")]), Err(BundleError::ContainerType(_))));
        let escape = annotated(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "../s")]);
        assert!(matches!(escape, Err(BundleError::Sandbox(_))));
    }

    #[test]
    fn says_what_is_wrong_with_the_file() {
        for text in ["{", r#"{"annotations": 3}"#, r#"{"annotations": {"a": 1}}"#] {
            assert!(matches!(read(text), Err(BundleError::Parse { .. })), "{text}");
        }
        assert_eq!(read(r#"{"annotations": null}"#).unwrap().role().unwrap(), Role::Alone);
        assert!(matches!(Spec::read(Path::new("/nonexistent")), Err(BundleError::Read { .. })));
        let huge = format!("{{{}}}", " ".repeat(MAX_SPEC.try_into().unwrap()));
        assert!(matches!(read(&huge), Err(BundleError::TooLarge(_))));
    }
}
