//! Why a machine has ended.

use serde::{Deserialize, Serialize};

/// Why a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest shut down.
    #[error("the guest powered off")]
    PowerOff,
    /// The guest asked to be started afresh.
    #[error("the guest asked for a reboot")]
    Reboot,
    /// The guest's init or kernel gave up.
    #[error("the guest panicked")]
    Panic,
    /// The guest's processor could not go on, which a kernel also uses as its last way to reset, after a panic
    /// for example: what led to it is on its console.
    #[error(
        "the guest's processor shut down (triple fault), as it also does when a kernel resets after a panic"
    )]
    TripleFault,
    /// KVM or the hardware could not go on.
    #[error("the machine failed: {0}")]
    Fault(String),
    /// Whoever controls the machine ended it.
    #[error("the machine was shut down from outside")]
    Stopped,
}

impl ExitReason {
    /// The process's exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Stopped => 0,
            Self::Reboot => 10,
            Self::Panic => 11,
            Self::TripleFault => 12,
            Self::Fault(_) => 13,
        }
    }
}
