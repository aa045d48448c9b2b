//! The node's configuration, and what a pod may change of it.
//!
//! Unknown keys are errors, so that a misspelt limit is not silently none. Annotations come from whoever may make a
//! pod: each is refused unless the node lists it, and even then stays within the node's limits.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::sizing::Policy;

/// Every key, documented, with its default.
pub const DEFAULT: &str = include_str!("default.toml");
/// What all of our annotations begin with.
pub const PREFIX: &str = "caisson.dev/";

/// A node's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What machines are made from.
    pub machine: Machine,
    /// How large machines are.
    pub sizing: Policy,
    /// Whether and how pods start from templates.
    pub template: Template,
    /// What pods may change.
    pub annotations: Annotations,
}

/// Starting from templates.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// Whether pods do.
    pub mode: TemplateMode,
    /// Where templates are kept: root's, on a disk.
    pub directory: PathBuf,
    /// Between whose pods a template's memory is shared.
    pub share: TemplateSharing,
}

/// Whether pods start from templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateMode {
    /// When there is one, and one is made when there is none.
    Auto,
    /// When there is one. None is made unless somebody asks for it.
    Prepared,
    /// Never: every pod boots.
    Off,
}

/// Between whose pods the pages of a template are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateSharing {
    /// The pods of one Kubernetes namespace; without Kubernetes, of one containerd namespace.
    Namespace,
    /// All of the node's.
    Node,
}

/// Where a pod's configuration is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigFiles {
    /// The node's directory, with `config.toml` and `config.d/*.toml`.
    pub node: PathBuf,
    /// A file of the pod's runtime handler, whose keys count more than the node's.
    pub handler: Option<PathBuf>,
}

/// What machines are made from: files of the node's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The VMM's binary.
    pub vmm: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial RAM disk, with the agent in it.
    pub initramfs: PathBuf,
    /// What comes after our own parameters on the kernel's command line.
    pub kernel_parameters: String,
}

/// What pods may change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Annotations {
    /// The annotations that pods may set.
    pub allow: BTreeSet<Annotation>,
}

/// An annotation that Caisson knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Annotation {
    /// vCPUs, where the pod has no limit.
    #[serde(rename = "caisson.dev/default-vcpus")]
    DefaultVcpus,
    /// Memory in MiB, where the pod has no limit.
    #[serde(rename = "caisson.dev/default-memory-mib")]
    DefaultMemoryMib,
    /// Whether the pod may start from a template.
    #[serde(rename = "caisson.dev/template")]
    Template,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory cannot be read.
    #[error("read {path:?}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no configuration, or has a key or value that there is not.
    #[error("parse {path:?}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// Values that contradict each other.
    #[error("sizing: {0} must be from 1 to {1}")]
    Range(&'static str, &'static str),
    /// An annotation of ours that does not exist.
    #[error("annotation {0:?} is unknown")]
    UnknownAnnotation(String),
    /// An annotation that the node does not list.
    #[error("annotation {0:?} is not allowed by this node")]
    NotAllowed(String),
    /// An annotation whose value is none.
    #[error("annotation {name:?}: {value:?} is no value that makes sense here")]
    Value {
        /// The annotation.
        name: String,
        /// Its value, shortened.
        value: String,
    },
}

impl Config {
    /// Reads the node's `config.toml` and `config.d/*.toml`, then the handler's file; what they do not set has its
    /// default.
    ///
    /// # Errors
    /// For unreadable files, unknown keys, wrong types, and values that contradict each other.
    pub fn read(files: &ConfigFiles) -> Result<Config, ConfigError> {
        let mut merged = parse(DEFAULT, Path::new("default.toml"))?;
        let mut last = PathBuf::from("default.toml");
        for path in node_files(&files.node)?.into_iter().chain(files.handler.clone()) {
            let text = fs::read_to_string(&path)
                .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            merge(&mut merged, parse(&text, &path)?);
            // At once, so that an error names the file that brought it in.
            from_table(merged.clone(), &path)?;
            last = path;
        }
        let config = from_table(merged, &last)?;
        config.check()?;
        Ok(config)
    }

