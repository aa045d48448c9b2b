use std::os::fd::OwnedFd;

use caisson_vmm_api::devices::NetConfig;
use serde::{Deserialize, Serialize};

use super::{Net, NetError, Tap};
use crate::{Persist, StateMismatch};

/// A network card in a snapshot. Frames that were on their way are not in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// As it was made.
    pub config: NetConfig,
}

/// What a network card is restored on.
pub struct NetResources {
    /// Its options. Those that the guest has not seen may be others than they were.
    pub config: NetConfig,
    /// The tap device that takes the place of the one it had.
    pub tap: OwnedFd,
}

impl Persist for Net<Tap> {
    type State = NetState;
    type Resources = NetResources;
    type Error = NetError;

    fn state(&self) -> NetState {
        NetState { config: self.config.clone() }
    }

    fn check(state: &NetState, resources: &NetResources) -> Result<(), StateMismatch> {
        StateMismatch::check("net.mac", state.config.mac, resources.config.mac)?;
        StateMismatch::check("net.mtu", state.config.mtu, resources.config.mtu)
    }

    fn from_state(_: &NetState, resources: NetResources) -> Result<Self, NetError> {
        Self::new(resources.config, resources.tap)
    }
}
