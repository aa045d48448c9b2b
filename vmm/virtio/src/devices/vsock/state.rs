use caisson_vmm_api::devices::VsockConfig;
use serde::{Deserialize, Serialize};

use super::{HostEnd, Vsock, VsockError};
use crate::{Persist, StateMismatch};

/// A socket device in a snapshot: nothing of it outlives one but its queues.
///
/// The other end of every connection stays behind with the machine that was saved, so the restored guest is
/// told to forget them all (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET). The guest's address is the configuration's:
/// the guest reads it again at that event, so clones of one snapshot may have one each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {}

/// What a socket device is restored on.
pub struct VsockResources {
    /// Its options, which may be others than they were.
    pub config: VsockConfig,
    /// Its sockets on the host's side, open.
    pub host: HostEnd,
}

impl Persist for Vsock {
    type State = VsockState;
    type Resources = VsockResources;
    type Error = VsockError;

    fn state(&self) -> VsockState {
        VsockState {}
    }

    fn check(_: &VsockState, _: &VsockResources) -> Result<(), StateMismatch> {
        Ok(())
    }

    fn from_state(_: &VsockState, resources: VsockResources) -> Result<Self, VsockError> {
        Self::new(resources.config, resources.host)
    }
}
