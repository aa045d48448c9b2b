//! The guest as a machine: entropy, names, processors, memory, device slots.

pub mod devices;
pub mod identity;
pub mod memory;
pub mod processors;

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A file of the kernel's interface did not do what it should.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// Reading, writing or a request on a file failed.
    #[error("{action} {}", path.display())]
    File {
        /// What was tried, e.g. "read".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A caller's value is out of range.
    #[error("{0}")]
    Invalid(String),
    /// The named thing does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The thing is not in the state that the request needs.
    #[error("{0}")]
    Precondition(String),
    /// The guest kernel lacks something.
    #[error("the guest kernel has no {0}")]
    Unsupported(&'static str),
}

impl GuestError {
    /// For `map_err`: `action` failed on `path`.
    pub fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> GuestError {
        let path = path.as_ref().to_owned();
        move |source| GuestError::File { action, path, source }
    }
}

/// The trimmed text of a file of procfs or sysfs.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<String, GuestError> {
    let text = fs::read_to_string(&path).map_err(GuestError::file("read", &path))?;
    Ok(text.trim_end().to_owned())
}

/// A number with two decimals, as the kernel writes averages. (The standard library's parser brings 14 KB of tables.)
pub(crate) fn decimal(text: &str) -> Option<f64> {
    let (whole, hundredths) = text.split_once('.')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if hundredths.len() != 2 || !digits(whole) || !digits(hundredths) {
        return None;
    }
    let number = whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)?;
    Some(f64::from(number) / 100.0)
}

/// Writes a value to a file of procfs or sysfs, which must exist.
pub(crate) fn write(path: impl AsRef<Path>, value: impl Display) -> Result<(), GuestError> {
    use io::Write as _;
    let mut file = fs::OpenOptions::new().write(true).open(&path).map_err(GuestError::file("open", &path))?;
    // One write(2): the kernel parses each on its own.
    file.write_all(value.to_string().as_bytes()).map_err(GuestError::file("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_read_exactly() {
        for (text, number) in [("0.00", 0.0), ("0.07", 0.07), ("12.34", 12.34), ("41943.03", 41_943.03)] {
            assert_eq!(decimal(text), Some(number), "{text}");
        }
        for text in ["", "1", "1.5", "1.500", ".50", "-1.50", "1.+5", "1.5 ", "99999999999.00"] {
            assert_eq!(decimal(text), None, "{text}");
        }
    }
}
