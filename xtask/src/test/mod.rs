//! `cargo xtask test`: everything that must hold before a change is merged.

mod deal;
mod durations;
mod machines;
mod outcome;
mod packed;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    host::{Host, cargo},
    images, initramfs,
    kernel::{self, KernelArgs},
    proc,
    products::{self, Optimization, Purpose},
    steps::Steps,
    suites,
    system::{self, Place, System},
    testbed::{Variant, exec},
    tools::{self, Need},
};
use outcome::Test;
use packed::Packed;

/// How long the whole-system tests of one variant may take on one machine, in seconds.
const E2E_LIMIT: u64 = 60 * 60;

/// The same for the soaks.
const SOAK_LIMIT: u64 = 12 * 3600;

/// The tests that containerd's version may make a difference to, as a nextest filter. Left out are those that ask much of
/// an emulated machine and little of containerd.
const WITH_CONTAINERD: &str = "binary(/^(runc|shim|testbed)/) - binary(/^shim_(cgroup|disks)/) \
                               - test(/_that_dies_(at_any|of_any|while)_/)";

/// The tests that an older kernel and control groups of version 1 may make a difference to, and of the others enough to
/// know that pods run there.
const ON_THE_OLDEST: &str = "binary(/^shim_(cgroup|resize)/) + binary(/^(shim|testbed)/) \
                             & test(/^(a_pod_runs_containers|a_dead_shim|a_running_container|control_groups)_/)";

/// What shows that containerd's newest release starts our shim, by CRI with and without a pause container and by `ctr`, and
/// that the machine itself is not at fault. All else is the business of the versions that Debian has.
const ON_THE_NEWEST: &str = "binary(/^(runc|shim)/) & \
                             test(/^(cri_runs|a_pod_runs_containers|a_pod_needs_no_pause|a_container_says_hello)_/)";

/// Options of `cargo xtask test`. Without any, everything runs but the soaks.
#[derive(Args, Clone, Debug)]
pub(crate) struct TestArgs {
    /// Only the checks and unit tests on this host.
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the whole-system tests.
    #[arg(long)]
    e2e: bool,
    /// Whole-system tests on this variant of the testbed only.
    #[arg(long)]
    variant: Option<Variant>,
    /// Run the whole-system tests on this host, whose KVM must have hardware virtualization.
    #[arg(long, conflicts_with = "variant")]
    direct: bool,
    /// So many emulated machines side by side; as many as there are processors, and memory for them, if not said.
    #[arg(long, conflicts_with = "direct", value_parser = clap::value_parser!(u8).range(1..))]
    machines: Option<u8>,
    /// Only the tests that this nextest filter selects.
    #[arg(short = 'E', long = "filter", value_name = "FILTER")]
    filter: Option<String>,
    /// The long soaks (whole-system tests marked `#[ignore]`) instead of all others.
    #[arg(long)]
    soak: bool,
    /// Take the container images from this directory, below the target or cache directory, instead of making them.
    #[arg(long, env = "CAISSON_IMAGES")]
    images: Option<PathBuf>,
}

/// What the whole-system tests need, and they themselves.
struct Built {
    system: System,
    tests: Packed,
}

/// Runs the tests and prints where the time went.
///
/// # Errors
/// When something did not pass.
pub(crate) fn run(host: &Host, args: &TestArgs) -> Result<ExitCode> {
    let mut steps = Steps::default();
    steps.run("tools", || required(args));
    if !args.e2e && !args.soak {
        checks(host, args, &mut steps);
    }
    if !args.unit
        && let Some(built) = build(host, args, &mut steps)
    {
        if args.direct {
            steps.run("e2e on this host", || on_this_host(host, args, &built));
        } else {
            in_the_testbed(host, args, &built, &mut steps);
        }
        if !args.direct && !args.soak {
            steps.run("killed commands", || killed_commands(host, args));
        }
    }
    steps.finish()?;
    Ok(ExitCode::SUCCESS)
}

fn checks(host: &Host, args: &TestArgs, steps: &mut Steps) {
    let here = |command: &mut Command| proc::run(command.current_dir(&host.workspace));
    steps.run("format", || here(cargo().args(["fmt", "--all", "--check"])));
    steps.run("clippy", || {
        here(cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "--deny", "warnings"]))
    });
    steps.run("unit tests", || {
        let mut nextest = cargo();
        nextest.args(["nextest", "run", "--workspace", "--exclude", "caisson-e2e", "--no-fail-fast"]);
        if let Some(filter) = &args.filter {
            nextest.args(["-E", filter, "--no-tests", "pass"]);
        }
        here(&mut nextest)
    });
}

/// Makes what the whole-system tests need, and them.
fn build(host: &Host, args: &TestArgs, steps: &mut Steps) -> Option<Built> {
    // Some of the soaks are about size and speed.
    let optimization = if args.soak { Optimization::Shipped } else { Optimization::Quick };
    let kernel = steps.run("guest kernel", || kernel::build(host, KernelArgs::default()))?;
    let images = steps.run("images", || images(host, args))?;
    let products = steps.run("release builds", || products::build(host, optimization, Purpose::Test))?;
    steps.run("file system suites", || suites::build(host, &products))?;
    let initramfs = steps.run("initramfs", || initramfs::build(host, &products.join("caisson-agent")))?;
    let tests = steps.run("building the whole-system tests", || whole_system_tests(host, &products))?;
    Some(Built { system: System { products, kernel, initramfs, images }, tests })
}

