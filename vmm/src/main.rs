//! `caisson-vmm`: one microVM in one process.
//!
//! The launcher opens everything that the machine needs ([`caisson_vmm::resources`]), then the machine is made from
//! what is open, and only then does guest code run.

use std::{error::Error, path::PathBuf, process::ExitCode, time::Instant};

use caisson_vmm::{
    boot::BootSource,
    config::MachineConfig,
    devices::serial::ConsoleSink,
    machine::{ExitReason, Machine, poller::Token},
    resources::{self, Descriptors, Resources},
};
use clap::Parser;
use tracing::level_filters::LevelFilter;

/// Runs one microVM.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The machine file (TOML, or JSON by its name): boot this machine.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How much to log to standard error.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LevelFilter,
}

fn main() -> ExitCode {
    let started = Instant::now();
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_max_level(arguments.log_level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match run(&arguments, started) {
        Ok(ExitReason::PowerOff | ExitReason::Stopped) => ExitCode::SUCCESS,
        Ok(reason) => {
            eprintln!("caisson-vmm: {reason}");
            ExitCode::from(reason.code())
        }
        Err(error) => {
            eprintln!("caisson-vmm: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, started: Instant) -> Result<ExitReason, Box<dyn Error>> {
    let config = MachineConfig::from_file(&arguments.config)?;
    let kvm = resources::open_kvm()?;
    let resources = Resources::open(&config, &Descriptors::Inherited)?;

    let sink = ConsoleSink::new(resources.console, config.console.rate);
    let mut machine = Machine::new(&kvm, config.shape(), sink, started)?;
    let command_line = config.command_line()?;
    let source = BootSource {
        kernel: &resources.kernel,
        initramfs: resources.initramfs.as_ref(),
        protocol: config.kernel.protocol,
        command_line: &command_line,
        processors: config.cpus.max,
    };
    machine.load(&source, config.cpus.boot)?;
    machine.resume()?;
    event_loop(&machine)
}

fn event_loop(machine: &Machine) -> Result<ExitReason, Box<dyn Error>> {
    loop {
        for (token, events) in machine.poller().wait(-1)? {
            if token == Token::Exit
                && let Some(reason) = machine.ended()
            {
                return Ok(reason);
            }
            machine.handle(token, events);
        }
    }
}

/// An error and its causes, on one line.
fn one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
