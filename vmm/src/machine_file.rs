//! From the machine file to the machine: its sizes, and its kernel's command line.

use std::path::Path;

use caisson_virtio::memory::RamConfig;
use caisson_vmm_api::config::{ConfigError, MachineConfig};

use crate::{
    boot::{CommandLine, CommandLineError},
    layout::MMIO_SLOT_SIZE,
    machine::{MachineShape, slots::Slots},
};

/// What is wrong with a machine file.
#[derive(Debug, thiserror::Error)]
pub enum MachineFileError {
    /// It cannot be read, or has a value that no machine can have.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The command line.
    #[error("kernel.command_line")]
    CommandLine(#[source] CommandLineError),
}

/// Reads and checks a machine file.
///
/// # Errors
/// See [`MachineFileError`].
pub fn read(path: &Path) -> Result<MachineConfig, MachineFileError> {
    let config = MachineConfig::from_file(path)?;
    check(&config)?;
    Ok(config)
}

/// Checks every value against what a machine can be, and returns the kernel's command line, which only the machine can
/// put together.
///
/// # Errors
/// The first field that is at fault.
pub fn check(config: &MachineConfig) -> Result<CommandLine, MachineFileError> {
    config.validate()?;
    command_line(config).map_err(MachineFileError::CommandLine)
}

impl From<&MachineConfig> for MachineShape {
    fn from(config: &MachineConfig) -> Self {
        Self {
            ram: RamConfig {
                size: config.memory.size_mib << 20,
                hotplug: config.memory.hotplug_mib << 20,
                backing: config.memory.backing,
                huge_pages: config.memory.huge_pages,
            },
            max_processors: config.cpus.max,
            slots: config.slots,
        }
    }
}

/// The kernel command line: the machine's own part, then the user's, which may override it.
///
/// # Errors
/// When it would be too long, or has characters that it cannot have.
pub fn command_line(config: &MachineConfig) -> Result<CommandLine, CommandLineError> {
    let mut line = CommandLine::new()?;
    // A failed kernel must end the machine: reboot by triple fault, at once after a panic.
    line.push("panic=-1 reboot=t")?;
    // With one processor online the kernel would take the lock prefixes out of itself, and put them back
    // when the next one comes: thousands of rewritten instructions each time.
    line.push("noreplace-smp")?;
    // No PS/2 controller answers; looking for one takes a third of a second.
    line.push("i8042.noaux i8042.nomux i8042.dumbkbd")?;
    line.push(&format!("maxcpus={}", config.cpus.boot))?;
    line.push(&config.kernel.command_line)?;
    for slot in 0..config.slots {
        line.push_mmio_slot(Slots::base(slot), MMIO_SLOT_SIZE, Slots::gsi(slot))?;
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use caisson_vmm_api::config::MAX_SLOTS;

    use super::*;

    fn config(text: &str) -> MachineConfig {
        let config: MachineConfig = toml::from_str(text).unwrap();
        config.validate().unwrap();
        config
    }

    const LEAST: &str = "[kernel]\nimage = '/k'\n[memory]\nsize_mib = 128\n";

    #[test]
    fn the_largest_machine_has_a_command_line_that_fits() {
        let config = config(&format!("slots = {MAX_SLOTS}\n{LEAST}[cpus]\nmax = 254\n"));
        assert!(command_line(&config).unwrap().len() < 1600);
    }

    #[test]
    fn a_command_line_that_is_too_long_is_an_error() {
        let long = "x".repeat(2048);
        let config = config(&LEAST.replace("[memory]", &format!("command_line = '{long}'\n[memory]")));
        assert!(check(&config).err().unwrap().to_string().contains("kernel.command_line"));
    }
}
