//! The machine file: everything that a machine is made from, as a person or the control API writes it.
//!
//! ```toml
//! slots = 8
//!
//! [kernel]
//! image = "/usr/lib/caisson/vmlinux"
//! initramfs = "/usr/lib/caisson/initramfs"
//! command_line = "console=ttyS0"
//!
//! [memory]
//! size_mib = 128
//!
//! [cpus]
//! boot = 1
//! max = 4
//!
//! [console]
//! output = "/dev/stdout"
//! input = "/dev/stdin"
//! ```
//!
//! Files are named by path, or as `fd:N`: descriptor N of those that the process was started with, or that
//! came with the request. The format is TOML, or JSON when the file's name ends in `.json`. Unknown keys are
//! errors, and every error names the field that is at fault.

mod device;
mod machine_options;
mod source;

use std::path::{Path, PathBuf};

pub use device::{BlockDevice, DeviceConfig, FsDevice, NetDevice, VsockDevice};
pub use machine_options::{Backing, HugePages, Protocol};
use serde::{Deserialize, Serialize};
pub use source::FileSource;

/// The most memory at boot, and the most that can be plugged later, in bytes: 1 TiB each.
pub const MAX_MEMORY: u64 = 1 << 40;
/// As many processors as 8-bit APIC ids can name beside the I/O APIC (255 is the broadcast id).
pub const MAX_PROCESSORS: u8 = 254;
/// As many virtio-mmio slots as a kernel command line has room for beside everything else.
pub const MAX_SLOTS: u8 = 32;

/// The least memory in which a kernel can unpack itself, in MiB.
const MIN_MEMORY_MIB: u64 = 16;
/// The most memory, in MiB.
const MAX_MEMORY_MIB: u64 = MAX_MEMORY >> 20;
/// Linux plugs and unplugs memory in blocks of this many MiB.
const HOTPLUG_BLOCK_MIB: u64 = 128;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// What it boots.
    pub kernel: KernelConfig,
    /// Its memory.
    pub memory: MemoryConfig,
    /// Its processors.
    #[serde(default)]
    pub cpus: CpuConfig,
    /// Where its console goes.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// How many virtio-mmio slots it has, for devices now and later.
    #[serde(default = "default_slots")]
    pub slots: u8,
    /// How it is controlled.
    #[serde(default)]
    pub control: ControlConfig,
    /// Its devices, in the order of its slots.
    #[serde(default)]
    pub devices: Vec<DeviceConfig>,
}

fn default_slots() -> u8 {
    8
}

/// What a machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// The kernel: an ELF image (`vmlinux`) or a bzImage.
    pub image: FileSource,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<FileSource>,
    /// What is added to the command line that the machine itself needs.
    #[serde(default)]
    pub command_line: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub protocol: Protocol,
}

/// A machine's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Memory at boot, in MiB.
    pub size_mib: u64,
    /// How much can be plugged later, in MiB; a multiple of 128.
    #[serde(default)]
    pub hotplug_mib: u64,
    /// How its pages are allocated.
    #[serde(default)]
    pub backing: Backing,
    /// Whether they are huge.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// A machine's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Processors that run from the start.
    #[serde(default = "one")]
    pub boot: u8,
    /// As many as it may have later.
    #[serde(default = "one")]
    pub max: u8,
}

fn one() -> u8 {
    1
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { boot: 1, max: 1 }
    }
}

/// A machine's serial console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Where its output goes; nowhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<FileSource>,
    /// Where what is typed on it comes from, such as `/dev/stdin`: a terminal, a pipe or a socket, but no
    /// regular file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<FileSource>,
    /// The most that is written there, in bytes per second.
    #[serde(default = "default_console_rate")]
    pub rate: u64,
}

fn default_console_rate() -> u64 {
    1 << 20
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self { output: None, input: None, rate: default_console_rate() }
    }
}

/// How a machine is controlled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlConfig {
    /// A unix socket to make and listen on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// What is wrong with a machine file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or has the wrong keys or types.
    #[error("{path}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// It is not JSON, or has the wrong keys or types.
    #[error("{path}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
    /// A value that no machine can have.
    #[error("{field}: {what}")]
    Value {
        /// The field, from the top.
        field: &'static str,
        /// What is wrong with it.
        what: String,
    },
}

