use caisson_vmm_api::devices::BalloonConfig;
use serde::{Deserialize, Serialize};

use crate::SavedQueue;

/// The balloon in a snapshot. The pages in it are holes in the saved memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BalloonState {
    /// How it was set up.
    pub config: BalloonConfig,
    /// The size that the driver was asked for, in pages of 4 KiB.
    pub target_pages: u32,
    /// The size that the driver reported.
    pub actual_pages: u32,
    /// The statistics buffer that the device holds, by its head.
    pub statistics_head: Option<u16>,
    /// Its queues, if it was active.
    pub queues: Vec<SavedQueue>,
}
