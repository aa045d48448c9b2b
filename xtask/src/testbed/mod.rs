//! `cargo xtask testbed`: a machine with a real `/dev/kvm` and containerd on any host, emulated by QEMU.
//!
//! | module | owns |
//! |---|---|
//! | [`root`] | the machine's kernel and root file systems, made from Debian packages and cached |
//! | [`qemu`] | the emulator: Debian unstable's QEMU, beside whatever the host has |
//! | [`boot`] | QEMU: the machine, its shares, its ports, its end |
//! | [`monitor`] | QEMU's monitor, asked where a machine hangs |
//! | [`exec`] | running one command in it, or on this host when that has hardware KVM |
//!
//! The machine's processor is emulated (TCG) with SVM, so its KVM is the kernel's own, at a tenth of the speed.
//! Nothing that happens inside lasts: disks are thrown away at the end, shares are read-only but for `/exchange`.

pub(crate) mod boot;
pub(crate) mod exec;
mod monitor;
mod qemu;
pub(crate) mod root;

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};

use crate::{apt::Suite, host::Host};

/// `cargo xtask testbed …`.
#[derive(Debug, Subcommand)]
pub(crate) enum TestbedCommand {
    /// Build the testbed's kernel and roots, unless the cache has them.
    Build {
        /// Only this variant.
        #[arg(long)]
        variant: Option<Variant>,
    },
    /// Run a command in the testbed: output is passed on as it comes, the exit code is the command's.
    Exec(exec::ExecArgs),
    /// Open a shell in the testbed.
    Shell(MachineArgs),
}

/// What the testbed is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Variant {
    /// Debian 13, with containerd 1.7.
    #[default]
    Trixie,
    /// Debian unstable, with containerd 2.x.
    Sid,
    /// The oldest host that is supported: Debian 13's containerd 1.7 on Debian 12's Linux 6.1, with control groups of
    /// version 1.
    Oldest,
    /// Debian unstable with containerd's newest release, as `tests/clients/containerd` pins it, in the place of its own.
    Newest,
}

impl Variant {
    /// All, in the order of their testing.
    pub(crate) const ALL: [Self; 4] = [Self::Trixie, Self::Sid, Self::Oldest, Self::Newest];

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Trixie | Self::Sid => self.root().name(),
            Self::Oldest => "oldest",
            Self::Newest => "newest",
        }
    }

    /// The Debian suite that its root is made of.
    fn root(self) -> Suite {
        match self {
            Self::Trixie | Self::Oldest => Suite::Trixie,
            Self::Sid | Self::Newest => Suite::Sid,
        }
    }

    /// The Debian suite that its kernel is from.
    fn kernel(self) -> Suite {
        match self {
            Self::Trixie | Self::Sid | Self::Newest => Suite::Trixie,
            Self::Oldest => Suite::Bookworm,
        }
    }

    /// Words for its kernel's command line.
    fn words(self) -> Option<&'static str> {
        // Read by init.sh. Later kernels of Debian have no memory controller of version 1.
        (self == Self::Oldest).then_some("caisson.cgroup=v1")
    }
}

/// What the machine is like.
#[derive(Args, Clone, Debug)]
pub(crate) struct MachineArgs {
    /// What it is made of.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) variant: Variant,
    /// Its processors.
    #[arg(long, default_value_t = 1)]
    pub(crate) cpus: u8,
    /// Its memory, in QEMU's notation.
    #[arg(long, default_value = "3G")]
    pub(crate) memory: String,
    /// Count instructions instead of time (one processor; a virtual millisecond is a million instructions): slow, and
    /// repeatable.
    #[arg(long)]
    pub(crate) icount: bool,
    /// Further words for its kernel's command line.
    #[arg(long)]
    pub(crate) append: Option<String>,
    /// How many seconds a boot may take before it is tried again. It doubles with each try.
    #[arg(long, default_value_t = 120)]
    pub(crate) boot_timeout: u64,
}

impl MachineArgs {
    /// The machine that a variant's tests run on.
    pub(crate) fn of(variant: Variant) -> Self {
        let (memory, append) = ("4G".to_owned(), None);
        Self { variant, cpus: 1, memory, icount: false, append, boot_timeout: 120 }
    }

    fn boot_limit(&self, attempt: u32) -> Duration {
        Duration::from_secs(self.boot_timeout.saturating_mul(1 << attempt))
    }
}

/// Runs a testbed command.
///
/// # Errors
/// When the testbed can't be built or booted.
pub(crate) fn run(host: &Host, command: TestbedCommand) -> Result<ExitCode> {
    match command {
        TestbedCommand::Build { variant } => {
            for variant in
                Variant::ALL.into_iter().filter(|each| variant.is_none_or(|wanted| wanted == *each))
            {
                println!("{}", root::build(host, variant)?.root.display());
            }
            Ok(ExitCode::SUCCESS)
        }
        TestbedCommand::Exec(args) => exec::exec(host, &args, exec::standard_error()),
        TestbedCommand::Shell(args) => exec::shell(host, &args),
    }
}
