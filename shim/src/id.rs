//! Identifiers of namespaces, containers and sandboxes.

use std::fmt;
use std::str::FromStr;

/// The longest identifier that containerd accepts, in bytes.
pub const MAX_LENGTH: usize = 76;

/// An identifier by containerd's rule: runs of ASCII letters and digits, joined by single `.`, `_` or `-`.
///
/// It is thereby one plain component of a path: never empty, `.` or `..`, and without a `/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(String);

/// Why a text is no identifier.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// Nothing, or more than [`MAX_LENGTH`] bytes.
    #[error("an identifier has 1 to {MAX_LENGTH} bytes, not {0}")]
    Length(usize),
    /// A character that does not belong there.
    #[error("identifier {0:?}: letters and digits, joined by single '.', '_' or '-', are allowed")]
    Character(String),
}

impl Id {
    /// The identifier's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Id, IdError> {
        if text.is_empty() || text.len() > MAX_LENGTH {
            return Err(IdError::Length(text.len()));
        }
        let is_run = |run: &str| !run.is_empty() && run.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if text.split(['.', '_', '-']).all(is_run) {
            Ok(Id(text.to_owned()))
        } else {
            Err(IdError::Character(text.to_owned()))
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    #[test]
    fn accepts_what_containerd_accepts() {
        for text in ["k8s.io", "default", "a", "redis-1_b.c", &"f".repeat(MAX_LENGTH)] {
            assert_eq!(text.parse::<Id>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn refuses_what_could_leave_its_directory() {
        for text in ["", ".", "..", "../a", "a/b", "/a", "-a", "a-", "a..b", "a b", "a\0", "ä"] {
            assert!(text.parse::<Id>().is_err(), "{text:?}");
        }
        assert_eq!("f".repeat(77).parse::<Id>(), Err(IdError::Length(77)));
    }

    proptest! {
        #[test]
        fn an_identifier_is_one_component_of_a_path(text in "[a-z./_\\-]{0,12}") {
            if let Ok(id) = text.parse::<Id>() {
                let components: Vec<_> = Path::new(id.as_str()).components().collect();
                prop_assert_eq!(components, vec![Component::Normal(text.as_ref())]);
            }
        }
    }
}
