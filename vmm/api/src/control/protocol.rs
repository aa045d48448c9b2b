//! What is said on the control socket.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::metrics::Metrics;
use crate::{
    config::{ConsoleConfig, DeviceConfig, FileSource, MachineConfig},
    exit::ExitReason,
};

/// The protocol's version. A request of another version is refused.
pub const VERSION: u32 = 1;

/// What a controller sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// Comes back in the response.
    pub id: u64,
    /// What is to be done.
    pub command: Command,
}

/// What can be asked of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Makes the machine, without running it.
    Create(Box<MachineConfig>),
    /// Makes the machine from a snapshot, paused.
    Restore(RestoreCommand),
    /// Starts the machine.
    Boot,
    /// Puts a device into a slot. The guest's driver finds it when it probes the slot again.
    Plug {
        /// The slot; the first empty one when absent.
        #[serde(default)]
        slot: Option<u8>,
        /// The device.
        device: DeviceConfig,
    },
    /// Takes the device out of a slot. The guest's driver must have let go of it.
    Unplug {
        /// The slot.
        slot: u8,
        /// Take it away even though a driver is bound.
        #[serde(default)]
        force: bool,
    },
    /// Looks at the size of a disk's file again, and tells the guest when it has changed.
    RefreshCapacity {
        /// The disk's slot.
        slot: u8,
    },
    /// Changes the machine's size.
    Resize(Resize),
    /// Brings all processors to rest.
    Pause,
    /// Lets them go on.
    Resume,
    /// Saves the machine, which must be paused.
    Snapshot {
        /// Where its state goes.
        state: FileSource,
        /// Where its memory goes: an empty file.
        memory: FileSource,
    },
    /// Asks for counters and sizes.
    Metrics,
    /// Ends the machine.
    Shutdown,
}

/// What a machine is restored from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreCommand {
    /// The state file.
    pub state: FileSource,
    /// The memory file. It must not change for as long as the machine lives.
    pub memory: FileSource,
    /// Where the console goes.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// What takes the place of the devices that need something from the host, by slot.
    #[serde(default)]
    pub devices: Vec<RestoredDevice>,
}

impl RestoreCommand {
    /// What goes on from the files `state` and `memory` in a directory. Its console and its devices are those
    /// of a machine file, such as the one that the saved machine was made from; without one, the console goes
    /// to standard output, and there are no devices that need something from the host.
    #[must_use]
    pub fn from_directory(directory: &Path, machine: Option<&MachineConfig>) -> Self {
        let to_stdout = || ConsoleConfig { output: Some(FileSource::Descriptor(1)), ..Default::default() };
        let devices = (0u8..).zip(machine.into_iter().flat_map(|machine| &machine.devices));
        let devices = devices
            .filter(|(_, device)| device.needs_host())
            .map(|(slot, device)| RestoredDevice { slot, device: device.clone() });
        Self {
            state: FileSource::Path(directory.join("state")),
            memory: FileSource::Path(directory.join("memory")),
            console: machine.map_or_else(to_stdout, |machine| machine.console.clone()),
            devices: devices.collect(),
        }
    }
}

/// A device of a restored machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoredDevice {
    /// Its slot.
    pub slot: u8,
    /// What it is on now, with its options. Those that the guest has seen (such as a disk's id and a card's
    /// address) must be as they were; limits, engines, and whether a share may be written to are up to whoever
    /// restores.
    pub device: DeviceConfig,
}

/// New sizes; what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Processors that exist. The guest brings the new ones up itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u8>,
    /// Memory that the guest is asked to have plugged beyond its boot memory, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugged_mib: Option<u64>,
    /// Memory that the guest is asked to give back by its balloon, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon_mib: Option<u32>,
}

/// What a machine sends: the response to a request, or an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Message {
    /// The response to the request with this id.
    Response {
        /// The request's.
        id: u64,
        /// What came of it.
        result: Result<Reply, Failure>,
    },
    /// The machine has ended. The process ends after it.
    Exit(ExitReason),
}

/// What comes of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// A device is in its slot.
    Plugged {
        /// The slot.
        slot: u8,
        /// The name of its platform device in the guest's sysfs.
        guest_name: String,
    },
    /// The size of a disk.
    Capacity {
        /// In bytes.
        bytes: u64,
    },
    /// Counters and sizes.
    Metrics(Box<Metrics>),
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// What happened, with its causes.
    pub message: String,
}

/// Kinds of failures, as far as a controller would act on them differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The request itself is wrong.
    Invalid,
    /// The machine is not in a state for it.
    State,
    /// The host or the guest did not let it happen.
    Failed,
}
