//! The pod's network: interfaces, addresses, routes, neighbours, by rtnetlink.
//!
//! Interfaces are found by MAC: in the pod's namespace, or else in the agent's, where the kernel makes those of
//! devices that are plugged. Everything is checked before anything changes.

mod apply;
mod dns;
mod list;
mod parse;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rtnetlink::Handle;
use thiserror::Error;

use crate::namespace;

pub use apply::{apply, remove_interface};
pub use dns::{resolv_conf, write_resolv_conf};
pub use list::list;

/// Why the network is not as it was asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// A field is malformed.
    #[error("{field}: {value:?} is not valid")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: String,
    },
    /// No interface has this MAC or name.
    #[error("there is no interface {0}")]
    NoInterface(String),
    /// The kernel refused.
    #[error("{action}")]
    Netlink {
        /// What was tried.
        action: String,
        /// Its reason.
        source: rtnetlink::Error,
    },
    /// The namespace or a file is out of reach.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl NetworkError {
    fn invalid(field: &'static str, value: impl Into<String>) -> NetworkError {
        NetworkError::Invalid { field, value: value.into() }
    }

    fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
        let action = action.into();
        move |source| NetworkError::Netlink { action, source }
    }
}

/// A netlink connection into a network namespace.
pub struct Connection {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
    // Kept to move interfaces here.
    namespace: Option<OwnedFd>,
}

impl Connection {
    /// To the namespace of the agent.
    ///
    /// # Errors
    /// When there is no netlink socket to be had.
    pub fn own() -> Result<Connection, NetworkError> {
        let opened = rtnetlink::new_connection();
        let (connection, handle, _) =
            opened.map_err(|source| NetworkError::Io { action: "open netlink", source })?;
        Ok(Connection { handle, task: tokio::spawn(connection), namespace: None })
    }

    /// To `namespace`.
    ///
    /// # Errors
    /// When it can not be entered.
    pub fn enter(namespace: BorrowedFd<'_>) -> Result<Connection, NetworkError> {
        let failed = |source| NetworkError::Io { action: "enter the pod's network namespace", source };
        let kept = namespace.try_clone_to_owned().map_err(failed)?;
        let runtime = tokio::runtime::Handle::current();
        // A socket stays in the namespace that it was made in, whoever uses it.
        let (connection, handle, _) = namespace::within(namespace, || {
            let _context = runtime.enter();
            rtnetlink::new_connection()
        })
        .map_err(failed)?;
        Ok(Connection { handle, task: tokio::spawn(connection), namespace: Some(kept) })
    }

    fn namespace_fd(&self) -> Option<i32> {
        self.namespace.as_ref().map(AsRawFd::as_raw_fd)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}
