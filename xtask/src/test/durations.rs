//! How long each whole-system test took when it last passed, kept in the cache.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::outcome::Test;
use crate::{cache::Cache, testbed::Variant};

/// What a test is expected to take if none is known.
const UNKNOWN: Duration = Duration::from_secs(10);

/// Durations in milliseconds by variant, then by binary and test.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Durations(BTreeMap<String, BTreeMap<String, u64>>);

impl Durations {
    /// Reads what the last run kept. Nothing depends on it but how well the tests are dealt: a file that is not there, or
    /// not to be understood, is an empty one.
    pub(super) fn read(cache: &Cache) -> Self {
        let bytes = fs::read(path(cache)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Keeps them for the next run.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub(super) fn write(&self, cache: &Cache) -> Result<()> {
        let path = path(cache);
        let part = path.with_extension(std::process::id().to_string());
        fs::write(&part, serde_json::to_vec(self)?).context("writing how long tests took")?;
        fs::rename(&part, &path).context("keeping how long tests took")
    }

    /// Notes how long a test took.
    pub(super) fn note(&mut self, variant: Variant, test: &Test, took: Duration) {
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.0.entry(variant.name().to_owned()).or_default().insert(test.id(), millis);
    }

    /// How long a test will take: what it took on this variant, else what it took on any other.
    pub(super) fn expected(&self, variant: Variant, test: &Test) -> Duration {
        let id = test.id();
        let own = self.0.get(variant.name()).and_then(|tests| tests.get(&id));
        let any = || self.0.values().find_map(|tests| tests.get(&id));
        own.or_else(any).map_or(UNKNOWN, |millis| Duration::from_millis(*millis))
    }
}

fn path(cache: &Cache) -> PathBuf {
    cache.root().join("test-durations.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_known_to_the_next_run_and_for_other_variants() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let test = Test { binary: "e2e::a".to_owned(), name: "b".to_owned() };
        let mut durations = Durations::read(&cache);
        assert_eq!(durations.expected(Variant::Sid, &test), UNKNOWN);
        durations.note(Variant::Trixie, &test, Duration::from_millis(2500));
        durations.write(&cache).unwrap();
        let mut again = Durations::read(&cache);
        assert_eq!(again.expected(Variant::Sid, &test), Duration::from_millis(2500));
        again.note(Variant::Sid, &test, Duration::from_secs(9));
        assert_eq!(again.expected(Variant::Sid, &test), Duration::from_secs(9));
        assert_eq!(again.expected(Variant::Trixie, &test), Duration::from_millis(2500));
        fs::write(path(&cache), "{").unwrap();
        assert_eq!(Durations::read(&cache).expected(Variant::Sid, &test), UNKNOWN);
    }
}
