use caisson_vmm_api::devices::RngConfig;
use serde::{Deserialize, Serialize};

use crate::SavedQueue;

/// The entropy device in a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RngState {
    /// How it was set up.
    pub config: RngConfig,
    /// Its queue, if it was active. A request that waits for the rate limiter is still in it.
    pub queues: Vec<SavedQueue>,
}
