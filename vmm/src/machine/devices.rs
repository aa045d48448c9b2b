//! Making devices for slots, from their configuration or from their saved state.

use std::{os::fd::OwnedFd, sync::Arc};

use caisson_virtio::{
    Persist, RestoreError, StateMismatch, VirtioDevice,
    devices::{
        balloon::Balloon,
        block::{Block, BlockError, BlockResources},
        fs::{Fs, FsError, FsResources},
        mem::{MemoryConfig, MemoryDevice, MemoryError, MemoryResources},
        net::{Net, NetError, NetResources},
        rng::{HostEntropy, Rng, RngError},
        vsock::{HostEnd, Vsock, VsockError, VsockResources},
    },
    memory::GuestRam,
};
use caisson_vmm_api::devices::{BalloonConfig, BlockConfig, FsConfig, NetConfig, RngConfig, VsockConfig};
use kvm_ioctls::VmFd;

use super::{
    kinds::DeviceState,
    memory_blocks::{HostRegion, KvmBlocks},
};
use crate::{jail, machine::shares::Shares, seccomp::Thread};

/// A device that can be made: its configuration, with everything that it needs from the host open.
pub enum OpenDevice {
    /// Entropy source.
    Rng(RngConfig),
    /// Memory balloon.
    Balloon(BalloonConfig),
    /// Disk, with its files.
    Block(BlockConfig, Vec<OwnedFd>),
    /// Network card, with its tap device.
    Net(NetConfig, OwnedFd),
    /// Socket device, with its host's end.
    Vsock(VsockConfig, HostEnd),
    /// Shared directory; without one the jail's own.
    Fs(FsConfig, Option<OwnedFd>),
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceBuildError {
    /// Entropy source.
    #[error("entropy source")]
    Rng(#[from] RngError),
    /// Balloon.
    #[error("balloon")]
    Balloon(#[from] std::io::Error),
    /// Disk.
    #[error("disk")]
    Block(#[from] BlockError),
    /// Network card.
    #[error("network card")]
    Net(#[from] NetError),
    /// Socket device.
    #[error("socket device")]
    Vsock(#[from] VsockError),
    /// Shared directory.
    #[error("shared directory")]
    Fs(#[from] FsError),
    /// A shared directory that cannot be served here.
    #[error("shared directory")]
    Share(#[source] std::io::Error),
    /// Memory device.
    #[error("memory device")]
    Mem(#[from] MemoryError),
    /// The machine has no address space for it.
    #[error("the machine was made without hotpluggable memory")]
    NoHotplugMemory,
    /// A restored device is not as its guest knows it.
    #[error(transparent)]
    Mismatch(#[from] StateMismatch),
    /// What was saved is another kind of device than what is to be restored.
    #[error("the snapshot has another kind of device in this slot")]
    WrongKind,
}

/// Makes devices from their options and their open files, on what the machine itself gives them.
pub(super) struct DeviceFactory<'a> {
    pub(super) vm: &'a Arc<VmFd>,
    pub(super) ram: &'a Arc<GuestRam>,
    pub(super) shares: &'a Shares,
}

impl DeviceFactory<'_> {
    /// Makes a new device.
    pub(super) fn make(&self, device: OpenDevice) -> Result<Box<dyn VirtioDevice>, DeviceBuildError> {
        Ok(match device {
            OpenDevice::Rng(config) => Box::new(Rng::new(config, HostEntropy)?),
            OpenDevice::Balloon(config) => Box::new(Balloon::new(config, self.ram.clone())?),
            OpenDevice::Block(config, files) => Box::new(Block::new(config, files, confine_block_thread)?),
            OpenDevice::Net(config, tap) => Box::new(Net::new(config, tap)?),
            OpenDevice::Vsock(config, host) => Box::new(Vsock::new(config, host)?),
            OpenDevice::Fs(config, directory) => {
                let (root, workers) = self.shares.serve(directory).map_err(DeviceBuildError::Share)?;
                Box::new(Fs::new(config, root, workers)?)
            }
        })
    }

    /// Makes a device that goes on from `state`. Devices that need nothing from the host need no `device`.
    pub(super) fn restore(
        &self,
        state: &DeviceState,
        device: Option<OpenDevice>,
    ) -> Result<Box<dyn VirtioDevice>, DeviceBuildError> {
        match (state, device) {
            (DeviceState::Rng(state), None) => restored::<Rng>(state, HostEntropy),
            (DeviceState::Balloon(state), None) => restored::<Balloon>(state, self.ram.clone()),
            (DeviceState::Mem(state), None) => {
                let resources = MemoryResources { config: self.memory_config()?, blocks: self.blocks()? };
                restored::<MemoryDevice>(state, resources)
            }
            (DeviceState::Block(state), Some(OpenDevice::Block(config, files))) => {
                restored::<Block>(state, BlockResources { config, files, setup: confine_block_thread })
            }
            (DeviceState::Net(state), Some(OpenDevice::Net(config, tap))) => {
                restored::<Net>(state, NetResources { config, tap })
            }
            (DeviceState::Vsock(state), Some(OpenDevice::Vsock(config, host))) => {
                restored::<Vsock>(state, VsockResources { config, host })
            }
            (DeviceState::Fs(state), Some(OpenDevice::Fs(config, directory))) => {
                let (root, workers) = self.shares.serve(directory).map_err(DeviceBuildError::Share)?;
                restored::<Fs>(state, FsResources { config, root, workers })
            }
            // By name, so that a kind cannot be registered and left out here.
            (
                DeviceState::Rng(_)
                | DeviceState::Balloon(_)
                | DeviceState::Mem(_)
                | DeviceState::Block(_)
                | DeviceState::Net(_)
                | DeviceState::Vsock(_)
                | DeviceState::Fs(_),
                _,
            ) => Err(DeviceBuildError::WrongKind),
        }
    }

    /// Makes the memory device over the machine's hotpluggable range.
    pub(super) fn memory(&self) -> Result<Box<dyn VirtioDevice>, DeviceBuildError> {
        Ok(Box::new(MemoryDevice::new(self.memory_config()?, self.blocks()?)?))
    }

    fn memory_config(&self) -> Result<MemoryConfig, DeviceBuildError> {
        let range = self.ram.hotplug_range().ok_or(DeviceBuildError::NoHotplugMemory)?;
        Ok(MemoryConfig { start: range.start, size: range.len, block_size: BLOCK_SIZE, requested_size: 0 })
    }

    fn blocks(&self) -> Result<Arc<KvmBlocks>, DeviceBuildError> {
        let slot = self.ram.hotplug_slot().ok_or(DeviceBuildError::NoHotplugMemory)?;
        let first_slot = u32::try_from(self.ram.boot_slots().len()).unwrap_or_default();
        let region = HostRegion { guest: slot.guest, host: slot.host, len: slot.len, first_slot };
        // SAFETY: the range is one of the mappings of `ram`, which outlives the virtual machine (both belong
        // to the machine, and this device keeps the memory too). The machine itself uses only the slots
        // before.
        Ok(Arc::new(unsafe { KvmBlocks::new(self.vm.clone(), self.ram.clone(), region) }))
    }
}

/// The first thing that a disk's thread does.
fn confine_block_thread() {
    jail::confine_thread_or_abort(Thread::Block);
}

fn restored<D: Persist>(
    state: &D::State,
    resources: D::Resources,
) -> Result<Box<dyn VirtioDevice>, DeviceBuildError>
where
    DeviceBuildError: From<D::Error>,
{
    match D::restore(state, resources) {
        Ok(device) => Ok(Box::new(device)),
        Err(RestoreError::Mismatch(error)) => Err(error.into()),
        Err(RestoreError::Device(error)) => Err(error.into()),
    }
}

/// What is plugged at once: 2 MiB.
const BLOCK_SIZE: u64 = 2 << 20;