    /// The configuration of one pod, after its annotations. Those of others are not looked at.
    ///
    /// # Errors
    /// For annotations that are unknown, not allowed, or beyond the node's limits.
    pub fn for_pod(mut self, annotations: &HashMap<String, String>) -> Result<Config, ConfigError> {
        for (name, value) in annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
            let wrong = || ConfigError::Value { name: name.clone(), value: value.chars().take(64).collect() };
            let known =
                Annotation::from_name(name).ok_or_else(|| ConfigError::UnknownAnnotation(name.clone()))?;
            if !self.annotations.allow.contains(&known) {
                return Err(ConfigError::NotAllowed(name.clone()));
            }
            match known {
                Annotation::DefaultVcpus => self.sizing.default_vcpus = value.parse().map_err(|_| wrong())?,
                Annotation::DefaultMemoryMib => {
                    self.sizing.default_memory_mib = value.parse().map_err(|_| wrong())?;
                }
                Annotation::Template => {
                    self.template.mode = from_word(value).map_err(|_| wrong())?;
                }
            }
            self.check().map_err(|_| wrong())?;
        }
        Ok(self)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let sizing = &self.sizing;
        if !(1..=sizing.max_vcpus).contains(&sizing.default_vcpus) {
            return Err(ConfigError::Range("default_vcpus", "max_vcpus"));
        }
        if !(1..=sizing.max_memory_mib).contains(&sizing.default_memory_mib) {
            return Err(ConfigError::Range("default_memory_mib", "max_memory_mib"));
        }
        Ok(())
    }
}

impl Annotation {
    fn from_name(name: &str) -> Option<Annotation> {
        from_word(name).ok()
    }
}

/// A value that a word stands for.
fn from_word<'a, T: Deserialize<'a>>(word: &'a str) -> Result<T, serde::de::value::Error> {
    T::deserialize(serde::de::IntoDeserializer::into_deserializer(word))
}

