//! The event loop that ties a machine and its controllers together.

use std::{error::Error, io, os::fd::OwnedFd, sync::Arc, time::Instant};

use caisson_vmm_api::{
    config::{DeviceConfig, MachineConfig},
    control::protocol::{Command, Failure, FailureKind, Message, Reply, Resize},
    exit::ExitReason,
    jail::JailFileError,
};
use kvm_ioctls::Kvm;

use super::server::{Controllers, Incoming};
use crate::{
    boot::BootSource,
    devices::serial::ConsoleSink,
    jail::{self, JailError},
    machine::{
        Machine, MachineError,
        poller::{Poller, Token},
        shares::Shares,
    },
    machine_file::{self, MachineFileError},
    resources::{self, Access, Descriptors, ResourceError, Resources},
    seccomp,
    snapshot::{self, SnapshotError},
};

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The machine's description is wrong.
    #[error(transparent)]
    Config(#[from] MachineFileError),
    /// Something that it names could not be opened.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The machine could not be made or changed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Saving or restoring failed.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The jail's description.
    #[error(transparent)]
    JailFile(#[from] JailFileError),
    /// The process could not be jailed.
    #[error("jail")]
    Jail(#[from] JailError),
    /// It cannot be done now.
    #[error("{0}")]
    State(&'static str),
    /// The control socket could not be made.
    #[error("control.socket: listening on {0}")]
    Socket(std::path::PathBuf, #[source] io::Error),
    /// Waiting for events, or a controller's socket, failed.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
}

impl SupervisorError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Config(_) => FailureKind::Invalid,
            Self::State(_) => FailureKind::State,
            _ => FailureKind::Failed,
        }
    }

    /// The error and its causes on one line.
    #[must_use]
    pub fn one_line(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

const NO_MACHINE: SupervisorError = SupervisorError::State("there is no machine yet");

/// One process: a machine, once it has been made, and those who control it.
pub struct Supervisor {
    machine: Option<Machine>,
    /// The machine has been started.
    started: bool,
    controllers: Controllers,
    poller: Arc<Poller>,
    kvm: Kvm,
    birth: Instant,
    shares: Arc<Shares>,
    /// Somebody asked for the end; it comes when they have their answer.
    ending: bool,
}

impl Supervisor {
    /// A process without a machine. `birth` is where its times count from.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(kvm: Kvm, birth: Instant) -> Result<Self, SupervisorError> {
        let poller = Poller::new().map_err(|e| SupervisorError::Host("creating the event loop", e))?;
        let poller = Arc::new(poller);
        let controllers = Controllers::new(poller.clone());
        let shares = Arc::default();
        Ok(Self { machine: None, started: false, controllers, poller, kvm, birth, shares, ending: false })
    }

    /// Has shared directories served by `shares`, as a jail allows.
    pub fn share_by(&mut self, shares: Shares) {
        self.shares = Arc::new(shares);
    }

    /// Takes a control socket, which listens or is connected.
    ///
    /// # Errors
    /// When it is no socket or cannot be watched.
    pub fn control(&mut self, socket: OwnedFd) -> Result<(), SupervisorError> {
        self.controllers.add(socket).map_err(|e| SupervisorError::Host("using the control socket", e))
    }

    /// Makes the machine, without running it.
    ///
    /// # Errors
    /// When its description or something that it names is at fault.
    pub fn create(&mut self, config: &MachineConfig, resources: Resources) -> Result<(), SupervisorError> {
        if self.machine.is_some() {
            return Err(SupervisorError::State("there is a machine already"));
        }
        let command_line = machine_file::check(config)?;
        let sink = ConsoleSink::new(resources.console.output, config.console.rate);
        let mut machine = Machine::new(&self.kvm, config.into(), self.poller.clone(), sink, self.birth)?;
        let source = BootSource {
            kernel: &resources.kernel,
            initramfs: resources.initramfs.as_ref(),
            protocol: config.kernel.protocol,
            command_line: &command_line,
            processors: config.cpus.max,
        };
        machine.share_by(self.shares.clone());
        machine.load(&source, config.cpus.boot)?;
        for (slot, device) in (0u8..).zip(resources.devices) {
            machine.plug(slot, device)?;
        }
        machine.plug_memory()?;
        resources.console.input.map(|input| machine.type_from(input)).transpose()?;
        self.machine = Some(machine);
        Ok(())
    }

    /// Makes the machine from a snapshot, without running it.
    ///
    /// # Errors
    /// When there is a machine already, or the snapshot does not fit.
    pub fn restore(&mut self, source: snapshot::Source) -> Result<(), SupervisorError> {
        if self.machine.is_some() {
            return Err(SupervisorError::State("there is a machine already"));
        }
        let poller = self.poller.clone();
        let machine = snapshot::restore(&self.kvm, poller, source, (self.birth, self.shares.clone()))?;
        self.machine = Some(machine);
        Ok(())
    }

    /// Starts the machine.
    ///
    /// # Errors
    /// When there is none, or it runs already.
    pub fn boot(&mut self) -> Result<(), SupervisorError> {
        if self.started {
            return Err(SupervisorError::State("the machine has been started already"));
        }
        self.resume()
    }

    /// Lets the machine run. Before its first instruction, this thread gives up what it needed until then.
    fn resume(&mut self) -> Result<(), SupervisorError> {
        let machine = self.machine.as_mut().ok_or(NO_MACHINE)?;
        if !self.started {
            jail::confine_thread(seccomp::Thread::Devices)?;
        }
        machine.resume()?;
        self.started = true;
        Ok(())
    }

    fn machine(&mut self) -> Result<&mut Machine, SupervisorError> {
        self.machine.as_mut().ok_or(NO_MACHINE)
    }

    /// Serves the machine and its controllers until the machine has ended.
    ///
    /// # Errors
    /// When waiting fails, or nobody is left who could make a machine.
    pub fn run(&mut self) -> Result<ExitReason, SupervisorError> {
        let reason = loop {
            if self.machine.is_none() && !self.controllers.any() {
                return Err(SupervisorError::State("there is no machine, and nobody to make one"));
            }
            let ready = self.poller.wait(self.controllers.patience());
            let ready = ready.map_err(|e| SupervisorError::Host("waiting for events", e))?;
            self.controllers.reopen();
            for (token, events) in ready {
                match token {
                    Token::Listener => self.controllers.accept(),
                    Token::Controller(number) => self.serve(number),
                    // Looked at below.
                    Token::Exit => {}
                    token => {
                        if let Some(machine) = &mut self.machine {
                            machine.handle(token, events);
                        }
                    }
                }
            }
            if let Some(reason) = self.machine.as_ref().and_then(Machine::ended) {
                break reason;
            }
            if self.ending {
                break ExitReason::Stopped;
            }
        };
        // Processors and devices stop before anyone is told that they have.
        self.machine = None;
        self.controllers.send_all(&Message::Exit(reason.clone()));
        Ok(reason)
    }

    fn serve(&mut self, controller: u32) {
        let Some(Incoming { controller, request, descriptors }) = self.controllers.receive(controller) else {
            return;
        };
        let result = self.obey(request.command, &Descriptors::Passed(descriptors)).map_err(|error| {
            tracing::info!(error = %error.one_line(), "request failed");
            Failure { kind: error.kind(), message: error.one_line() }
        });
        self.controllers.send(controller, &Message::Response { id: request.id, result });
    }

    fn obey(&mut self, command: Command, descriptors: &Descriptors) -> Result<Reply, SupervisorError> {
        match command {
            Command::Create(config) => {
                machine_file::check(&config)?;
                let resources = Resources::open(&config, descriptors)?;
                self.create(&config, resources)?;
            }
            Command::Restore(command) => {
                self.restore(snapshot::Source::open(&command, descriptors)?)?;
            }
            Command::Boot => self.boot()?,
            Command::Plug { slot, device } => return self.plug(slot, &device, descriptors),
            Command::Unplug { slot, force } => self.machine()?.unplug(slot, force)?,
            Command::RefreshCapacity { slot } => {
                return Ok(Reply::Capacity { bytes: self.machine()?.refresh_capacity(slot)? });
            }
            Command::Resize(resize) => self.resize(resize)?,
            Command::Pause => self.machine()?.pause()?,
            Command::Resume => self.resume()?,
            Command::Snapshot { state, memory } => {
                let machine = self.machine.as_mut().ok_or(NO_MACHINE)?;
                // Before a file is made for nothing.
                snapshot::check_paused(machine)?;
                let state = descriptors.open("snapshot.state", &state, Access::Create)?;
                let memory = descriptors.open("snapshot.memory", &memory, Access::Create)?;
                snapshot::save(&self.kvm, machine, &state, &memory)?;
            }
            Command::Metrics => return Ok(Reply::Metrics(Box::new(self.machine()?.metrics()))),
            Command::Shutdown => self.ending = true,
        }
        Ok(Reply::Done)
    }

    fn plug(
        &mut self,
        slot: Option<u8>,
        device: &DeviceConfig,
        descriptors: &Descriptors,
    ) -> Result<Reply, SupervisorError> {
        let machine = self.machine()?;
        let device = resources::open_device("device", device, descriptors)?;
        let slot = match slot {
            Some(slot) => slot,
            None => machine.slots().first_empty().map_err(MachineError::from)?,
        };
        machine.plug(slot, device)?;
        Ok(Reply::Plugged { slot, guest_name: crate::machine::slots::Slots::guest_name(slot) })
    }

    fn resize(&mut self, resize: Resize) -> Result<(), SupervisorError> {
        let machine = self.machine()?;
        if let Some(cpus) = resize.cpus {
            machine.processors_mut().grow(cpus).map_err(MachineError::from)?;
        }
        if let Some(mib) = resize.plugged_mib {
            machine.request_memory(mib.saturating_mul(1 << 20))?;
        }
        if let Some(mib) = resize.balloon_mib {
            machine.request_balloon(mib.saturating_mul(256))?;
        }
        Ok(())
    }
}
