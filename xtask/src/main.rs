//! `cargo xtask`: everything that has to be done with this workspace and that cargo alone does not do.
//!
//! | module | owns |
//! |---|---|
//! | [`kernel`] | the guest kernel, from Debian's sources and `guest-kernel-config/` |
//! | [`initramfs`] | cpio archives; the guest's initramfs, which is the agent |
//! | [`images`] | the tests' container images, as OCI archives |
//! | [`testbed`] | an emulated machine with KVM and containerd: build, boot, run a command in it |
//! | [`products`] | our own binaries, built for release |
//! | [`clients`] | `crictl`, `critest`, `nerdctl`, the newest containerd, Kubernetes: built from their modules |
//! | [`suites`] | file system test suites that others keep |
//! | [`test`](mod@test) | every check and test, in order, with a summary |
//! | [`demo`] | what a newcomer runs first |
//! | [`steps`] | a run of several steps, and where its time went |
//! | [`overview`] | steps side by side, told on one line |
//! | [`fuzz`] | the fuzz targets of `vmm/fuzz` and `vmm/virtio/fuzz` |
//! | [`bench`] | what the VMM costs, beside QEMU's microvm |
//! | [`host`] | where the workspace, the target directory and the cache are |
//! | [`cache`] | entries named by the hash of what they are made from, atomic and safe against being killed |
//! | [`apt`] | the host's missing packages, and packages of other suites without touching the host |
//! | [`tools`] | the programs that the host must have, and their packages |
//! | [`proc`] | child processes that end with xtask |

mod apt;
mod bench;
mod cache;
mod clients;
mod demo;
mod fuzz;
mod host;
mod images;
mod initramfs;
mod kernel;
mod overview;
mod proc;
mod products;
mod steps;
mod suites;
mod system;
mod test;
mod testbed;
mod tools;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use host::Host;

/// Builds, boots and tests everything that cargo alone does not.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the guest kernel and print where it is and how large.
    Kernel(kernel::KernelArgs),
    /// Pack a static agent into the guest's initramfs and print where it is.
    Initramfs {
        /// The agent; `cargo xtask test` builds it by itself.
        agent: PathBuf,
    },
    /// Check, build and test everything, on this host and in the testbed.
    Test(test::TestArgs),
    /// Build the clients that whole-system tests use, and print where they are.
    Clients(clients::ClientsArgs),
    /// Show what the project does so far.
    Demo(demo::DemoArgs),
    /// Fuzz the VMM: every target, or those that are named.
    Fuzz(fuzz::FuzzArgs),
    /// An emulated machine with a real KVM and containerd.
    #[command(subcommand)]
    Testbed(testbed::TestbedCommand),
    /// Measure what things cost, in instructions.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // The parts of the benchmarks that run in the testbed and in its guests have no workspace.
    match &arguments.command {
        Task::Bench(bench::BenchCommand::Inside(args)) => return bench::inside::run(args),
        Task::Bench(bench::BenchCommand::Client(args)) => return bench::vsock::client(args),
        _ => {}
    }
    let host = Host::find()?;
    match arguments.command {
        Task::Kernel(args) => kernel::report(&kernel::build(&host, args)?)?,
        Task::Initramfs { agent } => println!("{}", initramfs::build(&host, &agent)?.display()),
        Task::Test(args) => return test::run(&host, &args),
        Task::Clients(args) => clients::run(&host, &args)?,
        Task::Demo(args) => return demo::run(&host, &args),
        Task::Fuzz(args) => fuzz::run(&host, &args)?,
        Task::Bench(bench::BenchCommand::Vmm(args)) => return bench::vmm(&host, &args),
        Task::Bench(bench::BenchCommand::Pod(args)) => return bench::pod::run(&host, &args),
        Task::Bench(bench::BenchCommand::Inside(args)) => return bench::inside::run(&args),
        Task::Bench(bench::BenchCommand::Client(args)) => return bench::vsock::client(&args),
        Task::Testbed(command) => return testbed::run(&host, command),
    }
    Ok(ExitCode::SUCCESS)
}
