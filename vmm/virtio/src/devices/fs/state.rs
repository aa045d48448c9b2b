use caisson_vmm_api::devices::FsConfig;
use serde::{Deserialize, Serialize};

use crate::SavedQueue;

/// A shared directory in a snapshot, which can only be taken while the guest has it not mounted: what a guest holds
/// of a mounted one are descriptors, and those are not in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// As it was made.
    pub config: FsConfig,
    /// The queues of an active device.
    pub queues: Vec<SavedQueue>,
}
