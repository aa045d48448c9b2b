use std::sync::Arc;

use caisson_vmm_api::devices::BalloonConfig;
use serde::{Deserialize, Serialize};

use super::Balloon;
use crate::{Persist, StateMismatch, memory::Discard, queue::Head};

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
}

impl Persist for Balloon {
    type State = BalloonState;
    type Resources = Arc<dyn Discard>;
    type Error = std::io::Error;

    fn state(&self) -> BalloonState {
        BalloonState {
            config: self.config,
            target_pages: self.target_pages,
            actual_pages: self.actual_pages,
            statistics_head: self.statistics_head.as_ref().map(Head::index),
        }
    }

    fn check(_: &BalloonState, _: &Arc<dyn Discard>) -> Result<(), StateMismatch> {
        Ok(())
    }

    fn from_state(state: &BalloonState, discard: Arc<dyn Discard>) -> std::io::Result<Self> {
        let mut balloon = Self::new(state.config, discard)?;
        balloon.target_pages = state.target_pages;
        balloon.actual_pages = state.actual_pages;
        balloon.statistics_head = state.statistics_head.map(Head::restored);
        Ok(balloon)
    }
}
