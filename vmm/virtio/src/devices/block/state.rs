use std::os::fd::OwnedFd;

use caisson_vmm_api::devices::BlockConfig;
use serde::{Deserialize, Serialize};

use super::{Block, BlockError};
use crate::{Persist, StateMismatch, ThreadSetup};

/// A disk in a snapshot. Its files are not in it: whoever restores opens them again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// As it was made.
    pub config: BlockConfig,
    /// Its size in sectors of 512 bytes; the files must still be of that size.
    pub capacity: u64,
}

/// What a disk is restored on.
pub struct BlockResources {
    /// Its options. Those that the guest has not seen may be others than they were.
    pub config: BlockConfig,
    /// Its files, opened again.
    pub files: Vec<OwnedFd>,
    /// With which its thread begins.
    pub setup: ThreadSetup,
}

impl Persist for Block {
    type State = BlockState;
    type Resources = BlockResources;
    type Error = BlockError;

    fn state(&self) -> BlockState {
        BlockState { config: self.config.clone(), capacity: self.capacity_sectors() }
    }

    fn check(state: &BlockState, resources: &BlockResources) -> Result<(), StateMismatch> {
        let (saved, now) = (&state.config, &resources.config);
        StateMismatch::check("block.id", &saved.id, &now.id)?;
        StateMismatch::check("block.read_only", saved.read_only, now.read_only)?;
        StateMismatch::check("block.cache", saved.cache, now.cache)?;
        StateMismatch::check("block.queues", saved.queue_count(), now.queue_count())
    }

    fn from_state(state: &BlockState, resources: BlockResources) -> Result<Self, BlockError> {
        let block = Self::new(resources.config, resources.files, resources.setup)?;
        let now = block.capacity_sectors();
        if now == state.capacity {
            Ok(block)
        } else {
            Err(BlockError::CapacityChanged { saved: state.capacity, now })
        }
    }
}