fn images(host: &Host, args: &TestArgs) -> Result<PathBuf> {
    let Some(directory) = &args.images else {
        return images::build(host);
    };
    ensure!(directory.join("busybox.tar").exists(), "{} has no busybox.tar", directory.display());
    directory.canonicalize().with_context(|| format!("finding {}", directory.display()))
}

/// Builds the tests, and puts what runs them beside our binaries.
fn whole_system_tests(host: &Host, products: &Path) -> Result<Packed> {
    let tests = Packed::build(host)?;
    system::runners(host, products)?;
    products::keep(&nextest().context("cargo-nextest is not there any more")?, products)?;
    Ok(tests)
}

/// Runs the packed tests in the testbed.
fn in_the_testbed(host: &Host, args: &TestArgs, built: &Built, steps: &mut Steps) {
    let mut report = String::new();
    steps.run("e2e in the testbed", || {
        let tests = selected(host, args, built)?;
        if tests.is_empty() {
            // A filter may mean unit tests; where nothing else runs, it is a mistake.
            ensure!(!args.e2e && !args.soak, "the filter selects no whole-system test");
            eprintln!("==> the filter selects no whole-system test");
            return Ok(());
        }
        machines::run(host, args, built, tests, &mut report)
    });
    steps.note(&report);
}

/// The tests to run in the testbed, and on which variants.
fn selected(host: &Host, args: &TestArgs, built: &Built) -> Result<Vec<(Variant, Test)>> {
    let mut selected = Vec::new();
    for variant in Variant::ALL.into_iter().filter(|each| args.variant.is_none_or(|wanted| wanted == *each)) {
        let tests = built.tests.list(host, filter(args, variant).as_deref(), args.soak)?;
        selected.extend(tests.into_iter().map(|test| (variant, test)));
    }
    Ok(selected)
}

/// Runs the packed tests on this host.
fn on_this_host(host: &Host, args: &TestArgs, built: &Built) -> Result<()> {
    let scratch = host.cache.scratch()?;
    let place = Place { variant: None, scratch: scratch.path() };
    let nextest = nextest_in(host, args, built, &place, args.filter.as_deref())?;
    let request = built.system.beside_containerd(host, &place, nextest)?;
    let code = exec::exec(host, &request, exec::standard_error())?;
    ensure!(code == ExitCode::SUCCESS, "the whole-system tests failed");
    Ok(())
}

/// The command that runs the packed tests that `wanted` selects.
fn nextest_in(
    host: &Host,
    args: &TestArgs,
    Built { system, tests }: &Built,
    place: &Place<'_>,
    wanted: Option<&str>,
) -> Result<Vec<String>> {
    let mut command = vec![place.path(host, &system.products.join("cargo-nextest"))?];
    command.extend(["nextest", "run", "--no-fail-fast"].map(str::to_owned));
    command.extend(tests.options(host, place)?);
    if let Some(wanted) = wanted {
        command.extend(["-E", wanted, "--no-tests", "pass"].map(str::to_owned));
    }
    if args.soak {
        command.extend(["--profile=soak", "--run-ignored=only"].map(str::to_owned));
    } else {
        command.push("--profile=e2e".to_owned());
    }
    Ok(command)
}

/// The tests to run on a variant: all on the first, and on another those that the difference is to be seen in. Soaks have
/// all the time that they need on both of containerd's versions.
fn filter(args: &TestArgs, variant: Variant) -> Option<String> {
    match (&args.filter, variant) {
        (Some(asked), _) => Some(asked.clone()),
        (None, Variant::Sid) if !args.soak => Some(WITH_CONTAINERD.to_owned()),
        (None, Variant::Newest) => Some(ON_THE_NEWEST.to_owned()),
        (None, Variant::Oldest) => Some(ON_THE_OLDEST.to_owned()),
        (None, _) => None,
    }
}

/// Kills xtask's own commands midway.
fn killed_commands(host: &Host, args: &TestArgs) -> Result<()> {
    let mut nextest = cargo();
    nextest.args(["nextest", "run", "--package", "xtask", "--run-ignored", "only", "--no-fail-fast"]);
    if let Some(filter) = &args.filter {
        nextest.args(["-E", filter, "--no-tests", "pass"]);
    }
    proc::run(nextest.current_dir(&host.workspace))
}

/// Makes sure that all is there that the steps start, before the first of them.
fn required(args: &TestArgs) -> Result<()> {
    let mut needs = Vec::new();
    if !args.e2e && !args.soak {
        needs.push(Need::UnitTests);
    }
    if !args.unit {
        needs.extend(Need::WHOLE_SYSTEM_TESTS);
    }
    tools::require(&needs)?;
    require_nextest()
}

/// Makes sure that nextest is there.
fn require_nextest() -> Result<()> {
    if nextest().is_some() {
        return Ok(());
    }
    // Without its own updates, which would bring a TLS stack along.
    let words =
        ["install", "cargo-nextest", "--locked", "--no-default-features", "--features=default-no-update"];
    eprintln!("==> cargo {}", words.join(" "));
    // Built crate by crate: its tests' time is not its own.
    let mut install = cargo();
    install
        .args(words)
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    proc::run(&mut install)
}

/// Where `cargo-nextest` is.
fn nextest() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let search = env::var_os("PATH").unwrap_or_default();
    let candidates = env::split_paths(&search).chain(home.map(|home| home.join("bin")));
    candidates.map(|directory| directory.join("cargo-nextest")).find(|path| fs::metadata(path).is_ok())
}
