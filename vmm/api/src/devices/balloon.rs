//! Options of the balloon.

use serde::{Deserialize, Serialize};

/// How the balloon is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// The size that the driver is asked for from the start, in pages of 4 KiB.
    pub target_pages: u32,
    /// The driver may take pages back when the guest is short of memory.
    pub deflate_on_oom: bool,
    /// The driver reports free pages, which go back to the host at once.
    pub free_page_reporting: bool,
    /// The driver answers questions about the guest's memory.
    pub statistics: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { target_pages: 0, deflate_on_oom: true, free_page_reporting: true, statistics: true }
    }
}
