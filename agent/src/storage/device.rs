//! Finds block devices.

use std::fs;
use std::path::PathBuf;

use caisson_protocol::v1::block_device::Device;
use caisson_protocol::v1::{BlockDevice, storage::Source};

use super::StorageError;
use crate::guest::{GuestError, devices, read};

const BLOCK: &str = "/sys/block";

/// The node of a disk that is not to be mounted.
pub(super) fn unmounted(source: &Source) -> Result<Option<PathBuf>, StorageError> {
    match source {
        Source::Block(block) if block.fs_type.is_empty() => node(block).map(Some),
        _ => Ok(None),
    }
}

/// The device's node.
pub(super) fn node(block: &BlockDevice) -> Result<PathBuf, StorageError> {
    name(block).map(|name| PathBuf::from("/dev").join(name))
}

/// The device's name, e.g. "vda".
pub(super) fn name(block: &BlockDevice) -> Result<String, StorageError> {
    match &block.device {
        Some(Device::Slot(slot)) => Ok(devices::block_device(*slot)?),
        Some(Device::Serial(serial)) if !serial.is_empty() && serial.len() <= 20 => by_serial(serial),
        Some(Device::Serial(serial)) => Err(StorageError::invalid("serial", serial)),
        None => Err(StorageError::invalid("device", "")),
    }
}

fn by_serial(serial: &str) -> Result<String, StorageError> {
    for entry in fs::read_dir(BLOCK).map_err(GuestError::file("list", BLOCK))? {
        let entry = entry.map_err(GuestError::file("list", BLOCK))?;
        if read(entry.path().join("serial")).is_ok_and(|has| has == serial) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Err(GuestError::NotFound(format!("no block device has serial {serial}")).into())
}
