//! What the tests and the demo run: our binaries, built for release and gathered in one directory.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, anyhow};

use crate::{
    host::{Host, cargo},
    proc,
};

/// The target that makes a static binary possible beside build scripts that are not.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What makes a program static and small: equal functions are kept once, its relocations packed. The agent is static, as
/// the guest has no C library but the containers' own; and small, as every guest has it in memory. The shim is as well:
/// what it uses of the C library is less than what it would have of it in memory.
const STATIC_FLAGS: &str =
    "-C target-feature=+crt-static -C link-arg=-Wl,--icf=all -C link-arg=-Wl,--pack-dyn-relocs=relr";

/// With frame pointers the agent's tables for unwinding need not tell of every push.
const AGENT_FLAGS: &str = "-C force-frame-pointers=yes";

/// How the binaries are optimized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Optimization {
    /// As they are shipped: each program as a whole. What is said of size and speed is said of these.
    Shipped,
    /// With the shipped `opt-level`s, but crate by crate, which is quicker to build.
    Quick,
}

impl Optimization {
    /// The cargo profile of a program whose shipped profile has this name.
    fn profile(self, shipped: &str) -> String {
        match (self, shipped) {
            (Self::Shipped, _) => shipped.to_owned(),
            (Self::Quick, "release") => "quick".to_owned(),
            (Self::Quick, _) => format!("{shipped}-quick"),
        }
    }

    /// The directory that [`build`] fills.
    fn directory(self, host: &Host) -> PathBuf {
        host.target.join(match self {
            Self::Shipped => "xtask/bin",
            Self::Quick => "xtask/bin-quick",
        })
    }
}

/// Builds every binary of ours that the workspace has, and returns the directory that they are in.
///
/// # Errors
/// When one does not build.
pub(crate) fn build(host: &Host, optimization: Optimization) -> Result<PathBuf> {
    let output = optimization.directory(host);
    fs::create_dir_all(&output).context("creating the directory of products")?;
    // The agent has a target and a profile of its own, and so shares nothing with the rest that it would wait for.
    // The end of each build, which optimizes a whole program, keeps one processor busy: two go on side by side.
    thread::scope(|scope| {
        let rest = scope.spawn(|| release(host, optimization, &output));
        keep(&agent(host, optimization)?, &output)?;
        keep(&shim(host, optimization)?, &output)?;
        rest.join().map_err(|_| anyhow!("the thread that builds panicked"))?
    })?;
    Ok(output)
}

/// Builds the shim.
fn shim(host: &Host, optimization: Optimization) -> Result<PathBuf> {
    static_program(host, ("shim", optimization), STATIC_FLAGS, "containerd-shim-caisson-v2")
}

/// Builds the agent.
fn agent(host: &Host, optimization: Optimization) -> Result<PathBuf> {
    let flags = format!("{STATIC_FLAGS} {AGENT_FLAGS}");
    static_program(host, ("agent", optimization), &flags, "caisson-agent")
}

/// Builds the program of the package `caisson-NAME` with the profile that is named after it.
fn static_program(
    host: &Host,
    (name, optimization): (&str, Optimization),
    flags: &str,
    program: &str,
) -> Result<PathBuf> {
    let profile = optimization.profile(name);
    let mut build = cargo();
    build.args(["build", "--profile", &profile, "--package", &format!("caisson-{name}"), "--target", TARGET]);
    build.env("RUSTFLAGS", flags).current_dir(&host.workspace);
    proc::run(&mut build)?;
    Ok(host.target.join(TARGET).join(profile).join(program))
}

/// Builds what else runs on the host.
fn release(host: &Host, optimization: Optimization, output: &Path) -> Result<()> {
    let profile = optimization.profile("release");
    for (package, binary) in [("caisson-vmm", "caisson-vmm"), ("caisson-cli", "caisson")] {
        if has_binary(host, binary)? {
            let mut build = cargo();
            build.args(["build", "--profile", &profile, "--package", package]);
            proc::run(build.current_dir(&host.workspace))?;
            keep(&host.products(&profile).join(binary), output)?;
        }
    }
    Ok(())
}

/// Copies a file into a directory, whole or not at all.
pub(crate) fn keep(file: &Path, directory: &Path) -> Result<()> {
    let target = directory.join(file.file_name().context("a product has no name")?);
    let part = target.with_extension("part");
    fs::copy(file, &part).with_context(|| format!("copying {}", file.display()))?;
    fs::rename(&part, &target).with_context(|| format!("writing {}", target.display()))
}

/// Whether a package of the workspace has this binary: one that is begun may have none yet.
fn has_binary(host: &Host, binary: &str) -> Result<bool> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--no-deps", "--format-version=1"]).current_dir(&host.workspace);
    let metadata: serde_json::Value =
        serde_json::from_str(&proc::output(&mut metadata)?).context("parsing cargo's metadata")?;
    let list = |value: &serde_json::Value, name: &str| {
        value.get(name).and_then(|list| list.as_array()).cloned().unwrap_or_default()
    };
    let targets = list(&metadata, "packages").into_iter().flat_map(|package| list(&package, "targets"));
    let is_it = |target: &serde_json::Value| {
        let is_binary = list(target, "kind").iter().any(|kind| kind == "bin");
        is_binary && target.get("name").is_some_and(|name| name == binary)
    };
    Ok(targets.into_iter().any(|target| is_it(&target)))
}
