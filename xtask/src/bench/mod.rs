//! `cargo xtask bench vmm`: what a machine costs, counted in instructions, beside QEMU's microvm in the same
//! run.
//!
//! | module | owns |
//! |---|---|
//! | here | the host's half: build what is measured, boot the testbed, print |
//! | [`inside`] | the testbed's half: the measurements, each a median |
//! | [`machine`] | starting Caisson or QEMU on the same guest, and timing what it says on its console |
//! | [`guest`] | the guests: an init of a few instructions, a kernel that stops at its entry, a small system |
//! | [`share`] | a directory that a guest works in |
//! | [`snapshot`] | saving and restoring |
//! | [`vsock`] | streams over vsock: the guest's and the host's ends |
//! | [`control`] | the control connection of a machine |
//! | [`memory`] | what a process holds, the guest's memory apart |
//! | [`report`] | figures, the table, the JSON |
//! | [`pod`] | `cargo xtask bench pod`: pods through containerd, beside runc's |
//!
//! In the testbed with `-icount`, a virtual millisecond is a million instructions, and figures repeat to 0.3
//! %. They count path length: not caches, not the cost of an exit on real hardware, not parallelism. With
//! `--direct` they are plain time.

mod control;
mod guest;
pub(crate) mod inside;
mod machine;
mod memory;
pub(crate) mod pod;
mod report;
mod share;
mod snapshot;
pub(crate) mod vsock;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use crate::{
    host::{self, Host},
    kernel::{self, KernelArgs},
    proc,
    testbed::{MachineArgs, Variant, exec},
};
use report::Figures;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// The VMM: start, memory, throughput and latency.
    Vmm(BenchArgs),
    /// Pods through containerd: start-up by phase beside runc's, and memory.
    Pod(pod::PodArgs),
    /// The half that runs in the testbed.
    #[command(hide = true)]
    Inside(inside::InsideArgs),
    /// What runs in a guest that is measured.
    #[command(hide = true)]
    Client(vsock::ClientArgs),
}

/// Options of `cargo xtask bench vmm`.
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// Also write the figures here, as one JSON object.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measure everything but throughput so many times and take the median.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Measure throughput so many times: that takes long, and repeats as well, where instructions are counted.
    #[arg(long, default_value_t = 2)]
    throughput_runs: usize,
    /// Measure only these; may be given several times.
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<inside::Part>,
    /// Measure another kernel than the workspace's.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// On this host instead of in the testbed: plain time, and only where KVM is real.
    #[arg(long)]
    direct: bool,
}

/// Builds what is measured, measures it, prints the table.
///
/// # Errors
/// When something can't be built or a measurement fails.
pub(crate) fn vmm(host: &Host, args: &BenchArgs) -> Result<ExitCode> {
    ensure!(args.runs > 0 && args.throughput_runs > 0, "--runs and --throughput-runs must be at least 1");
    let mut build = host::cargo();
    build.args(["build", "--release", "--quiet", "--package", "caisson-vmm"]).current_dir(&host.workspace);
    proc::run(&mut build)?;
    let kernel = match &args.kernel {
        Some(kernel) => kernel.canonicalize().with_context(|| format!("finding {}", kernel.display()))?,
        None => kernel::build(host, KernelArgs::default())?,
    };

    let exchange = tempfile::tempdir_in(&host.target).context("making a directory for the results")?;
    // The testbed sees the target directory, and the directory of results, but not wherever else these are.
    let staged = |name: &str, from: &std::path::Path| -> Result<()> {
        fs::copy(from, exchange.path().join(name)).with_context(|| format!("copying {}", from.display()))?;
        Ok(())
    };
    staged("caisson-vmm", &host.products("release").join("caisson-vmm"))?;
    staged("vmlinux", &kernel)?;
    staged("xtask", &std::env::current_exe().context("finding xtask's own binary")?)?;

    let directory = if args.direct { exchange.path().to_owned() } else { PathBuf::from("/exchange") };
    let mut command =
        vec![directory.join("xtask").display().to_string(), "bench".to_owned(), "inside".to_owned()];
    command.extend([format!("--directory={}", directory.display()), format!("--runs={}", args.runs)]);
    command.push(format!("--throughput-runs={}", args.throughput_runs));
    command.extend(args.only.iter().map(|part| format!("--only={part}")));
    let machine = MachineArgs {
        variant: Variant::Trixie,
        cpus: 1,
        memory: "3G".to_owned(),
        icount: true,
        append: None,
        boot_timeout: 300,
    };
    let code = exec::exec(
        host,
        &exec::ExecArgs {
            machine,
            exchange: Some(exchange.path().to_owned()),
            env: Vec::new(),
            timeout: Some(3600),
            direct: args.direct,
            command,
        },
        exec::standard_error(),
    )?;
    let results = exchange.path().join(inside::RESULTS);
    if !results.exists() {
        eprintln!("==> the measurements did not finish");
        return Ok(if code == ExitCode::SUCCESS { ExitCode::FAILURE } else { code });
    }
    let text = fs::read_to_string(&results).context("reading the results")?;
    let figures: Figures = serde_json::from_str(&text).context("parsing the results")?;
    print!("{}", figures.table());
    if let Some(path) = &args.json {
        fs::write(path, figures.json()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(code)
}
