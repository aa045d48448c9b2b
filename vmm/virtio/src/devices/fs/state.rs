use std::{os::fd::OwnedFd, sync::Arc};

use caisson_vmm_api::devices::FsConfig;
use serde::{Deserialize, Serialize};

use super::{Fs, FsError, Workers};
use crate::{Persist, StateMismatch};

/// A shared directory in a snapshot, which can only be taken while the guest has it not mounted: what a guest holds
/// of a mounted one are descriptors, and those are not in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// As it was made.
    pub config: FsConfig,
}

/// What a shared directory is restored on.
pub struct FsResources {
    /// Its options. Those that the guest has not seen may be others than they were.
    pub config: FsConfig,
    /// The directory, opened again.
    pub root: OwnedFd,
    /// What serves it.
    pub workers: Arc<Workers>,
}

impl Persist for Fs {
    type State = FsState;
    type Resources = FsResources;
    type Error = FsError;

    fn state(&self) -> FsState {
        FsState { config: self.config.clone() }
    }

    fn check(state: &FsState, resources: &FsResources) -> Result<(), StateMismatch> {
        let (saved, now) = (&state.config, &resources.config);
        StateMismatch::check("fs.tag", &saved.tag, &now.tag)?;
        StateMismatch::check("fs.queues", saved.queue_count(), now.queue_count())
    }

    fn from_state(_: &FsState, resources: FsResources) -> Result<Self, FsError> {
        Self::new(resources.config, resources.root, resources.workers)
    }
}
