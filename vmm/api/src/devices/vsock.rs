//! Options of a socket device.

use serde::{Deserialize, Serialize};

/// What a vsock device is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address: 3 or more.
    pub guest_cid: u32,
}
