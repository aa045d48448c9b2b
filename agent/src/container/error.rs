//! What can go wrong with a container.

use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::State;

/// Why a container operation failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The specification says something impossible. Nothing was changed.
    #[error("{field}: {reason}")]
    Invalid {
        /// The member at fault, as a path in `config.json`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The specification asks for what this runtime or the guest's kernel does not do. Nothing was changed.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// The member at fault, as a path in `config.json`.
        field: String,
        /// Why it is not honoured.
        reason: String,
    },
    /// Applying a member of the specification failed. What had been made was undone.
    #[error("{field}: {action}")]
    Apply {
        /// The member at fault, as a path in `config.json`.
        field: String,
        /// What was tried.
        action: String,
        /// Why the kernel refused.
        source: io::Error,
    },
    /// The program could not be executed.
    #[error("process.args: can not execute {program}")]
    Exec {
        /// The program as the specification names it.
        program: String,
        /// ENOENT: not found; EACCES: not executable.
        source: io::Error,
    },
    /// The id is taken.
    #[error("{0} exists")]
    Exists(String),
    /// There is no such container.
    #[error("no container {0}")]
    NoContainer(String),
    /// There is no such process in the container, or it has ended.
    #[error("no process {process} in container {container}")]
    NoProcess {
        /// The container's id.
        container: String,
        /// The exec's id, empty for the init process.
        process: String,
    },
    /// The process has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The object is in a state that does not allow the operation.
    #[error("{id} is {actual}")]
    State {
        /// The container's or exec's id.
        id: String,
        /// What it is.
        actual: State,
    },
    /// A system call failed that should not.
    #[error("{action}")]
    System {
        /// What was tried.
        action: String,
        /// Why the kernel refused.
        source: io::Error,
    },
    /// The helper that sets a process up ended without a word, e.g. because it was killed.
    #[error("the set-up of the process ended early")]
    HelperGone,
}

impl Error {
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Invalid { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Unsupported { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let action = action.into();
        move |source| Error::System { action, source }
    }

    pub(crate) fn apply(
        field: impl Into<String>,
        action: impl Into<String>,
    ) -> impl FnOnce(io::Error) -> Error {
        let (field, action) = (field.into(), action.into());
        move |source| Error::Apply { field, action, source }
    }
}

/// An [`Error`] on its way from the helper to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Failure {
    Invalid { field: String, reason: String },
    Unsupported { field: String, reason: String },
    Apply { field: String, action: String, errno: i32 },
    Exec { program: String, errno: i32 },
    System { action: String, errno: i32 },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let errno = |source: &io::Error| source.raw_os_error().unwrap_or(libc::EIO);
        match error {
            Error::Invalid { field, reason } => Failure::Invalid { field, reason },
            Error::Unsupported { field, reason } => Failure::Unsupported { field, reason },
            Error::Apply { field, action, source } => Failure::Apply { field, action, errno: errno(&source) },
            Error::Exec { program, source } => Failure::Exec { program, errno: errno(&source) },
            Error::System { action, source } => Failure::System { action, errno: errno(&source) },
            other => Failure::System { action: other.to_string(), errno: libc::EPROTO },
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        let source = io::Error::from_raw_os_error;
        match failure {
            Failure::Invalid { field, reason } => Error::Invalid { field, reason },
            Failure::Unsupported { field, reason } => Error::Unsupported { field, reason },
            Failure::Apply { field, action, errno } => Error::Apply { field, action, source: source(errno) },
            Failure::Exec { program, errno } => Error::Exec { program, source: source(errno) },
            Failure::System { action, errno } => Error::System { action, source: source(errno) },
        }
    }
}
