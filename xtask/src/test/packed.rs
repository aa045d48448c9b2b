//! The whole-system tests, built and put aside so that they can run on another machine.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use super::outcome::Test;
use crate::{
    host::{Host, cargo},
    proc,
    system::Place,
};

/// A directory with the tests' binaries, and what nextest must know of them.
///
/// The testbed reads them where they are, a page when it needs one: an archive would be unpacked at an emulated
/// processor's speed. They are links to what cargo has built, so that a later build does not change them.
#[derive(Debug)]
pub(super) struct Packed(PathBuf);

impl Packed {
    /// Builds the tests and fills the directory.
    ///
    /// # Errors
    /// When they don't build, or are not where nextest says.
    pub(super) fn build(host: &Host) -> Result<Self> {
        let packed = Self(host.target.join("xtask/tests"));
        if packed.0.exists() {
            fs::remove_dir_all(&packed.0).context("removing the tests that were built before")?;
        }
        fs::create_dir_all(&packed.0).context("creating the directory of tests")?;
        let mut list = cargo();
        list.args(["nextest", "list", "--package", "caisson-e2e", "--list-type", "binaries-only"]);
        list.args(["--message-format", "json"]).current_dir(&host.workspace).stderr(Stdio::inherit());
        let binaries = proc::output(&mut list)?;
        let parsed = serde_json::from_str(&binaries).context("parsing nextest's list of binaries")?;
        for path in paths(&parsed) {
            packed.take(&host.target, path)?;
        }
        fs::write(packed.binaries(), binaries).context("writing the list of binaries")?;
        let mut metadata = cargo();
        metadata.args(["metadata", "--format-version", "1"]).current_dir(&host.workspace);
        fs::write(packed.metadata(), proc::output(&mut metadata)?)
            .context("writing cargo's metadata")
            .map(|()| packed)
    }

    /// nextest's options to run them there.
    ///
    /// # Errors
    /// When the testbed does not see the directory.
    pub(super) fn options(&self, host: &Host, place: &Place<'_>) -> Result<Vec<String>> {
        [
            ("binaries-metadata", &self.binaries()),
            ("cargo-metadata", &self.metadata()),
            ("target-dir-remap", &self.0),
            ("workspace-remap", &host.workspace),
        ]
        .into_iter()
        .map(|(option, path)| Ok(format!("--{option}={}", place.path(host, path)?)))
        .collect()
    }

    /// The tests that a filter selects: those of the normal runs, or the soaks alone.
    ///
    /// # Errors
    /// When nextest does not understand the filter, or a binary does not list its tests.
    pub(super) fn list(&self, host: &Host, filter: Option<&str>, soak: bool) -> Result<Vec<Test>> {
        let mut list = cargo();
        list.args(["nextest", "list", "--message-format", "json"]);
        list.arg("--binaries-metadata").arg(self.binaries()).arg("--cargo-metadata").arg(self.metadata());
        list.arg("--target-dir-remap").arg(&self.0);
        if let Some(filter) = filter {
            list.args(["-E", filter]);
        }
        if soak {
            list.arg("--run-ignored=only");
        }
        list.current_dir(&host.workspace).stderr(Stdio::inherit());
        let listed: Listed =
            serde_json::from_str(&proc::output(&mut list)?).context("parsing nextest's list of tests")?;
        Ok(listed.tests())
    }

    fn binaries(&self) -> PathBuf {
        self.0.join("binaries.json")
    }

    fn metadata(&self) -> PathBuf {
        self.0.join("cargo.json")
    }

    /// Links a file of the target directory, or one given relative to it, into ours.
    fn take(&self, target: &Path, file: &str) -> Result<()> {
        let relative = Path::new(file).strip_prefix(target).unwrap_or(Path::new(file));
        let link = self.0.join(relative);
        let parent = link.parent().context("a test has no directory")?;
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        fs::hard_link(target.join(relative), &link).with_context(|| format!("linking {}", relative.display()))
    }
}

/// nextest's list of tests, as far as it is needed
/// (<https://docs.rs/nextest-metadata>, `TestListSummary`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
    rust_suites: BTreeMap<String, Suite>,
}

/// A binary.
#[derive(Debug, Deserialize)]
struct Suite {
    testcases: BTreeMap<String, Case>,
}

/// A test.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Case {
    filter_match: Match,
}

/// Whether the filter selects it.
#[derive(Debug, Deserialize)]
struct Match {
    status: String,
}

impl Listed {
    /// The selected tests.
    fn tests(self) -> Vec<Test> {
        let of = |(binary, suite): (String, Suite)| {
            let selected =
                suite.testcases.into_iter().filter(|(_, case)| case.filter_match.status == "matches");
            selected.map(move |(name, _)| Test { binary: binary.clone(), name }).collect::<Vec<_>>()
        };
        self.rust_suites.into_iter().flat_map(of).collect()
    }
}

/// The paths of the tests and of the other binaries of their package.
fn paths(list: &Value) -> impl Iterator<Item = &str> {
    let tests = list["rust-binaries"].as_object().into_iter().flat_map(|tests| tests.values());
    let others = list["rust-build-meta"]["non-test-binaries"].as_object();
    let others =
        others.into_iter().flat_map(|packages| packages.values()).filter_map(Value::as_array).flatten();
    tests
        .filter_map(|test| test["binary-path"].as_str())
        .chain(others.filter_map(|other| other["path"].as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_tests_are_those_that_the_filter_selects() {
        let case =
            |status: &str| serde_json::json!({ "ignored": false, "filter-match": { "status": status } });
        let listed: Listed = serde_json::from_value(serde_json::json!({
            "test-count": 2,
            "rust-suites": {
                "e2e::a": { "status": "listed", "testcases": { "x": case("matches"), "y": case("mismatch") } },
                "e2e::b": { "status": "skipped", "testcases": {} },
            },
        }))
        .unwrap();
        assert_eq!(listed.tests(), [Test { binary: "e2e::a".to_owned(), name: "x".to_owned() }]);
    }

    #[test]
    fn tests_and_what_they_start_are_taken() {
        let list = serde_json::json!({
            "rust-build-meta": { "non-test-binaries": { "p": [{ "name": "b", "path": "debug/b" }] } },
            "rust-binaries": { "p::t": { "binary-path": "/target/debug/deps/t-1" } },
        });
        assert_eq!(paths(&list).collect::<Vec<_>>(), ["/target/debug/deps/t-1", "debug/b"]);
    }
}
