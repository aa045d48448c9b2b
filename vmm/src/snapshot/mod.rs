//! Saving a paused machine, and making a machine from what was saved.
//!
//! | module | owns |
//! |---|---|
//! | [`format`] | the state file: header, version, checksum |
//! | [`state`] | what is in it |
//! | `vcpu` | the state of a processor, in the order that KVM needs |
//! | `vm` | the interrupt controllers and the clock |
//!
//! A snapshot is two files. The state file is small and read as a whole. The memory file is as long as the
//! machine's memory, with holes where it is zero; a restored machine maps it privately and reads what it
//! touches. It must therefore never change while a machine runs from it. Any number of machines may.
//!
//! A *template* is an ordinary snapshot of a machine whose slots are empty save for what needs nothing from
//! the host: whoever restores it plugs the rest.

pub mod format;
pub mod state;
mod vcpu;
mod vm;

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::fs::FileExt,
    sync::Arc,
    time::Instant,
};

use caisson_virtio::{DeviceError, memory::RamError};
use caisson_vmm_api::control::protocol::RestoreCommand;
pub use format::FormatError;
use kvm_ioctls::Kvm;
pub use state::MachineState;

use crate::{
    devices::serial::ConsoleSink,
    machine::{Machine, MachineError, OpenDevice, ProcessorError, poller::Poller, shares::Shares},
    resources::{self, Access, ConsoleEnds, Descriptors, ResourceError},
    vcpu::VcpuCommandError,
};

/// Why a machine could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It runs.
    #[error("the machine must be paused")]
    Running,
    /// A file that is to be written is the one that the machine's memory shows.
    #[error("snapshot.{0}: the machine runs from this file; save it to another one")]
    OwnFile(&'static str),
    /// A file could not be written or read.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    /// The state file is not one that this version understands.
    #[error("the state file")]
    Format(#[from] FormatError),
    /// KVM did not give or take a part of the state.
    #[error("{what}")]
    Kvm {
        /// Which part.
        what: String,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A processor has more of something than KVM's tables hold.
    #[error("{0} does not fit KVM's tables")]
    Table(&'static str),
    /// A device could not come to rest.
    #[error("slot {slot}: saving its device")]
    Device {
        /// The slot.
        slot: u8,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// A slot has a device that no snapshot can hold.
    #[error("slot {0}: its device cannot be saved")]
    UnknownDevice(u8),
    /// The state has no processor.
    #[error("the snapshot has no processor")]
    NoProcessor,
    /// The snapshot comes from another kind of processor.
    #[error("the snapshot was made on another processor model ({saved}, this host has {here})")]
    Processor {
        /// The snapshot's.
        saved: String,
        /// This host's.
        here: String,
    },
    /// A slot was named for which nothing was saved.
    #[error("the snapshot has no device in slot {0}")]
    NoSuchDevice(u8),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Something that the snapshot needs could not be opened.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] Box<MachineError>),
    /// The processors.
    #[error(transparent)]
    Processors(#[from] ProcessorError),
    /// A processor is gone.
    #[error(transparent)]
    Gone(#[from] VcpuCommandError),
}

impl From<MachineError> for SnapshotError {
    fn from(error: MachineError) -> Self {
        Self::Machine(Box::new(error))
    }
}

/// Whether a machine can be saved now.
///
/// # Errors
/// When it runs.
pub fn check_paused(machine: &Machine) -> Result<(), SnapshotError> {
    if machine.processors().running() { Err(SnapshotError::Running) } else { Ok(()) }
}

/// Saves a paused machine: its state to `state_file`, its memory to `memory_file`, in place of whatever is in
/// them.
///
/// # Errors
/// When it runs, or from one of the files, which are then as they were; or when a part of it cannot be saved.
/// The files are then of no use.
pub fn save(
    kvm: &Kvm,
    machine: &mut Machine,
    state_file: &File,
    memory_file: &File,
) -> Result<(), SnapshotError> {
    check_paused(machine)?;
    for (name, file) in [("state", state_file), ("memory", memory_file)] {
        if machine.ram().runs_from(file).map_err(|e| SnapshotError::Io("looking at a snapshot's file", e))? {
            return Err(SnapshotError::OwnFile(name));
        }
    }
    let result = MachineState::of(kvm, machine).and_then(|state| {
        machine.ram().save(memory_file).map_err(|e| SnapshotError::Io("writing the memory file", e))?;
        let bytes = format::encode(&state)?;
        replace(state_file, &bytes).map_err(|e| SnapshotError::Io("writing the state file", e))
    });
    // What devices took back to be saved they may do again, whether or not it worked.
    machine.slots().kick_all();
    result
}

/// Writes `bytes` to a file, in place of what is in it, or to a pipe.
fn replace(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        file.rewind()?;
    }
    file.write_all(bytes)
}

/// Everything that a restored machine needs, open.
pub struct Source {
    state: File,
    memory: File,
    console: ConsoleEnds,
    console_rate: u64,
    devices: Vec<(u8, OpenDevice)>,
}

impl Source {
    /// Opens what `command` names.
    ///
    /// # Errors
    /// The first file that could not be opened, with the field that names it.
    pub fn open(command: &RestoreCommand, descriptors: &Descriptors) -> Result<Self, SnapshotError> {
        let state = descriptors.open("state", &command.state, Access::Read)?;
        let memory = descriptors.open("memory", &command.memory, Access::Read)?;
        let console = ConsoleEnds::open(&command.console, descriptors)?;
        let mut devices = Vec::with_capacity(command.devices.len());
        for (index, device) in command.devices.iter().enumerate() {
            let field = format!("devices[{index}]");
            devices.push((device.slot, resources::open_device(&field, &device.device, descriptors)?));
        }
        Ok(Self { state, memory, console, console_rate: command.console.rate, devices })
    }

    fn read_state(&self) -> Result<MachineState, SnapshotError> {
        let failed = |error| SnapshotError::Io("reading the state file", error);
        let len = self.state.metadata().map_err(failed)?.len();
        let mut bytes = Vec::new();
        if len > 0 {
            bytes.resize(usize::try_from(len.min(format::MAX_LEN)).unwrap_or_default(), 0);
            self.state.read_exact_at(&mut bytes, 0).map_err(failed)?;
        } else {
            let mut limited = (&self.state).take(format::MAX_LEN);
            limited.read_to_end(&mut bytes).map_err(failed)?;
        }
        Ok(format::decode(&bytes)?)
    }
}

/// Makes a machine from a snapshot, paused. `birth` is where its times count from, `shares` is what serves
/// its shared directories.
///
/// # Errors
/// When the snapshot is not understood, does not fit this host, or something does not take its saved state.
pub fn restore(
    kvm: &Kvm,
    poller: Arc<Poller>,
    source: Source,
    (birth, shares): (Instant, Arc<Shares>),
) -> Result<Machine, SnapshotError> {
    let state = source.read_state()?;
    let Source { memory, console, console_rate, devices, .. } = source;
    state.check_host()?;
    let sink = ConsoleSink::new(console.output, console_rate);
    let mut machine = Machine::from_snapshot(kvm, &state.outline()?, memory, poller, (sink, birth))?;
    machine.share_by(shares);
    state.restore(&mut machine, devices)?;
    console.input.map(|input| machine.type_from(input)).transpose()?;
    Ok(machine)
}
