use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Blocks, MemoryConfig, MemoryDevice, MemoryError};
use crate::{Persist, StateMismatch};

/// The memory device in a snapshot. Unplugged blocks are holes in the saved memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryState {
    /// How it was set up.
    pub config: MemoryConfig,
    /// How many bytes the driver was asked to have plugged.
    pub requested_size: u64,
    /// Of each block, whether it is plugged.
    pub plugged: Vec<bool>,
}

/// What a memory device is restored on.
pub struct MemoryResources {
    /// The machine's hotpluggable range; its requested size is not looked at.
    pub config: MemoryConfig,
    /// The range's blocks in the machine.
    pub blocks: Arc<dyn Blocks>,
}

/// The blocks that were plugged are plugged again, with what the memory holds.
impl Persist for MemoryDevice {
    type State = MemoryState;
    type Resources = MemoryResources;
    type Error = MemoryError;

    fn state(&self) -> MemoryState {
        MemoryState {
            config: self.config,
            requested_size: self.requested_size,
            plugged: self.plugged.clone(),
        }
    }

    fn check(state: &MemoryState, resources: &MemoryResources) -> Result<(), StateMismatch> {
        let now = MemoryConfig { requested_size: state.config.requested_size, ..resources.config };
        StateMismatch::check("the hotpluggable memory", state.config, now)
    }

    fn from_state(state: &MemoryState, resources: MemoryResources) -> Result<Self, MemoryError> {
        state.config.check()?;
        // First, as memory is set aside for as many.
        let (expected, got) = (state.config.block_count()?, state.plugged.len());
        if expected != got {
            return Err(MemoryError::State { expected, got });
        }
        let mut device = Self::new(state.config, resources.blocks)?;
        state.config.check_requested(state.requested_size)?;
        device.requested_size = state.requested_size;
        device.plugged.clone_from(&state.plugged);
        for (start, len) in device.plugged_ranges(0, expected) {
            device.blocks.plug(start, len).map_err(MemoryError::Host)?;
            device.plugged_size += len;
        }
        Ok(device)
    }
}
