//! The pod's network namespace, joined with its machine.
//!
//! | module | owns |
//! |---|---|
//! | `namespace` | which namespace it is, and work inside it |
//! | `list`, `description` | what it has; how the agent is told of it |
//! | `tap` | tap devices |
//! | `redirect` | joining two interfaces |
//! | `loopback`, `bpf` | what the host says to the pod's loopback, led to the guest |
//!
//! CNI plugins know of namespaces and not of machines. So each interface that they have made stays where it is, with
//! its addresses, routes and counters, by which CRI tells a pod's traffic and plugins find what is theirs. A tap device is
//! made beside it, and whatever arrives at the one leaves by the other (tc-mirred(8)): the guest's card has the
//! interface's address on the link, its MTU and its IP addresses, and the namespace's own IP stack never sees a frame
//! that is the guest's. The kernel passes frames on with their checksums and segments still to be made, both ways.
//!
//! A tap device is gone with its last descriptor, so when the shim and the machine's process are dead. What joined it,
//! and itself in case it is held, is in the [journal](crate::journal). All calls block, each on a thread of its own
//! that enters the namespace: not for an executor's threads.

mod bpf;
mod description;
mod list;
mod loopback;
mod namespace;
mod redirect;
mod tap;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec};
use tokio::task::JoinHandle;

use crate::journal::{Journal, JournalError, Resource};
use namespace::Namespace;

pub use description::{Description, Interface, Mac, Neighbour, Prefix, Route, Scope};
pub use loopback::Loopback;
pub use namespace::NamespaceId;

/// What the names of tap devices begin with; the number of the interface that each is for follows.
const TAP: &str = "caisson";

