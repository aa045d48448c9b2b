//! Fuzzing: every target of `vmm/virtio/fuzz` and `vmm/fuzz` for a while, from its seeds and whatever earlier runs have
//! found.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;

use crate::{host::Host, proc};

/// Where fuzz targets are: each is a workspace of its own.
const PACKAGES: [&str; 2] = ["vmm/virtio/fuzz", "vmm/fuzz"];
/// A single input that takes longer than this many seconds is a finding.
const INPUT_TIMEOUT: u32 = 20;
/// A target that takes more than this many megabytes is one, too.
const MEMORY_LIMIT_MB: u32 = 2048;

/// What to fuzz, and for how long.
#[derive(Args)]
pub(crate) struct FuzzArgs {
    /// Targets; all of them when none is named.
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs the targets one after the other, and goes on after a finding; fails at the end if there was one.
///
/// # Errors
/// When a nightly toolchain or cargo-fuzz is missing, a target is unknown, or something was found.
pub(crate) fn run(host: &Host, args: &FuzzArgs) -> Result<()> {
    let mut known = Vec::new();
    for directory in PACKAGES.map(|package| host.workspace.join(package)) {
        let listed = proc::output(cargo(&directory).arg("list")).context(
            "listing the fuzz targets: this needs `rustup toolchain install nightly` and `cargo install cargo-fuzz`",
        )?;
        known.extend(listed.lines().map(|target| (directory.clone(), target.to_owned())));
    }
    for target in &args.targets {
        let names: Vec<_> = known.iter().map(|(_, name)| name.as_str()).collect();
        ensure!(names.contains(&target.as_str()), "no target {target}: there are {}", names.join(", "));
    }
    let mut failed = Vec::new();
    for (directory, target) in known {
        if !args.targets.is_empty() && !args.targets.contains(&target) {
            continue;
        }
        println!("fuzzing {target} for {} s", args.seconds);
        if let Err(error) = fuzz(&directory, &target, args.seconds) {
            eprintln!("{target}: {error:#}");
            failed.push(format!("{target} (see {}/artifacts)", directory.display()));
        }
    }
    ensure!(failed.is_empty(), "something was found in {}", failed.join(", "));
    Ok(())
}

fn fuzz(directory: &Path, target: &str, seconds: u32) -> Result<()> {
    // The first directory is where new inputs go.
    let [corpus, seeds] = ["corpus", "seeds"].map(|kind| directory.join(kind).join(target));
    for directory in [&corpus, &seeds] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let mut command = cargo(directory);
    command.args(["run", target]).arg(&corpus).arg(&seeds).arg("--");
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-timeout={INPUT_TIMEOUT}"));
    command.arg(format!("-rss_limit_mb={MEMORY_LIMIT_MB}"));
    proc::run(command.args(["-print_final_stats=1", "-verbosity=0"]))
}

fn cargo(directory: &Path) -> std::process::Command {
    let mut command = proc::dies_with_us("cargo", Signal::SIGTERM);
    // The toolchain's own variables would overrule the `+nightly`.
    for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC"] {
        command.env_remove(variable);
    }
    command.current_dir(directory).args(["+nightly", "fuzz"]);
    command
}
