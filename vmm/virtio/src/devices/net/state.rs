use caisson_vmm_api::devices::NetConfig;
use serde::{Deserialize, Serialize};

use crate::SavedQueue;

/// A network card in a snapshot. Frames that were on their way are not in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// As it was made.
    pub config: NetConfig,
    /// The queues of an active card: receive, transmit.
    pub queues: Vec<SavedQueue>,
}
