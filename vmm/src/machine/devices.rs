//! Making devices for slots, from their configuration or from their saved state.

use std::{os::fd::OwnedFd, sync::Arc};

use caisson_virtio::{
    VirtioDevice,
    devices::{
        DeviceState,
        balloon::Balloon,
        block::{Block, BlockError, BlockState},
        fs::{Fs, FsError, FsState},
        mem::{MemoryConfig, MemoryDevice, MemoryError},
        net::{Net, NetError, NetState},
        rng::{HostEntropy, Rng, RngError},
        vsock::{HostEnd, Vsock, VsockError},
    },
    memory::GuestRam,
};
use caisson_vmm_api::devices::{BalloonConfig, BlockConfig, FsConfig, NetConfig, RngConfig, VsockConfig};
use kvm_ioctls::VmFd;

use super::memory_blocks::{HostRegion, KvmBlocks};
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
    Balloon(#[source] std::io::Error),
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
    /// A saved memory device over something else than the machine's hotpluggable memory.
    #[error("the snapshot's memory device is not over the machine's hotpluggable memory")]
    OtherMemory,
    /// An option that the guest has seen is not what it was.
    #[error("{0} is not what it was when the machine was saved")]
    Changed(&'static str),
    /// What was saved is another kind of device than what is to be restored.
    #[error("the snapshot has another kind of device in this slot")]
    WrongKind,
}

/// What devices get from the machine itself.
pub(super) struct Workshop<'a> {
    pub(super) vm: &'a Arc<VmFd>,
    pub(super) ram: &'a Arc<GuestRam>,
    pub(super) shares: &'a Shares,
}

impl Workshop<'_> {
    /// Makes a new device.
    pub(super) fn make(&self, device: OpenDevice) -> Result<Box<dyn VirtioDevice>, DeviceBuildError> {
        Ok(match device {
            OpenDevice::Rng(config) => Box::new(Rng::new(config, HostEntropy)?),
            OpenDevice::Balloon(config) => {
                Box::new(Balloon::new(config, self.ram.clone()).map_err(DeviceBuildError::Balloon)?)
            }
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
        Ok(match (state, device) {
            (DeviceState::Rng(state), None) => Box::new(Rng::from_state(state, HostEntropy)?),
            (DeviceState::Balloon(state), None) => {
                Box::new(Balloon::from_state(state, self.ram.clone()).map_err(DeviceBuildError::Balloon)?)
            }
            (DeviceState::Mem(state), None) => {
                let expected =
                    MemoryConfig { requested_size: state.config.requested_size, ..self.memory_config()? };
                if state.config != expected {
                    return Err(DeviceBuildError::OtherMemory);
                }
                Box::new(MemoryDevice::from_state(state, self.blocks()?)?)
            }
            (DeviceState::Block(state), Some(OpenDevice::Block(config, files))) => {
                check_block(&state.config, &config)?;
                Box::new(Block::from_state(
                    BlockState { config, ..state.clone() },
                    files,
                    confine_block_thread,
                )?)
            }
            (DeviceState::Net(state), Some(OpenDevice::Net(config, tap))) => {
                check_net(&state.config, &config)?;
                Box::new(Net::from_state(NetState { config, ..state.clone() }, tap)?)
            }
            // Every machine from a template has an address of its own.
            (DeviceState::Vsock(state), Some(OpenDevice::Vsock(config, host))) => {
                Box::new(Vsock::from_state(state, config, host)?)
            }
            (DeviceState::Fs(state), Some(OpenDevice::Fs(config, directory))) => {
                check_fs(&state.config, &config)?;
                let (root, workers) = self.shares.serve(directory).map_err(DeviceBuildError::Share)?;
                Box::new(Fs::from_state(FsState { config, ..state.clone() }, root, workers)?)
            }
            _ => return Err(DeviceBuildError::WrongKind),
        })
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

/// Refuses a restored device on which something is not as the guest has seen it.
fn unchanged<T: PartialEq>(option: &'static str, saved: T, now: T) -> Result<(), DeviceBuildError> {
    if saved == now { Ok(()) } else { Err(DeviceBuildError::Changed(option)) }
}

fn check_block(saved: &BlockConfig, now: &BlockConfig) -> Result<(), DeviceBuildError> {
    unchanged("block.id", &saved.id, &now.id)?;
    unchanged("block.read_only", saved.read_only, now.read_only)?;
    unchanged("block.cache", saved.cache, now.cache)?;
    unchanged("block.queues", saved.queue_count(), now.queue_count())
}

fn check_net(saved: &NetConfig, now: &NetConfig) -> Result<(), DeviceBuildError> {
    unchanged("net.mac", saved.mac, now.mac)?;
    unchanged("net.mtu", saved.mtu, now.mtu)
}

fn check_fs(saved: &FsConfig, now: &FsConfig) -> Result<(), DeviceBuildError> {
    unchanged("fs.tag", &saved.tag, &now.tag)?;
    unchanged("fs.queues", saved.queue_count(), now.queue_count())
}

/// What is plugged at once: 2 MiB.
const BLOCK_SIZE: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_vmm_api::{devices::Bucket, devices::CachePolicy, devices::IoEngine, devices::RateLimits};

    #[test]
    fn what_the_guest_has_seen_of_a_restored_device_stays() {
        let saved = BlockConfig { id: "disk".into(), queues: 1, ..BlockConfig::default() };
        let rate_limits =
            RateLimits { bytes: Some(Bucket { size: 1, refill_ms: 1, initial_burst: 0 }), operations: None };
        let policy = BlockConfig { engine: IoEngine::IoUring, rate_limits, queues: 0, ..saved.clone() };
        check_block(&saved, &policy).unwrap();
        for (changed, option) in [
            (BlockConfig { id: String::new(), ..saved.clone() }, "block.id"),
            (BlockConfig { read_only: true, ..saved.clone() }, "block.read_only"),
            (BlockConfig { queues: 2, ..saved.clone() }, "block.queues"),
        ] {
            assert!(check_block(&saved, &changed).unwrap_err().to_string().starts_with(option));
        }
        let saved = FsConfig { tag: "share".into(), ..FsConfig::default() };
        check_fs(&saved, &FsConfig { read_only: true, cache: CachePolicy::Never, ..saved.clone() }).unwrap();
        assert!(check_fs(&saved, &FsConfig::default()).is_err());
    }
}
