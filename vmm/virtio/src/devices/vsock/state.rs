//! The saved state of a vsock device.

use serde::{Deserialize, Serialize};

use crate::SavedQueue;

/// What outlives a snapshot: the queues, and nothing of the connections.
///
/// The other end of every connection stays behind with the machine that was saved, so the restored guest is
/// told to forget them all (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET). The guest's address is the configuration's:
/// the guest reads it again at that event, so clones of one snapshot may have one each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The queues of an active device; empty otherwise.
    pub queues: Vec<SavedQueue>,
}
