//! Status codes of the modules' errors.

use std::error::Error;
use std::fmt::Write as _;

use tonic::{Code, Status};

use crate::container;
use crate::guest::GuestError;
use crate::network::NetworkError;
use crate::oci::ParseError;
use crate::pod::PodError;
use crate::ring::Gap;
use crate::storage::StorageError;
use crate::task::Panicked;
use crate::transfer::TransferError;

/// An error's text with those of all its sources.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}

pub(super) fn status(code: Code, error: &dyn Error) -> Status {
    Status::new(code, chain(error))
}

impl From<Panicked> for Status {
    fn from(error: Panicked) -> Status {
        status(Code::Internal, &error)
    }
}

impl From<GuestError> for Status {
    fn from(error: GuestError) -> Status {
        let code = match &error {
            GuestError::Invalid(_) => Code::InvalidArgument,
            GuestError::NotFound(_) => Code::NotFound,
            GuestError::Precondition(_) => Code::FailedPrecondition,
            GuestError::Unsupported(_) => Code::Unimplemented,
            GuestError::File { source, .. } => of_system(source),
        };
        status(code, &error)
    }
}

impl From<ParseError> for Status {
    fn from(error: ParseError) -> Status {
        status(Code::InvalidArgument, &error)
    }
}

impl From<container::Error> for Status {
    fn from(error: container::Error) -> Status {
        use container::Error;
        let code = match &error {
            Error::Invalid { .. } | Error::Parse(_) | Error::Unsupported { .. } => Code::InvalidArgument,
            Error::Exec { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT) => Code::NotFound,
                _ => Code::FailedPrecondition,
            },
            Error::Exists(_) => Code::AlreadyExists,
            Error::NoContainer(_) | Error::NoProcess { .. } => Code::NotFound,
            Error::Hook { .. } | Error::NoTerminal | Error::State { .. } => Code::FailedPrecondition,
            Error::Apply { source, .. } | Error::System { source, .. } => of_system(source),
            Error::HelperGone => Code::Internal,
        };
        status(code, &error)
    }
}

impl From<StorageError> for Status {
    fn from(error: StorageError) -> Status {
        if let StorageError::Device(inner) = error {
            return inner.into();
        }
        let code = match &error {
            StorageError::Invalid { .. } => Code::InvalidArgument,
            StorageError::Exists(_) => Code::AlreadyExists,
            StorageError::NotFound(_) => Code::NotFound,
            StorageError::Busy(_) | StorageError::Device(_) => Code::FailedPrecondition,
            StorageError::Limit => Code::ResourceExhausted,
            StorageError::Io { source, .. } => of_system(source),
        };
        status(code, &error)
    }
}

impl From<NetworkError> for Status {
    fn from(error: NetworkError) -> Status {
        let code = match &error {
            NetworkError::Invalid { .. } => Code::InvalidArgument,
            NetworkError::NoInterface(_) => Code::NotFound,
            NetworkError::Io { source, .. } => of_system(source),
            NetworkError::Netlink { .. } => Code::Internal,
        };
        status(code, &error)
    }
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Status {
        let code = match &error {
            PodError::Invalid { .. } => Code::InvalidArgument,
            PodError::Io { source, .. } => of_system(source),
        };
        status(code, &error)
    }
}

impl From<TransferError> for Status {
    fn from(error: TransferError) -> Status {
        let code = match &error {
            TransferError::Invalid { .. } => Code::InvalidArgument,
            TransferError::NotFound(_) => Code::NotFound,
            TransferError::Limit => Code::ResourceExhausted,
            TransferError::Protocol(_) | TransferError::Connect { .. } => Code::FailedPrecondition,
            TransferError::File { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT) => Code::NotFound,
                Some(libc::ENOTDIR | libc::EISDIR | libc::ELOOP | libc::EXDEV | libc::ENAMETOOLONG) => {
                    Code::InvalidArgument
                }
                Some(libc::EROFS) => Code::FailedPrecondition,
                _ => of_system(source),
            },
        };
        status(code, &error)
    }
}

fn of_system(error: &std::io::Error) -> Code {
    if out_of_resources(error) { Code::ResourceExhausted } else { Code::Internal }
}

impl From<Gap> for Status {
    fn from(gap: Gap) -> Status {
        status(Code::OutOfRange, &gap)
    }
}

/// The guest is out of memory, space, descriptors or processes.
pub(super) fn out_of_resources(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOMEM | libc::ENOSPC | libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::EDQUOT)
    )
}
