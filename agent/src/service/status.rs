//! Status codes of the modules' errors.

use std::error::Error;
use std::fmt::Write as _;

use tonic::{Code, Status};

use crate::guest::GuestError;
use crate::ring::Gap;

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

impl From<GuestError> for Status {
    fn from(error: GuestError) -> Status {
        let code = match &error {
            GuestError::Invalid(_) => Code::InvalidArgument,
            GuestError::NotFound(_) => Code::NotFound,
            GuestError::Precondition(_) => Code::FailedPrecondition,
            GuestError::Unsupported(_) => Code::Unimplemented,
            GuestError::File { source, .. } if out_of_resources(source) => Code::ResourceExhausted,
            GuestError::File { .. } => Code::Internal,
        };
        status(code, &error)
    }
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