/// The files that there are, in the order in which they count.
fn node_files(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let main = directory.join("config.toml");
    let drop_ins = directory.join("config.d");
    let failed = |source| ConfigError::Read { path: drop_ins.clone(), source };
    let mut found = Vec::new();
    match fs::read_dir(&drop_ins) {
        Ok(entries) => {
            for entry in entries {
                let path = entry.map_err(failed)?.path();
                if path.extension().is_some_and(|extension| extension == "toml") {
                    found.push(path);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    found.sort();
    if main.try_exists().map_err(|source| ConfigError::Read { path: main.clone(), source })? {
        found.insert(0, main);
    }
    Ok(found)
}

fn parse(text: &str, path: &Path) -> Result<Table, ConfigError> {
    text.parse().map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

fn from_table(table: Table, path: &Path) -> Result<Config, ConfigError> {
    table.try_into().map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

/// Puts each key of `over` in the place of `base`'s. Tables are merged, arrays replaced.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("config.d")).unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let handler = directory.path().join("handler.toml");
        let handler = handler.exists().then_some(handler);
        Config::read(&ConfigFiles { node: directory.path().to_owned(), handler })
    }

    fn pod(config: &Config, name: &str, value: &str) -> Result<Config, ConfigError> {
        config.clone().for_pod(&HashMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[test]
    fn without_files_the_documented_defaults_hold() {
        let config = Config::read(&ConfigFiles { node: "/nonexistent".into(), handler: None }).unwrap();
        assert_eq!(config, toml::from_str(DEFAULT).unwrap());
        assert_eq!(config.sizing.default_vcpus, 1);
    }

    #[test]
    fn later_files_win_key_by_key() {
        let config = read(&[
            ("config.d/20.toml", "sizing.default_vcpus = 4"),
            ("config.d/10.toml", "sizing.default_vcpus = 3\nsizing.max_vcpus = 5"),
            ("config.d/99.toml.orig", "nonsense"),
            ("config.toml", "[sizing]\ndefault_vcpus = 2\nmax_vcpus = 6\nguest_overhead_mib = 7"),
        ])
        .unwrap();
        let sizing = config.sizing;
        assert_eq!((sizing.default_vcpus, sizing.max_vcpus, sizing.guest_overhead_mib), (4, 5, 7));
    }

    #[test]
    fn the_handlers_file_counts_most_and_must_be_there() {
        let config = read(&[
            ("handler.toml", "sizing.default_vcpus = 9"),
            ("config.d/20.toml", "sizing.default_vcpus = 4"),
            ("config.toml", "sizing.max_vcpus = 16"),
        ])
        .unwrap();
        assert_eq!((config.sizing.default_vcpus, config.sizing.max_vcpus), (9, 16));
        let missing =
            Config::read(&ConfigFiles { node: "/nonexistent".into(), handler: Some("/no/file".into()) });
        assert!(matches!(missing, Err(ConfigError::Read { path, .. }) if path == Path::new("/no/file")));
    }

    #[test]
    fn an_error_names_the_file_that_brought_it() {
        for text in [
            "sizing.max_vcpu = 3",
            "sizing.max_vcpus = 300",
            "colour = 1",
            "annotations.allow = [\"x\"]",
            "=",
        ] {
            let result = read(&[("config.d/10.toml", text), ("config.d/20.toml", "")]);
            let Err(ConfigError::Parse { path, .. }) = result else { panic!("{text}: {result:?}") };
            assert!(path.ends_with("config.d/10.toml"), "{path:?}");
        }
        let contradiction = read(&[("config.toml", "sizing.default_vcpus = 33")]);
        assert!(matches!(contradiction, Err(ConfigError::Range("default_vcpus", "max_vcpus"))));
        assert!(matches!(read(&[("config.toml", "sizing.max_memory_mib = 0")]), Err(ConfigError::Range(..))));
    }

    #[test]
    fn a_pod_changes_nothing_that_is_not_listed() {
        let config = read(&[]).unwrap();
        let refused = pod(&config, "caisson.dev/default-vcpus", "2");
        assert!(matches!(refused, Err(ConfigError::NotAllowed(_))));
        let refused = pod(&config, "caisson.dev/kernel", "/tmp/mine");
        assert!(matches!(refused, Err(ConfigError::UnknownAnnotation(_))));
        assert_eq!(pod(&config, "example.com/kernel", "x").unwrap(), config);
    }

    #[test]
    fn template_mode_is_the_nodes_unless_it_lets_the_pod_choose() {
        let config = read(&[]).unwrap();
        assert_eq!(config.template.mode, TemplateMode::Auto);
        assert!(matches!(pod(&config, "caisson.dev/template", "off"), Err(ConfigError::NotAllowed(_))));
        let config = read(&[("config.toml", "annotations.allow = [\"caisson.dev/template\"]")]).unwrap();
        assert_eq!(pod(&config, "caisson.dev/template", "off").unwrap().template.mode, TemplateMode::Off);
        let wrong = pod(&config, "caisson.dev/template", "never");
        assert!(matches!(wrong, Err(ConfigError::Value { .. })));
    }

    #[test]
    fn a_pod_stays_within_the_nodes_limits() {
        let allow = "annotations.allow = [\"caisson.dev/default-vcpus\", \"caisson.dev/default-memory-mib\"]";
        let config = read(&[("config.toml", allow)]).unwrap();
        assert_eq!(pod(&config, "caisson.dev/default-vcpus", "2").unwrap().sizing.default_vcpus, 2);
        let memory = pod(&config, "caisson.dev/default-memory-mib", "512").unwrap();
        assert_eq!(memory.sizing.default_memory_mib, 512);
        for (name, value) in [("vcpus", "33"), ("vcpus", "0"), ("vcpus", "-1"), ("memory-mib", "65537")] {
            let result = pod(&config, &format!("caisson.dev/default-{name}"), value);
            assert!(matches!(result, Err(ConfigError::Value { .. })), "{name}={value}");
        }
    }
}
