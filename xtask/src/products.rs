//! What the tests and the demo run: our binaries, built for release and gathered in one directory.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, anyhow, bail};

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
}

/// What the binaries are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be used and measured.
    Use,
    /// To be tested: they can be made to fail on purpose (the feature [`FAILPOINTS`]).
    Test,
}

/// The feature of the shim and the agent by which they fail on purpose.
const FAILPOINTS: &str = "failpoints";

/// The directory that [`build`] fills.
fn directory(host: &Host, optimization: Optimization, purpose: Purpose) -> PathBuf {
    host.target.join(match (optimization, purpose) {
        (Optimization::Shipped, Purpose::Use) => "xtask/bin",
        (Optimization::Shipped, Purpose::Test) => "xtask/bin-test",
        (Optimization::Quick, Purpose::Use) => "xtask/bin-quick",
        (Optimization::Quick, Purpose::Test) => "xtask/bin-quick-test",
    })
}

/// Builds every binary of ours that the workspace has, and returns the directory that they are in.
///
/// # Errors
/// When one does not build, or can fail on purpose and should not, or the other way round.
pub(crate) fn build(host: &Host, optimization: Optimization, purpose: Purpose) -> Result<PathBuf> {
    let output = directory(host, optimization, purpose);
    fs::create_dir_all(&output).context("creating the directory of products")?;
    // The agent has a target and a profile of its own, and so shares nothing with the rest that it would wait for.
    // The end of each build, which optimizes a whole program, keeps one processor busy: two go on side by side.
    thread::scope(|scope| {
        let rest = scope.spawn(|| release(host, optimization, &output));
        for program in [&AGENT, &SHIM] {
            let file = program.build(host, optimization, purpose)?;
            program
                .check(&fs::read(&file).with_context(|| format!("reading {}", file.display()))?, purpose)?;
            keep(&file, &output)?;
        }
        rest.join().map_err(|_| anyhow!("the thread that builds panicked"))?
    })?;
    Ok(output)
}

/// A static program of ours.
struct StaticProgram {
    /// The package is `caisson-NAME`, and the profile has this name too.
    name: &'static str,
    /// The file.
    program: &'static str,
    /// Flags of the compiler beyond [`STATIC_FLAGS`].
    flags: &'static str,
    /// Text that is in it if it can fail on purpose.
    failpoint: &'static str,
}

const AGENT: StaticProgram = StaticProgram {
    name: "agent",
    program: "caisson-agent",
    flags: AGENT_FLAGS,
    failpoint: "a failpoint panics",
};

const SHIM: StaticProgram = StaticProgram {
    name: "shim",
    program: "containerd-shim-caisson-v2",
    flags: "",
    failpoint: "CAISSON_FAILPOINT",
};

impl StaticProgram {
    fn build(&self, host: &Host, optimization: Optimization, purpose: Purpose) -> Result<PathBuf> {
        let profile = optimization.profile(self.name);
        let package = format!("caisson-{}", self.name);
        let mut build = cargo();
        build.args(["build", "--profile", &profile, "--package", &package, "--target", TARGET]);
        if purpose == Purpose::Test {
            build.args(["--features", FAILPOINTS]);
        }
        build.env("RUSTFLAGS", format!("{STATIC_FLAGS} {}", self.flags).trim_end());
        proc::run(build.current_dir(&host.workspace))?;
        Ok(host.target.join(TARGET).join(profile).join(self.program))
    }

    /// Whether the built program can fail on purpose exactly if it is to be tested.
    fn check(&self, contents: &[u8], purpose: Purpose) -> Result<()> {
        let mut windows = contents.windows(self.failpoint.len());
        let found = windows.any(|window| window == self.failpoint.as_bytes());
        match (purpose, found) {
            (Purpose::Use, true) => bail!("{} can fail on purpose, and is not for tests", self.program),
            (Purpose::Test, false) => bail!("{} has no failpoint to be tested by", self.program),
            _ => Ok(()),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failpoints_are_found_in_a_program() {
        let with = format!("\0\u{1}{}\0", SHIM.failpoint);
        SHIM.check(with.as_bytes(), Purpose::Test).unwrap();
        SHIM.check(b"CAISSON_", Purpose::Use).unwrap();
        SHIM.check(with.as_bytes(), Purpose::Use).unwrap_err();
        SHIM.check(b"CAISSON_", Purpose::Test).unwrap_err();
    }
}
