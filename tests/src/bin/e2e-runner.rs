//! `e2e-runner COMMAND…`: starts a private containerd, runs the command (the tests) beside it, and ends containerd
//! again. Exits with the command's code.
//!
//! containerd starts in the background, so tests that do not need it do not wait for it. Tests find it through
//! `CAISSON_CONTAINERD`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
};

use anyhow::{Context, Result, anyhow};
use caisson_e2e::{
    containerd::Containerd,
    leaks::Holdings,
    node::{CONTAINERD_DIR, Product},
};
use clap::Parser;

/// Runs a command beside a private containerd.
#[derive(Parser)]
struct Args {
    /// Where containerd keeps its state: a directory on a real disk, which is removed at the end.
    #[arg(long, default_value = "/var/lib/caisson-e2e")]
    state: PathBuf,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let before = Holdings::now()?;
    // A run that was killed leaves its state behind; nothing in it may reach this run.
    if args.state.exists() {
        caisson_e2e::leaks::unmount_below(&args.state)?;
        fs::remove_dir_all(&args.state).context("removing an earlier run's state")?;
    }
    fs::create_dir_all(&args.state).with_context(|| format!("making {}", args.state.display()))?;

    let starting = thread::spawn({
        let state = args.state.clone();
        move || start(&state)
    });
    let status = Command::new(&args.command[0])
        .args(&args.command[1..])
        .env(CONTAINERD_DIR, &args.state)
        .status()
        .with_context(|| format!("running {}", args.command[0]))?;

    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);

    let containerd = starting.join().map_err(|_| anyhow!("the thread that starts containerd panicked"))?;
    match tidy(&args.state, containerd, code == 0, &before) {
        Err(error) if code == 0 => return Err(error),
        // What the tests said comes first: one that failed half-way leaves things behind.
        Err(error) => eprintln!("e2e-runner: after failed tests: {error:#}"),
        Ok(()) => {}
    }
    Ok(ExitCode::from(code))
}

/// Ends containerd, and looks whether the whole run left anything.
fn tidy(state: &Path, containerd: Option<Containerd>, passed: bool, before: &Holdings) -> Result<()> {
    if let Some(containerd) = containerd {
        if !passed {
            containerd.remove_containers()?;
        }
        containerd.stop()?;
    }
    fs::remove_dir_all(state).context("removing containerd's state")?;
    before.assert_nothing_added().context("after the whole run")
}

/// Starts containerd and tells the tests how it went, by a file.
fn start(state: &Path) -> Option<Containerd> {
    match start_with_images(state) {
        Ok(containerd) => {
            // Without this file the tests that wait for it fail by themselves.
            let _ = fs::write(state.join("ready"), "");
            Some(containerd)
        }
        Err(error) => {
            let _ = fs::write(state.join("failed"), format!("{error:#}"));
            None
        }
    }
}

fn start_with_images(state: &Path) -> Result<Containerd> {
    let bin = std::env::var_os("CAISSON_BIN").map(PathBuf::from);
    let containerd = Containerd::start(state, bin.as_deref())?;
    if bin.is_some() {
        caisson_e2e::containerd::prepare_template(state)?;
    }
    let images = Product::Images.path()?;
    for image in ["pause.tar", "busybox.tar"] {
        containerd.import(&images.join(image))?;
    }
    Ok(containerd)
}
