//! The register map (VIRTIO 1.3, section 4.2.2).

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

/// `MagicValue`: "virt".
pub(super) const MAGIC: u32 = 0x7472_6976;
/// `Version`: not the legacy interface.
pub(super) const VERSION: u32 = 2;
/// `VendorID`: none in particular.
pub(super) const VENDOR: u32 = 0;
/// Where the device's own configuration space starts.
pub(super) const CONFIG: u64 = 0x100;
/// Offset of the register by which the driver notifies a queue; KVM watches it.
pub const QUEUE_NOTIFY: u64 = 0x050;

/// The registers by their offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Constant that says virtio.
    MagicValue,
    /// Version of the interface.
    Version,
    /// Kind of device; 0 for none.
    DeviceId,
    /// Vendor.
    VendorId,
    /// Offered features, the word that was selected.
    DeviceFeatures,
    /// Which word.
    DeviceFeaturesSel,
    /// Accepted features, the word that was selected.
    DriverFeatures,
    /// Which word.
    DriverFeaturesSel,
    /// The queue that the following registers are about.
    QueueSel,
    /// The largest size of the queue; 0 when there is no such queue.
    QueueSizeMax,
    /// Its size.
    QueueSize,
    /// Whether it is in use.
    QueueReady,
    /// Notifies a queue.
    QueueNotify,
    /// Why the device interrupted.
    InterruptStatus,
    /// Says that it was handled.
    InterruptAck,
    /// Device status; 0 written resets.
    Status,
    /// Descriptor table address.
    QueueDescLow,
    /// Its upper half.
    QueueDescHigh,
    /// Available ring address.
    QueueDriverLow,
    /// Its upper half.
    QueueDriverHigh,
    /// Used ring address.
    QueueDeviceLow,
    /// Its upper half.
    QueueDeviceHigh,
    /// Selects a shared memory region.
    ShmSel,
    /// Its length and base: all ones, as no device has one.
    Shm,
    /// Changes whenever the configuration space does.
    ConfigGeneration,
}

impl Register {
    /// The register at `offset`, when there is one.
    #[must_use]
    pub fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x000 => Self::MagicValue,
            0x004 => Self::Version,
            0x008 => Self::DeviceId,
            0x00c => Self::VendorId,
            0x010 => Self::DeviceFeatures,
            0x014 => Self::DeviceFeaturesSel,
            0x020 => Self::DriverFeatures,
            0x024 => Self::DriverFeaturesSel,
            0x030 => Self::QueueSel,
            0x034 => Self::QueueSizeMax,
            0x038 => Self::QueueSize,
            0x044 => Self::QueueReady,
            QUEUE_NOTIFY => Self::QueueNotify,
            0x060 => Self::InterruptStatus,
            0x064 => Self::InterruptAck,
            0x070 => Self::Status,
            0x080 => Self::QueueDescLow,
            0x084 => Self::QueueDescHigh,
            0x090 => Self::QueueDriverLow,
            0x094 => Self::QueueDriverHigh,
            0x0a0 => Self::QueueDeviceLow,
            0x0a4 => Self::QueueDeviceHigh,
            0x0ac => Self::ShmSel,
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => Self::Shm,
            0x0fc => Self::ConfigGeneration,
            _ => return None,
        })
    }
}

bitflags! {
    /// The device status field (VIRTIO 1.3, section 2.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct Status: u32 {
        /// The driver has seen the device.
        const ACKNOWLEDGE = 1;
        /// The driver knows how to drive it.
        const DRIVER = 2;
        /// The driver is set up.
        const DRIVER_OK = 4;
        /// The driver has accepted features.
        const FEATURES_OK = 8;
        /// The device cannot go on.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }
}
