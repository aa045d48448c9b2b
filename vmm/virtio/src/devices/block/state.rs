use caisson_vmm_api::devices::BlockConfig;
use serde::{Deserialize, Serialize};

use crate::SavedQueue;

/// A disk in a snapshot. Its files are not in it: whoever restores opens them again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// As it was made.
    pub config: BlockConfig,
    /// Its size in sectors of 512 bytes; the files must still be of that size.
    pub capacity: u64,
    /// The queues of an active disk.
    pub queues: Vec<SavedQueue>,
}
