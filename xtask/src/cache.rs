//! What is slow to make is made once: entries named by the hash of everything that went into them.
//!
//! An entry appears complete or not at all: it is built in a scratch directory and renamed. A scratch directory is
//! locked by the process that uses it, so the next run can tell what a killed one left behind, and removes it. What has
//! not been used for a month goes when a new entry of its kind comes.

use std::{
    env,
    fmt::Write as _,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// How long an entry stays that nothing uses.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// The cache directory: `${XDG_CACHE_HOME:-~/.cache}/caisson`.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the user's cache and removes what killed runs left in it.
    ///
    /// # Errors
    /// When there is no home directory or the cache can't be written.
    pub(crate) fn open() -> Result<Self> {
        let base = match env::var_os("XDG_CACHE_HOME") {
            Some(base) if Path::new(&base).is_absolute() => PathBuf::from(base),
            _ => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
                .join(".cache"),
        };
        Self::at(&base.join("caisson"))
    }

    /// Opens a cache in a directory of the caller's choice.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn at(root: &Path) -> Result<Self> {
        let cache = Self { root: root.to_owned() };
        for directory in [cache.scratch_root(), cache.lock_root()] {
            fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        }
        cache.sweep()?;
        Ok(cache)
    }

    /// The directory that holds everything.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The entry of this kind and key, built by `build` into the directory it is given if it is not there yet.
    ///
    /// Two processes that want the same entry build it once: the second waits.
    ///
    /// # Errors
    /// When `build` fails; nothing of the entry is left then.
    pub(crate) fn entry(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(path) = self.existing(kind, key) {
            return Ok(path);
        }
        let path = self.root.join(kind).join(key.hex());
        let _lock = self.lock(&format!("{kind}-{}", key.hex()))?;
        if path.exists() {
            return Ok(path);
        }
        let scratch = self.scratch()?;
        let building = scratch.path().join("entry");
        fs::create_dir(&building).with_context(|| format!("creating {}", building.display()))?;
        build(&building)?;
        fs::create_dir_all(self.root.join(kind)).with_context(|| format!("creating the cache of {kind}"))?;
        fs::rename(&building, &path).with_context(|| format!("publishing {}", path.display()))?;
        touch(&path);
        self.prune(kind)?;
        Ok(path)
    }

    /// The entry of this kind and key if it is there.
    pub(crate) fn existing(&self, kind: &str, key: &Key) -> Option<PathBuf> {
        let path = self.root.join(kind).join(key.hex());
        path.exists().then(|| {
            touch(&path);
            path
        })
    }

    /// Removes this kind's entries that nothing has used for long.
    fn prune(&self, kind: &str) -> Result<()> {
        let scratch = self.scratch()?;
        let listing = || format!("listing the cache of {kind}");
        for entry in fs::read_dir(self.root.join(kind)).with_context(listing)? {
            let entry = entry.with_context(listing)?;
            let used = entry.metadata().and_then(|metadata| metadata.modified()).with_context(listing)?;
            if used.elapsed().is_ok_and(|unused| unused > KEPT) {
                // It goes as it came: at once. The scratch directory's end removes what is in it.
                let aside = scratch.path().join(entry.file_name());
                fs::rename(entry.path(), aside)
                    .with_context(|| format!("removing the unused {}", entry.path().display()))?;
            }
        }
        Ok(())
    }

    /// A directory on the cache's disk for the duration of one step.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn scratch(&self) -> Result<Scratch> {
        // Between the creation of a directory and its lock a sweep could take it for an abandoned one.
        let _no_sweep = self.lock("scratch")?;
        let directory = tempfile::Builder::new().prefix("run-").tempdir_in(self.scratch_root())?;
        let lock =
            File::create(directory.path().join(".lock")).context("creating a scratch directory's lock")?;
        lock.lock().context("locking a scratch directory")?;
        Ok(Scratch { directory, _lock: lock })
    }

    /// Waits for a lock of this name; it is held until the file is dropped.
    ///
    /// # Errors
    /// When the lock file can't be made.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let path = self.lock_root().join(name);
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if name != "scratch" => {
                eprintln!("==> waiting for another process that is making {name}");
            }
            Err(_) => {}
        }
        file.lock().with_context(|| format!("locking {}", path.display()))?;
        Ok(file)
    }

    /// Removes the scratch directories whose owners are gone.
    fn sweep(&self) -> Result<()> {
        let _no_creation = self.lock("scratch")?;
        for entry in fs::read_dir(self.scratch_root()).context("listing scratch directories")? {
            let path = entry.context("listing scratch directories")?.path();
            let alive = File::open(path.join(".lock")).is_ok_and(|lock| lock.try_lock().is_err());
            if !alive {
                fs::remove_dir_all(&path)
                    .with_context(|| format!("removing the abandoned {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn scratch_root(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn lock_root(&self) -> PathBuf {
        self.root.join("locks")
    }
}

/// Notes that an entry is in use. One of another user's can't be noted, nor removed.
fn touch(entry: &Path) {
    let _ = File::open(entry).and_then(|directory| directory.set_modified(SystemTime::now()));
}

/// A directory that is removed at the end of its step, or by the next run if this one is killed.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: tempfile::TempDir,
    _lock: File,
}

impl Scratch {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// The hash of everything that an entry is made from.
#[derive(Clone, Debug)]
pub(crate) struct Key(Sha256);

impl Key {
    /// A key whose first input is the name and version of the recipe.
    pub(crate) fn new(recipe: &str) -> Self {
        Self(Sha256::new()).with(recipe)
    }

    /// Adds an input. Inputs are framed by their length: `ab`, `c` is not `a`, `bc`.
    pub(crate) fn with(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        self.0.update((input.len() as u64).to_le_bytes());
        self.0.update(input);
        self
    }

    /// The first 16 hexadecimal digits, which name the entry.
    pub(crate) fn hex(&self) -> String {
        self.0.clone().finalize().iter().take(8).fold(String::new(), |mut text, byte| {
            // Writing into a string can't fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        (directory, cache)
    }

    #[test]
    fn an_entry_is_built_once_per_key() {
        let (_directory, cache) = cache();
        let builds = Cell::new(0);
        let mut paths = Vec::new();
        for input in ["a", "a", "b"] {
            let key = Key::new("test-1").with(input);
            let build = |path: &Path| {
                builds.set(builds.get() + 1);
                Ok(fs::write(path.join("file"), input)?)
            };
            paths.push(cache.entry("thing", &key, build).unwrap());
        }
        assert_eq!(builds.get(), 2);
        assert_eq!(paths[0], paths[1]);
        assert_eq!(fs::read(paths[2].join("file")).unwrap(), b"b");
    }

    #[test]
    fn what_is_not_used_for_long_goes() {
        let (_directory, cache) = cache();
        let make = |name: &str| cache.entry("thing", &Key::new(name), |_| Ok(())).unwrap();
        let (old, used) = (make("old"), make("used"));
        let long_ago = SystemTime::now() - 2 * KEPT;
        for entry in [&old, &used] {
            File::open(entry).unwrap().set_modified(long_ago).unwrap();
        }
        make("used");
        let new = make("new");
        assert_eq!([old.exists(), used.exists(), new.exists()], [false, true, true]);
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let (_directory, cache) = cache();
        let build = |path: &Path| {
            fs::write(path.join("half"), "half")?;
            anyhow::bail!("no")
        };
        cache.entry("thing", &Key::new("test-1"), build).unwrap_err();
        assert!(!cache.root().join("thing").exists());
        assert_eq!(fs::read_dir(cache.scratch_root()).unwrap().count(), 0);
    }

    #[test]
    fn abandoned_scratch_is_removed_and_scratch_in_use_is_not() {
        let (directory, cache) = cache();
        let used = cache.scratch().unwrap();
        let abandoned = cache.scratch_root().join("run-dead");
        fs::create_dir(&abandoned).unwrap();
        fs::write(abandoned.join(".lock"), "").unwrap();
        Cache::at(directory.path()).unwrap();
        assert!(used.path().exists());
        assert!(!abandoned.exists());
    }

    #[test]
    fn inputs_are_framed() {
        let (one, other) = (Key::new("r").with("ab").with("c"), Key::new("r").with("a").with("bc"));
        assert_ne!(one.hex(), other.hex());
        assert_eq!(one.hex().len(), 16);
    }
}
