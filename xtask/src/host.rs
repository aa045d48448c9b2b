//! Where things are on the machine that xtask runs on.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{cache::Cache, proc};

/// The workspace, cargo's target directory and the cache.
#[derive(Debug)]
pub(crate) struct Host {
    /// The root of the workspace.
    pub(crate) workspace: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// What is slow to make.
    pub(crate) cache: Cache,
}

impl Host {
    /// Asks cargo for the directories and opens the cache.
    ///
    /// # Errors
    /// When cargo does not answer or the cache can't be opened.
    pub(crate) fn find() -> Result<Self> {
        // cargo sets this for `cargo run`, so for `cargo xtask`.
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let mut command = cargo();
        command.args(["metadata", "--no-deps", "--format-version=1"]).current_dir(manifest);
        let metadata: serde_json::Value =
            serde_json::from_str(&proc::output(&mut command)?).context("parsing cargo's metadata")?;
        let path = |key: &str| {
            let path = metadata.get(key).and_then(|value| value.as_str()).map(PathBuf::from);
            path.with_context(|| format!("cargo's metadata has no {key}"))
        };
        let host = Self {
            workspace: path("workspace_root")?,
            target: path("target_directory")?,
            cache: Cache::open()?,
        };
        fs::create_dir_all(host.logs()).context("creating the directory of logs")?;
        Ok(host)
    }

    /// The log of the step with this name.
    pub(crate) fn log(&self, step: &str) -> PathBuf {
        self.logs().join(format!("{step}.log"))
    }

    /// The products of the cargo profile of this name.
    pub(crate) fn products(&self, profile: &str) -> PathBuf {
        self.target.join(profile)
    }

    fn logs(&self) -> PathBuf {
        self.target.join("xtask-logs")
    }
}

/// The cargo that started xtask.
pub(crate) fn cargo() -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = proc::dies_with_us(cargo, nix::sys::signal::Signal::SIGTERM);
    // What cargo told xtask about xtask is not for the builds that xtask starts.
    for (name, _) in env::vars_os().filter(|(name, _)| is_of_our_own_build(Path::new(name))) {
        command.env_remove(name);
    }
    if !proc::tells_progress() {
        // Errors and warnings are still told.
        command.env("CARGO_TERM_QUIET", "true");
    }
    command
}

fn is_of_our_own_build(name: &Path) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST") || name == "CARGO_BIN_NAME"
}