/// Why a pod has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// It cannot be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The pod is to use the node's own network.
    #[error("a pod in a virtual machine has a network of its own: hostNetwork is not supported")]
    HostNetwork,
    /// There is no such namespace.
    #[error("open the network namespace {path:?}")]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it is not there.
        source: io::Error,
    },
    /// It cannot be entered.
    #[error("enter the network namespace {path:?}")]
    Enter {
        /// Which one.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The kernel has no means to lead connections to the pod's loopback into the guest.
    #[error("lead connections to the pod's loopback into the guest")]
    Loopback(#[source] io::Error),
    /// There is no thread to enter it with.
    #[error("start a thread for a network namespace")]
    Thread(#[source] io::Error),
    /// An interface that carries something else than Ethernet frames.
    #[error("interface {0} is up and is not Ethernet: a virtual machine cannot have it")]
    NotEthernet(String),
    /// More interfaces than a machine has room for.
    #[error("the pod has {0} interfaces, which is more than a virtual machine can have")]
    TooMany(usize),
    /// Somebody else handles what arrives at the interface.
    #[error("interface {0} has an ingress queueing discipline already")]
    Occupied(String),
    /// The kernel refused.
    #[error("{action}")]
    Netlink {
        /// What was tried.
        action: String,
        /// Its reason.
        source: rtnetlink::Error,
    },
    /// A tap device cannot be made.
    #[error("make the tap device {name}")]
    Tap {
        /// Its name.
        name: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// A network card for the machine.
#[derive(Debug)]
pub struct Card {
    /// The interface that it stands for.
    pub interface: Interface,
    /// The tap device, with one queue and a virtio-net header before each frame.
    pub tap: OwnedFd,
}

/// A pod's network, joined.
#[derive(Debug)]
pub struct Attached {
    /// What the guest is to be told.
    pub description: Description,
    /// One card for each of its interfaces, in the same order.
    pub cards: Vec<Card>,
    /// Connections to its loopback; none when the kernel can't lead them.
    pub loopback: Option<Loopback>,
}

/// Joins all interfaces of the namespace at `path` with tap devices. CNI has to be done with it.
///
/// # Errors
/// When the namespace is the host's, cannot be entered, or has what no guest can be given. What was made by then is in
/// the journal.
pub fn attach(journal: &mut Journal, path: &Path) -> Result<Attached, NetworkError> {
    let namespace = Namespace::open(path)?;
    if namespace.is_hosts() {
        return Err(NetworkError::HostNetwork);
    }
    let id = namespace.id.clone();
    let loopback = Loopback::listen(&namespace).inspect_err(|error| {
        let why = std::error::Error::source(error).map(ToString::to_string);
        tracing::warn!(%error, why, "port-forward will find nobody");
    });
    namespace.within(async move || {
        let link = Link::open()?;
        let description = list::describe(&link).await?;
        let mut cards = Vec::new();
        for interface in &description.interfaces {
            let tap = join(&link, journal, &id, interface).await?;
            cards.push(Card { interface: interface.clone(), tap });
        }
        Ok(Attached { description, cards, loopback: loopback.ok() })
    })
}

async fn join(
    link: &Link,
    journal: &mut Journal,
    namespace: &NamespaceId,
    interface: &Interface,
) -> Result<OwnedFd, NetworkError> {
    if redirect::is_taken(link, interface.index).await? {
        return Err(NetworkError::Occupied(interface.name.clone()));
    }
    let name = format!("{TAP}{}", interface.index);
    journal.record(Resource::Interface { namespace: namespace.clone(), name: name.clone() })?;
    let tap = tap::make(&name).map_err(|source| NetworkError::Tap { name: name.clone(), source })?;
    be_silent(&name);
    let index = link
        .index_of(&name)
        .await?
        .ok_or_else(|| NetworkError::Tap { name: name.clone(), source: io::ErrorKind::NotFound.into() })?;
    let message = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::Mtu(interface.mtu))
        .up()
        .build();
    let set_up = link.handle.link().set(message).execute().await;
    set_up.map_err(netlink(format!("set the MTU of {name} to {} and bring it up", interface.mtu)))?;
    let record = Resource::Redirect { namespace: namespace.clone(), interface: interface.name.clone() };
    journal.record(record)?;
    redirect::all(link, interface.index, index).await?;
    redirect::all(link, index, interface.index).await?;
    Ok(tap)
}

/// Keeps the namespace's IPv6 from talking to the guest: neither addresses nor announcements of its own on this
/// interface. Without IPv6 in the kernel there is no such file.
fn be_silent(interface: &str) {
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1");
}

/// Removes an interface of ours from a namespace. Neither need be there.
pub(crate) fn remove_interface(namespace: &NamespaceId, name: &str) -> Result<(), NetworkError> {
    let Some(namespace) = Namespace::find(namespace)? else { return Ok(()) };
    namespace.within(async || {
        let link = Link::open()?;
        let Some(index) = link.index_of(name).await? else { return Ok(()) };
        let removed = link.handle.link().del(index).execute().await;
        gone(removed, format!("remove interface {name}"))
    })
}

/// Ends the redirection of what arrives at an interface. Nothing of it need be there.
pub(crate) fn remove_redirect(namespace: &NamespaceId, interface: &str) -> Result<(), NetworkError> {
    let Some(namespace) = Namespace::find(namespace)? else { return Ok(()) };
    namespace.within(async || {
        let link = Link::open()?;
        let Some(index) = link.index_of(interface).await? else { return Ok(()) };
        if !redirect::is_taken(&link, index).await? {
            return Ok(());
        }
        gone(redirect::end(&link, index).await, format!("end the redirection at interface {interface}"))
    })
}

/// Names what failed.
fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let action = action.into();
    move |source| NetworkError::Netlink { action, source }
}

/// Makes success of the error that says that there is no such interface.
fn gone(result: Result<(), rtnetlink::Error>, action: String) -> Result<(), NetworkError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(()),
        result => result.map_err(netlink(action)),
    }
}

/// A netlink connection into the calling thread's network namespace.
struct Link {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Link {
    fn open() -> Result<Link, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Thread)?;
        Ok(Link { handle, task: tokio::spawn(connection) })
    }

    async fn index_of(&self, name: &str) -> Result<Option<u32>, NetworkError> {
        let mut links = self.handle.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(message) => Ok(message.map(|message| message.header.index)),
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(None),
            Err(error) => Err(netlink(format!("look for interface {name}"))(error)),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}
