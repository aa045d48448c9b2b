//! Why the pod did not do what it was asked to.

use std::io;
use std::path::PathBuf;

use tonic::Code;

use super::spec::SpecError;
use crate::bundle::BundleError;
use crate::cgroup::CgroupError;
use crate::config::ConfigError;
use crate::directory::DirectoryError;
use crate::journal::{CleanError, JournalError};
use crate::machine::MachineError;
use crate::network::NetworkError;
use crate::share::ShareError;
use crate::sizing::SizingError;
use crate::streams::ConnectError;

/// Why the pod did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// No such container or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}: already exists")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// What this runtime does not do.
    #[error("{0}")]
    Unimplemented(String),
    /// The bundle does not say what the container is.
    #[error("the bundle")]
    Bundle(#[from] BundleError),
    /// The configuration can't be given to a container in a guest.
    #[error("the container's configuration")]
    Spec(#[from] SpecError),
    /// The node's configuration, or the pod's annotations.
    #[error("the configuration")]
    Config(#[from] ConfigError),
    /// The pod's size.
    #[error("the pod's size")]
    Sizing(#[from] SizingError),
    /// The pod's directory.
    #[error("the pod's directory")]
    Directory(#[from] DirectoryError),
    /// The pod's record.
    #[error("the pod's record")]
    Journal(#[from] JournalError),
    /// The machine.
    #[error("the machine")]
    Machine(#[source] MachineError),
    /// The pod's control group.
    #[error("the pod's control group")]
    Cgroup(#[from] CgroupError),
    /// The pod's network.
    #[error("the pod's network")]
    Network(#[from] NetworkError),
    /// The pod's share.
    #[error("the pod's share")]
    Share(#[from] ShareError),
    /// Something of a container's stays in the pod's share.
    #[error("remove it from the pod's share")]
    Clean(#[from] CleanError),
    /// A process's streams.
    #[error("the process's streams")]
    Streams(#[from] ConnectError),
    /// The agent refused. Its own message says what it was about.
    #[error("{}", .0.message())]
    Agent(Box<tonic::Status>),
    /// A file of containerd's.
    #[error("{action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A task of this process ended without a result.
    #[error("a task of the shim broke")]
    Broken(#[from] tokio::task::JoinError),
}

impl From<MachineError> for PodError {
    fn from(error: MachineError) -> PodError {
        match error {
            MachineError::Agent(status) => PodError::Agent(status),
            error => PodError::Machine(error),
        }
    }
}

impl PodError {
    /// The status code that says what kind of failure it is.
    pub fn code(&self) -> Code {
        match self {
            PodError::NotFound(_) => Code::NotFound,
            PodError::Exists(_) => Code::AlreadyExists,
            PodError::State(_) => Code::FailedPrecondition,
            PodError::Invalid(_) | PodError::Bundle(_) | PodError::Spec(_) | PodError::Config(_) => {
                Code::InvalidArgument
            }
            PodError::Sizing(SizingError::TooMuchMemory { .. } | SizingError::BeyondGrowth { .. }) => {
                Code::ResourceExhausted
            }
            PodError::Sizing(_) => Code::InvalidArgument,
            PodError::Unimplemented(_) => Code::Unimplemented,
            PodError::Directory(DirectoryError::Owned(_)) => Code::AlreadyExists,
            PodError::Machine(MachineError::Silent { .. } | MachineError::Stuck { .. }) => {
                Code::DeadlineExceeded
            }
            PodError::Machine(MachineError::Gone { .. }) => Code::Unavailable,
            PodError::Streams(ConnectError::Scheme(_)) => Code::InvalidArgument,
            PodError::Agent(status) => status.code(),
            PodError::Network(
                NetworkError::HostNetwork | NetworkError::NotEthernet(_) | NetworkError::TooMany(_),
            )
            | PodError::Cgroup(CgroupError::Path(_)) => Code::InvalidArgument,
            PodError::Directory(_)
            | PodError::Cgroup(_)
            | PodError::Network(_)
            | PodError::Journal(_)
            | PodError::Machine(_)
            | PodError::Share(_)
            | PodError::Clean(_)
            | PodError::Streams(_)
            | PodError::Io { .. }
            | PodError::Broken(_) => Code::Internal,
        }
    }
}
