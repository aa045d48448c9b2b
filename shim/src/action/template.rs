//! `template`: makes a template, for the pods that come after.

use super::{ActionError, config_files};
use crate::invocation::Invocation;
use crate::template::build;

/// Makes it, and returns what is to be printed: nothing.
///
/// # Errors
/// [`ActionError::Template`].
pub fn run(invocation: &Invocation) -> Result<Vec<u8>, ActionError> {
    build::run(&config_files(invocation.config.clone()))?;
    Ok(Vec::new())
}
