use caisson_vmm_api::devices::RngConfig;
use serde::{Deserialize, Serialize};

use super::{Entropy, Rng, RngError};
use crate::{Persist, StateMismatch};

/// The entropy device in a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RngState {
    /// How it was set up.
    pub config: RngConfig,
}

/// There is nothing in it but the configuration: no entropy outlives a snapshot.
impl<E: Entropy> Persist for Rng<E> {
    type State = RngState;
    type Resources = E;
    type Error = RngError;

    fn state(&self) -> RngState {
        RngState { config: self.config }
    }

    fn check(_: &RngState, _: &E) -> Result<(), StateMismatch> {
        Ok(())
    }

    fn from_state(state: &RngState, entropy: E) -> Result<Self, RngError> {
        Self::new(state.config, entropy)
    }
}
