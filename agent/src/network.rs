//! The pod's network: interfaces, addresses, routes, neighbours, by rtnetlink(7).
//!
//! Interfaces are found by MAC: in the pod's namespace, or else in the agent's, where the kernel makes those of
//! devices that are plugged. Everything is checked before anything changes.

mod apply;
mod attributes;
mod dns;
mod link;
mod list;
mod netlink;
mod parse;
mod route;

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use netlink_packet_route::AddressFamily;
use thiserror::Error;

use self::netlink::Netlink;
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
        source: io::Error,
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

    fn netlink(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
        let action = action.into();
        move |source| NetworkError::Netlink { action, source }
    }
}

/// A netlink socket of the agent's namespace.
fn own() -> Result<Netlink, NetworkError> {
    Netlink::new().map_err(|source| NetworkError::Io { action: "open netlink", source })
}

/// A netlink socket of `pod`, a network namespace.
fn enter(pod: BorrowedFd<'_>) -> Result<Netlink, NetworkError> {
    namespace::within(pod, Netlink::new)
        .map_err(|source| NetworkError::Io { action: "enter the pod's network namespace", source })
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
