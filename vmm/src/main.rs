//! `caisson-vmm`: one microVM in one process.
//!
//! The launcher opens everything that the machine needs ([`caisson_vmm::resources`]) and goes into its jail
//! ([`caisson_vmm::jail`]); then the machine is made from what is open, and only then does guest code run.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Mutex,
    time::Instant,
};

use caisson_vmm::{
    control::{Supervisor, supervisor::SupervisorError},
    devices::serial::ConsoleSink,
    jail::{Inherited, Jail, Side},
    machine::shares::Shares,
    machine_file, malloc_arena,
    resources::{self, Access, Descriptors, Resources},
    snapshot,
};
use caisson_vmm_api::{
    config::{FileSource, MachineConfig},
    control::{protocol::RestoreCommand, socket},
    exit::ExitReason,
    jail::JailConfig,
};
use clap::Parser;
use tracing::level_filters::LevelFilter;

/// The most that is logged in a second, in bytes, and at once.
const LOG_RATE: u64 = 64 << 10;

/// Runs one microVM.
#[derive(Parser)]
#[command(version)]
#[group(required = true, multiple = true)]
struct Arguments {
    /// The machine file (TOML, or JSON by its name): boot this machine.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Go on from the snapshot in this directory: its files `state` and `memory`. The console, the control
    /// socket and the devices are those of the machine file, if one is given too; without one, the console is
    /// standard output.
    #[arg(long, value_name = "DIRECTORY")]
    restore: Option<PathBuf>,
    /// Take requests on this descriptor: a unix socket of type SOCK_SEQPACKET, listening or connected.
    #[arg(long, value_name = "N")]
    control_fd: Option<u32>,
    /// Go into a jail before a machine is made, as this file describes it (TOML, may be empty).
    #[arg(long, value_name = "FILE")]
    jail: Option<PathBuf>,
    /// How much to log to standard error.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LevelFilter,
}

fn main() -> ExitCode {
    let birth = Instant::now();
    malloc_arena::limit_to_one();
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_max_level(arguments.log_level)
        // What a guest does wrong is logged, and it may do wrong all the time.
        .with_writer(Mutex::new(ConsoleSink::named("log", Some(std::io::stderr()), LOG_RATE)))
        .with_ansi(false)
        .init();
    match run(&arguments, birth) {
        Ok(ExitReason::PowerOff | ExitReason::Stopped) => ExitCode::SUCCESS,
        Ok(reason) => {
            eprintln!("caisson-vmm: {reason}");
            ExitCode::from(reason.code())
        }
        Err(error) => {
            eprintln!("caisson-vmm: {}", error.one_line());
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, birth: Instant) -> Result<ExitReason, SupervisorError> {
    // First of all, before anything of ours is open.
    let inherited = arguments.jail.is_some().then(Inherited::note).transpose();
    let inherited = inherited.map_err(|e| SupervisorError::Host("listing open descriptors", e))?;
    let jail = arguments.jail.as_deref().map(JailConfig::from_file).transpose()?;
    let mut supervisor = Supervisor::new(resources::open_kvm()?, birth)?;
    if let Some(number) = arguments.control_fd {
        let source = FileSource::Descriptor(number);
        let socket = Descriptors::Inherited.open("--control-fd", &source, Access::ReadWrite)?;
        supervisor.control(socket.into())?;
    }
    let config = arguments.config.as_deref().map(machine_file::read).transpose()?;
    let origin = Origin::open(arguments.restore.as_deref(), config.as_ref())?;
    // The last thing that is made in the host's view, so that nothing has to be undone when another fails.
    let socket = config.as_ref().and_then(|config| config.control.socket.as_deref());
    let _socket = socket.map(|path| listen(&mut supervisor, path)).transpose()?;
    let sockets = config.as_ref().map(MachineConfig::sockets).unwrap_or_default();
    if let Some((jail, inherited)) = jail.zip(inherited) {
        enter(&mut supervisor, jail, &inherited, sockets)?;
    }
    match origin {
        // Whoever controls the process makes the machine.
        Origin::Nothing => return supervisor.run(),
        Origin::Kernel(config, resources) => supervisor.create(config, resources)?,
        Origin::Snapshot(source) => supervisor.restore(source)?,
    }
    supervisor.boot()?;
    supervisor.run()
}

/// What the machine is made from, open.
enum Origin<'a> {
    Nothing,
    Kernel(&'a MachineConfig, Resources),
    Snapshot(snapshot::Source),
}

impl<'a> Origin<'a> {
    fn open(saved: Option<&Path>, config: Option<&'a MachineConfig>) -> Result<Self, SupervisorError> {
        let inherited = &Descriptors::Inherited;
        Ok(match (saved, config) {
            (Some(directory), config) => {
                let command = RestoreCommand::from_directory(directory, config);
                Self::Snapshot(snapshot::Source::open(&command, inherited)?)
            }
            (None, Some(config)) => Self::Kernel(config, Resources::open(config, inherited)?),
            (None, None) => Self::Nothing,
        })
    }
}

/// Goes into the jail. The process that stays outside never returns: it removes `sockets`, and ends as the one
/// inside has.
fn enter(
    supervisor: &mut Supervisor,
    jail: JailConfig,
    inherited: &Inherited,
    sockets: Vec<PathBuf>,
) -> Result<(), SupervisorError> {
    let ours = inherited.opened_since().map_err(|e| SupervisorError::Host("listing open descriptors", e))?;
    match Jail::new(jail, ours)?.removing(sockets).enter()? {
        Side::Inside(inside) => {
            tracing::info!(landlock = ?inside.landlock, "in the jail");
            let share = inside.share.map(|share| Shares::jailed(share.root, share.descriptors)).transpose();
            let share = share.map_err(|e| SupervisorError::Host("starting to serve the share", e))?;
            supervisor.share_by(share.unwrap_or(Shares::None));
            Ok(())
        }
        Side::Outside(ended) => ended.mirror(),
    }
}

/// A socket in the file system, removed at the end.
struct SocketFile<'a>(&'a Path);

impl Drop for SocketFile<'_> {
    fn drop(&mut self) {
        // Someone else may have removed it already.
        let _ = std::fs::remove_file(self.0);
    }
}

fn listen<'a>(supervisor: &mut Supervisor, path: &'a Path) -> Result<SocketFile<'a>, SupervisorError> {
    let listener: OwnedFd =
        socket::listen_at(path).map_err(|error| SupervisorError::Socket(path.to_owned(), error))?;
    let file = SocketFile(path);
    supervisor.control(listener)?;
    Ok(file)
}
