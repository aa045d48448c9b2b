use serde::{Deserialize, Serialize};

use super::Status;
use crate::SavedQueue;

/// A transport in a snapshot, with its device's queues. The rest of the device is its own
/// [`Persist::State`](crate::Persist::State).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status.
    pub status: Status,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues: as the driver has set them up so far, or as an active device has come to use them.
    pub queues: Vec<SavedQueue>,
    /// The device had been activated.
    pub active: bool,
}

/// A saved transport that does not fit the device it is to be restored to.
#[derive(Debug, thiserror::Error)]
pub enum TransportStateError {
    /// The number of queues differs.
    #[error("the snapshot has {got} queues, the device {expected}")]
    QueueCount {
        /// The device's.
        expected: usize,
        /// The snapshot's.
        got: usize,
    },
    /// A queue is impossible.
    #[error("queue {index}")]
    Queue {
        /// Which.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// A queue is larger than the device allows, or lies outside guest memory.
    #[error("queue {0} does not fit the device or guest memory")]
    QueueInvalid(usize),
    /// Features were accepted that the device does not offer.
    #[error("features {0:#x} are not offered by this device")]
    Features(u64),
    /// The device was active, but its driver had not got that far: it could change queues that are in use.
    #[error("the device was active with status {0:?}")]
    Status(Status),
    /// The device refused.
    #[error("activating the device")]
    Activate(#[source] crate::ActivateError),
}
