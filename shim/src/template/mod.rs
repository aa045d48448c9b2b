//! Templates: guests that were booted once and saved, to be cloned for pods.
//!
//! | module | owns |
//! |---|---|
//! | `key` | what a template depends on, and so which one fits a pod |
//! | `store` | where templates are kept: published whole, opened, copied for a tenant, collected |
//! | [`build`] | the process that makes one |
//!
//! A template is a snapshot of a guest whose agent listens and whose slots are empty, but for what needs nothing from the
//! host. It holds no pod's code and no secret, and never had a network card. A pod's machine that starts from it maps its
//! memory privately, so that pods share what none of them has written: the kernel's text, its page structures, the agent.
//!
//! A pod never waits for a template: one that finds none boots, and has one made for the next.

pub mod build;
mod key;
mod store;

use std::fs::File;
use std::io;
use std::path::PathBuf;

pub use key::Key;
pub use store::Store;

use crate::config::{self, TemplateSharing};
use crate::sizing::Shape;

/// A template that is open for a clone.
#[derive(Debug)]
pub struct Template {
    /// The state file of the VMM's snapshot.
    pub state: File,
    /// The memory file. The lock on it is shared by all machines that map it, for as long as they do.
    pub memory: File,
    /// The size of the machine that it was made with, and what that can become.
    pub shape: Shape,
    /// Where it is kept, for whoever finds that it cannot be cloned.
    place: (Store, Key),
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// Something on the host.
    #[error("{action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else than root could change a file that guests are made from.
    #[error("{0:?}: not root's alone to write (remove it; it is made again)")]
    Untrusted(PathBuf),
    /// The description of a template.
    #[error("describe a template")]
    Describe(#[from] serde_json::Error),
    /// The last attempt to make one failed.
    #[error("making it failed: {0}")]
    Failed(String),
}

pub(crate) fn at(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.into();
    move |source| TemplateError::Io { action, path, source }
}

/// What a pod finds.
#[derive(Debug)]
pub enum Found {
    /// A template to start from.
    Ready(Box<Template>),
    /// None, and none is to be made.
    None,
    /// None yet.
    Missing,
}

/// Looks for the template of a machine of this shape, for a pod of `tenant`. May wait for the file system.
///
/// # Errors
/// [`TemplateError`]. A pod then boots.
pub fn find(config: &config::Config, shape: Shape, tenant: &str) -> Result<Found, TemplateError> {
    if config.template.mode == config::TemplateMode::Off {
        return Ok(Found::None);
    }
    let store = Store::new(&config.template.directory);
    let key = Key::of(&config.machine, shape)?;
    let tenant = match config.template.share {
        TemplateSharing::Namespace => Some(tenant),
        TemplateSharing::Node => None,
    };
    Ok(match store.open(&key, tenant)? {
        Some((state, memory)) => {
            Found::Ready(Box::new(Template { state, memory, shape, place: (store, key) }))
        }
        None if config.template.mode == config::TemplateMode::Prepared => Found::None,
        None => Found::Missing,
    })
}

impl Template {
    /// Takes it out of use, for pods to boot and for another to be made.
    ///
    /// # Errors
    /// [`TemplateError::Io`] when it cannot be moved away.
    pub fn discard(&self) -> Result<(), TemplateError> {
        let (store, key) = &self.place;
        store.remove(key)
    }
}
