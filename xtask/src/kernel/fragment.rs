//! Fragments of kernel configuration.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// A file of options that a kernel must have, or must not have.
#[derive(Debug)]
pub(super) struct Fragment {
    path: PathBuf,
    text: String,
}

impl Fragment {
    /// Reads a fragment and checks that each of its lines is an option, a switched-off option, or a comment.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        for (index, line) in text.lines().enumerate() {
            let understood = line.is_empty() || line.starts_with('#') || Setting::parse(line).is_some();
            ensure!(understood, "{}:{}: not an option: {line}", path.display(), index + 1);
        }
        Ok(Self { path: path.to_owned(), text })
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its contents.
    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

/// An option and its value; off is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setting<'a> {
    name: &'a str,
    value: Option<&'a str>,
}

impl<'a> Setting<'a> {
    /// Reads `CONFIG_X=value` or `# CONFIG_X is not set`.
    fn parse(line: &'a str) -> Option<Self> {
        let (name, value) = match line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
            Some(name) => (name, None),
            None => line.split_once('=').map(|(name, value)| (name, Some(value)))?,
        };
        let named = name.strip_prefix("CONFIG_").is_some_and(|rest| {
            !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        });
        // `=n` is how people write "is not set".
        named.then_some(Self { name, value: value.filter(|value| *value != "n") })
    }

    fn show(name: &str, value: Option<&str>) -> String {
        value.map_or_else(|| format!("{name} off"), |value| format!("{name}={value}"))
    }
}

/// What the fragments ask for and the configuration does not have. When two fragments disagree the later one counts.
pub(super) fn lost(fragments: &[Fragment], config: &str) -> Vec<String> {
    let has: HashMap<&str, &str> = config
        .lines()
        .filter_map(Setting::parse)
        .filter_map(|option| Some((option.name, option.value?)))
        .collect();
    let mut wanted: Vec<Setting<'_>> = Vec::new();
    for option in fragments.iter().flat_map(|fragment| fragment.text.lines()).filter_map(Setting::parse) {
        wanted.retain(|earlier| earlier.name != option.name);
        wanted.push(option);
    }
    let differs = |option: &&Setting<'_>| has.get(option.name).copied() != option.value;
    wanted
        .iter()
        .filter(differs)
        .map(|option| {
            let (asked, got) = (option.value, has.get(option.name).copied());
            format!(
                "  asked for {}, got {}",
                Setting::show(option.name, asked),
                Setting::show(option.name, got)
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(text: &str) -> Fragment {
        Fragment { path: PathBuf::new(), text: text.to_owned() }
    }

    #[test]
    fn an_option_that_vanished_is_lost() {
        let asked = [fragment("CONFIG_VIRTIO_MEM=y\nCONFIG_NR_CPUS=64\n")];
        assert_eq!(
            lost(&asked, "CONFIG_NR_CPUS=64\n"),
            ["  asked for CONFIG_VIRTIO_MEM=y, got CONFIG_VIRTIO_MEM off"]
        );
        assert_eq!(lost(&asked, "CONFIG_NR_CPUS=8\nCONFIG_VIRTIO_MEM=y\n").len(), 1);
        assert!(lost(&asked, "CONFIG_VIRTIO_MEM=y\nCONFIG_NR_CPUS=64\n").is_empty());
    }

    #[test]
    fn an_option_that_came_back_is_lost() {
        let asked = [fragment("# CONFIG_PCI is not set\n")];
        assert_eq!(lost(&asked, "CONFIG_PCI=y\n"), ["  asked for CONFIG_PCI off, got CONFIG_PCI=y"]);
        assert!(lost(&asked, "# CONFIG_PCI is not set\n").is_empty());
        assert!(lost(&asked, "").is_empty());
    }

    #[test]
    fn a_later_fragment_overrides_an_earlier_one() {
        let asked = [fragment("# CONFIG_DEBUG_FS is not set\n"), fragment("CONFIG_DEBUG_FS=y\n")];
        assert!(lost(&asked, "CONFIG_DEBUG_FS=y\n").is_empty());
        assert_eq!(lost(&asked, "").len(), 1);
    }

    #[test]
    fn a_line_that_means_nothing_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bad.config");
        fs::write(&path, "# a reason\nCONFIG_X=y\nVIRTIO=y\n").unwrap();
        let error = Fragment::read(&path).unwrap_err().to_string();
        assert!(error.contains("bad.config:3"), "{error}");
    }

    #[test]
    fn our_own_fragments_are_understood() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel-config");
        let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "config")) {
            Fragment::read(&path).unwrap();
        }
    }
}