impl MachineConfig {
    /// Reads and checks a machine file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = if path.extension().is_some_and(|extension| extension == "json") {
            serde_json::from_str(&text)
                .map_err(|source| ConfigError::Json { path: path.to_owned(), source })?
        } else {
            toml::from_str(&text)
                .map_err(|source| ConfigError::Toml { path: path.to_owned(), source: Box::new(source) })?
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks every value against what a machine can be.
    ///
    /// # Errors
    /// The first field that is at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let value = |field, what: String| Err(ConfigError::Value { field, what });
        let memory = &self.memory;
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory.size_mib) {
            let what = format!("{} MiB; must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}", memory.size_mib);
            return value("memory.size_mib", what);
        }
        if memory.hotplug_mib > MAX_MEMORY_MIB || !memory.hotplug_mib.is_multiple_of(HOTPLUG_BLOCK_MIB) {
            let what = format!(
                "{} MiB; must be a multiple of {HOTPLUG_BLOCK_MIB} up to {MAX_MEMORY_MIB}",
                memory.hotplug_mib
            );
            return value("memory.hotplug_mib", what);
        }
        if memory.huge_pages == HugePages::Reserved && !memory.size_mib.is_multiple_of(2) {
            return value("memory.size_mib", "must be even with reserved huge pages of 2 MiB".into());
        }
        if !(1..=MAX_PROCESSORS).contains(&self.cpus.max) {
            return value("cpus.max", format!("{}; must be 1 to {MAX_PROCESSORS}", self.cpus.max));
        }
        if !(1..=self.cpus.max).contains(&self.cpus.boot) {
            return value(
                "cpus.boot",
                format!("{}; must be 1 to cpus.max ({})", self.cpus.boot, self.cpus.max),
            );
        }
        if self.slots > MAX_SLOTS {
            return value("slots", format!("{}; at most {MAX_SLOTS}", self.slots));
        }
        // The memory device takes a slot of its own.
        let needed = self.devices.len() + usize::from(memory.hotplug_mib > 0);
        if needed > usize::from(self.slots) {
            return value("slots", format!("{} slots for {needed} devices", self.slots));
        }
        Ok(())
    }

    /// The sockets that are made in the file system for this machine.
    #[must_use]
    pub fn sockets(&self) -> Vec<PathBuf> {
        let vsock = self.devices.iter().filter_map(|device| match device {
            DeviceConfig::Vsock(VsockDevice { socket: FileSource::Path(path), .. }) => Some(path.clone()),
            _ => None,
        });
        self.control.socket.iter().cloned().chain(vsock).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<MachineConfig, String> {
        let config: MachineConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        config.validate().map_err(|error| error.to_string())?;
        Ok(config)
    }

    const LEAST: &str = "[kernel]\nimage = '/k'\n[memory]\nsize_mib = 128\n";

    #[test]
    fn the_least_that_a_machine_needs_is_a_kernel_and_memory() {
        let config = config(LEAST).unwrap();
        assert_eq!(config.kernel.image, FileSource::Path("/k".into()));
        assert_eq!((config.cpus.boot, config.cpus.max, config.slots), (1, 1, 8));
    }

    #[test]
    fn errors_name_the_field_at_fault() {
        for (text, field) in [
            ("[kernel]\nimage='/k'\n[memory]\nsize_mib = 0\n", "memory.size_mib"),
            ("[kernel]\nimage='/k'\n[memory]\nsize_mib = 128\nhotplug_mib = 100\n", "memory.hotplug_mib"),
            (&format!("{LEAST}[cpus]\nmax = 0\n"), "cpus.max"),
            (&format!("{LEAST}[cpus]\nmax = 255\n"), "cpus.max"),
            (&format!("{LEAST}[cpus]\nboot = 3\nmax = 2\n"), "cpus.boot"),
            (&format!("slots = 33\n{LEAST}"), "slots"),
            (&format!("{LEAST}[cpu]\nmax = 1\n"), "cpu"),
            ("[memory]\nsize_mib = 128\n", "kernel"),
            (&format!("{LEAST}[console]\noutput = 'fd:x'\n"), "fd:x"),
        ] {
            let error = config(text).unwrap_err();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
