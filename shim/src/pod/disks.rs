//! Disks that come to a pod's machine, and leave it, while it runs.
//!
//! The machine's process holds a disk's file, so that a disk that is plugged when the machine ends is gone with it.

use std::os::fd::{AsFd, OwnedFd};

use caisson_protocol::client::call;
use caisson_protocol::v1;
use caisson_vmm_api::config::DeviceConfig;
use tokio::sync::Mutex;

use super::error::PodError;
use crate::{machine::Machine, share::RawDisk};

/// A block device's number, on the host or in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    /// What drives it.
    pub major: u32,
    /// Which one of those.
    pub minor: u32,
}

/// A block device that a container wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its number on the host.
    pub host: Number,
    /// Whether the container may only read it.
    pub read_only: bool,
}

/// The raw disks of a pod. Containers that want the same device in the same way have one disk, and so one cache in the
/// guest. One that is only to read has another disk than one that writes: the host keeps the guest from writing by it.
#[derive(Debug, Default)]
pub struct RawDisks(Mutex<Vec<Plugged>>);

#[derive(Debug)]
struct Plugged {
    wanted: Wanted,
    guest: Number,
    slot: u8,
    users: usize,
}

fn storage_id(slot: u8) -> String {
    format!("disk-{slot}")
}

/// Gives the machine a disk, and returns its slot once the guest has it.
///
/// # Errors
/// When no slot is free, and the VMM's and the agent's own; nothing is plugged then.
pub async fn plug(machine: &Machine, file: &OwnedFd, device: DeviceConfig) -> Result<u8, PodError> {
    let failed = |source| PodError::Io { action: "hand over", path: "a disk's descriptor".into(), source };
    let file = file.try_clone().map_err(failed)?;
    let (slot, _) = machine.control(move |vmm| vmm.plug(None, device, &[file.as_fd()])).await?;
    let request = v1::PlugDeviceRequest { slot: slot.into() };
    if let Err(error) = machine.answer(machine.agent().machine().plug_device(call(request))).await {
        // The guest has not taken it, so it does not have to let go.
        let undone = machine.control(move |vmm| vmm.unplug(slot, true)).await;
        if !machine.has_ended() {
            undone?;
        }
        return Err(error.into());
    }
    Ok(slot)
}

/// Takes a disk away that nothing in the guest uses any more.
///
/// # Errors
/// The agent's and the VMM's own. With the machine ended it is gone, and that is success.
pub async fn unplug(machine: &Machine, slot: u8) -> Result<(), PodError> {
    let request = v1::UnplugDeviceRequest { slot: slot.into() };
    let result = match machine.answer(machine.agent().machine().unplug_device(call(request))).await {
        Ok(_) => machine.control(move |vmm| vmm.unplug(slot, false)).await,
        Err(error) => Err(error),
    };
    if machine.has_ended() { Ok(()) } else { Ok(result?) }
}

impl RawDisks {
    /// Has the device in the guest, and returns its number there.
    ///
    /// # Errors
    /// When the host has no such device, or it can't be plugged.
    pub async fn take(&self, machine: &Machine, wanted: Wanted) -> Result<Number, PodError> {
        let mut plugged = self.0.lock().await;
        if let Some(there) = plugged.iter_mut().find(|plugged| plugged.wanted == wanted) {
            there.users += 1;
            return Ok(there.guest);
        }
        let Number { major, minor } = wanted.host;
        let disk =
            tokio::task::spawn_blocking(move || RawDisk::open(major, minor, wanted.read_only)).await??;
        let slot = plug(machine, &disk.file, disk.device()).await?;
        let storage = disk.storage(&storage_id(slot), slot.into());
        let request = v1::MountStorageRequest { storage: Some(storage) };
        match machine.answer(machine.agent().storages().mount_storage(call(request))).await {
            Ok(reply) => {
                let guest = Number { major: reply.major, minor: reply.minor };
                plugged.push(Plugged { wanted, guest, slot, users: 1 });
                Ok(guest)
            }
            Err(error) => {
                unplug(machine, slot).await?;
                Err(error.into())
            }
        }
    }

    /// One container less wants the device.
    ///
    /// # Errors
    /// When it stays plugged.
    pub async fn release(&self, machine: &Machine, wanted: Wanted) -> Result<(), PodError> {
        let mut plugged = self.0.lock().await;
        let Some(index) = plugged.iter().position(|plugged| plugged.wanted == wanted) else { return Ok(()) };
        let Some(there) = plugged.get_mut(index) else { return Ok(()) };
        there.users = there.users.saturating_sub(1);
        if there.users > 0 || machine.has_ended() {
            return Ok(());
        }
        let slot = there.slot;
        let request = v1::UnmountStorageRequest { id: storage_id(slot) };
        machine.answer(machine.agent().storages().unmount_storage(call(request))).await?;
        unplug(machine, slot).await?;
        plugged.remove(index);
        Ok(())
    }
}
