//! The machine's virtio-mmio slots.
//!
//! An empty slot is a platform device without a driver. Once the VMM has filled it, writing its name to the driver's
//! `bind` file probes it, and the write returns when the device is up.

use std::fs;
use std::path::{Path, PathBuf};

use caisson_protocol::v1::Device;

use super::{GuestError, read, write};

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// More than any machine has.
const MAX_SLOT: u32 = 255;

/// Binds the driver to `slot`, unless it is bound. Blocks until the device is up.
///
/// # Errors
/// When there is no such slot, or nothing in it.
pub fn plug(slot: u32) -> Result<Device, GuestError> {
    let name = name(slot)?;
    if !Path::new(DRIVER).join(&name).exists() {
        let bind = Path::new(DRIVER).join("bind");
        if let Err(error) = write(&bind, &name) {
            let empty = matches!(&error, GuestError::File { source, .. }
                if source.raw_os_error() == Some(libc::ENODEV));
            return Err(if empty {
                GuestError::Precondition(format!("slot {slot} is empty"))
            } else {
                error
            });
        }
    }
    let device = describe(slot)?;
    if device.virtio_id == 0 {
        return Err(GuestError::Precondition(format!("slot {slot} is empty")));
    }
    Ok(device)
}

/// Unbinds the driver from `slot`, if it is bound.
///
/// # Errors
/// When there is no such slot.
pub fn unplug(slot: u32) -> Result<(), GuestError> {
    let name = name(slot)?;
    if Path::new(DRIVER).join(&name).exists() {
        write(Path::new(DRIVER).join("unbind"), &name)?;
    }
    Ok(())
}

/// All slots in order.
///
/// # Errors
/// When sysfs is not there.
pub fn list() -> Result<Vec<Device>, GuestError> {
    let mut slots = Vec::new();
    for entry in fs::read_dir(DEVICES).map_err(GuestError::file("list", DEVICES))? {
        let entry = entry.map_err(GuestError::file("list", DEVICES))?;
        let slot =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("virtio-mmio.")?.parse().ok());
        slots.extend::<Option<u32>>(slot);
    }
    slots.sort_unstable();
    slots.into_iter().map(describe).collect()
}

/// The block device of `slot`, e.g. "vda".
///
/// # Errors
/// When the slot has none.
pub fn block_device(slot: u32) -> Result<String, GuestError> {
    let device = describe(slot)?;
    if device.virtio_id != VIRTIO_ID_BLOCK || device.interface.is_empty() {
        return Err(GuestError::NotFound(format!("slot {slot} has no block device")));
    }
    Ok(device.interface)
}

const VIRTIO_ID_BLOCK: u32 = 2;

/// Shared directories, each with its tag and a link to its device.
const SHARES: &str = "/sys/fs/virtiofs";

/// Whether the device in `slot` is the shared directory with this tag.
pub fn is_share(slot: u32, tag: &str) -> bool {
    let Ok(device) = describe(slot) else { return false };
    let shares = std::fs::read_dir(SHARES).into_iter().flatten().flatten();
    shares.map(|share| share.path()).any(|share| {
        let linked = std::fs::read_link(share.join("device"));
        read(share.join("tag")).is_ok_and(|its| its == tag)
            && linked.is_ok_and(|linked| file_name(&linked) == device.name)
    })
}

fn name(slot: u32) -> Result<String, GuestError> {
    let name = format!("virtio-mmio.{slot}");
    if slot > MAX_SLOT || !Path::new(DEVICES).join(&name).exists() {
        return Err(GuestError::NotFound(format!("slot {slot} does not exist")));
    }
    Ok(name)
}

fn describe(slot: u32) -> Result<Device, GuestError> {
    let directory = Path::new(DEVICES).join(name(slot)?);
    let mut device = Device { slot, ..Device::default() };
    let Some(virtio) = child(&directory, "virtio") else { return Ok(device) };
    device.name = file_name(&virtio);
    device.virtio_id =
        u32::from_str_radix(read(virtio.join("device"))?.trim_start_matches("0x"), 16).unwrap_or(0);
    let interface = ["block", "net"].iter().find_map(|class| child(&virtio.join(class), ""));
    device.interface = interface.map(|path| file_name(&path)).unwrap_or_default();
    Ok(device)
}

/// The first entry of `directory` that begins with `prefix`.
fn child(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let mut entries = fs::read_dir(directory).ok()?.flatten();
    entries
        .find(|entry| entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()))
        .map(|e| e.path())
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
