use serde::{Deserialize, Serialize};

use super::MemoryConfig;
use crate::SavedQueue;

/// The memory device in a snapshot. Unplugged blocks are holes in the saved memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryState {
    /// How it was set up.
    pub config: MemoryConfig,
    /// How many bytes the driver was asked to have plugged.
    pub requested_size: u64,
    /// Of each block, whether it is plugged.
    pub plugged: Vec<bool>,
    /// Its queue, if it was active.
    pub queues: Vec<SavedQueue>,
}
