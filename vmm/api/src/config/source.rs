use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Where a file comes from: a path, or `fd:N`, a descriptor that was handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum FileSource {
    /// To be opened.
    Path(PathBuf),
    /// Open already.
    Descriptor(u32),
}

/// `fd:` was not followed by a number.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} does not name a descriptor: fd: and a number")]
pub struct BadDescriptor(String);

impl TryFrom<String> for FileSource {
    type Error = BadDescriptor;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.strip_prefix("fd:") {
            Some(number) => number.parse().map(Self::Descriptor).map_err(|_| BadDescriptor(text)),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl From<FileSource> for String {
    fn from(source: FileSource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Descriptor(number) => write!(f, "fd:{number}"),
        }
    }
}
