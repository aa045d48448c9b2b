//! What can go wrong with a container.

use std::io;

use thiserror::Error;

use super::State;
use crate::oci::ParseError;

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
    /// The specification can not be read. Nothing was changed.
    #[error("the specification")]
    Parse(#[from] ParseError),
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
    /// A hook of the specification failed, or took longer than it may. The container has ended.
    #[error("{field}: {reason}")]
    Hook {
        /// The hook, as a path in `config.json`.
        field: String,
        /// What became of it.
        reason: String,
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
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Failure {
    #[prost(enumeration = "Kind", tag = "1")]
    kind: i32,
    /// The member at fault, or the program.
    #[prost(string, tag = "2")]
    what: String,
    /// The reason, or the action that failed.
    #[prost(string, tag = "3")]
    text: String,
    #[prost(int32, tag = "4")]
    errno: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
enum Kind {
    System = 0,
    Invalid = 1,
    Unsupported = 2,
    Apply = 3,
    Exec = 4,
    Hook = 5,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let failure = |kind: Kind, what, text, errno| Failure { kind: kind.into(), what, text, errno };
        let errno = |source: &io::Error| source.raw_os_error().unwrap_or(libc::EIO);
        let none = String::new;
        match error {
            Error::Invalid { field, reason } => failure(Kind::Invalid, field, reason, 0),
            Error::Unsupported { field, reason } => failure(Kind::Unsupported, field, reason, 0),
            Error::Apply { field, action, source } => failure(Kind::Apply, field, action, errno(&source)),
            Error::Hook { field, reason } => failure(Kind::Hook, field, reason, 0),
            Error::Exec { program, source } => failure(Kind::Exec, program, none(), errno(&source)),
            Error::System { action, source } => failure(Kind::System, none(), action, errno(&source)),
            other => failure(Kind::System, none(), other.to_string(), libc::EPROTO),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        let kind = failure.kind();
        let Failure { what, text, errno, .. } = failure;
        let source = io::Error::from_raw_os_error(errno);
        match kind {
            Kind::Invalid => Error::Invalid { field: what, reason: text },
            Kind::Unsupported => Error::Unsupported { field: what, reason: text },
            Kind::Apply => Error::Apply { field: what, action: text, source },
            Kind::Exec => Error::Exec { program: what, source },
            Kind::Hook => Error::Hook { field: what, reason: text },
            Kind::System => Error::System { action: text, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_the_way_from_the_helper() {
        let source = || io::Error::from_raw_os_error(libc::EPERM);
        for error in [
            Error::invalid("a", "b"),
            Error::unsupported("a", "b"),
            Error::apply("a", "b")(source()),
            Error::system("b")(source()),
            Error::Hook { field: "a".to_owned(), reason: "b".to_owned() },
            Error::Exec { program: "a".to_owned(), source: source() },
        ] {
            let text = format!("{error:?}");
            assert_eq!(format!("{:?}", Error::from(Failure::from(error))), text);
        }
    }
}
