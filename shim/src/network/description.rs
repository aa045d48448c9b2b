//! What a network namespace has, and how the agent is told of it.

use std::fmt;
use std::net::IpAddr;

use caisson_protocol::v1;

/// A link-layer address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// The prefix's length in bits.
    pub length: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.length)
    }
}

/// An Ethernet interface that is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address on the link.
    pub mac: Mac,
    /// The longest IP packet that it carries, in bytes.
    pub mtu: u32,
    /// Its addresses in the order in which the kernel tells them: the first of a family is its primary one.
    pub addresses: Vec<Prefix>,
}

/// How far a route's destination is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Anywhere.
    #[default]
    Universe,
    /// On the link.
    Link,
    /// On this host.
    Host,
}

/// A unicast route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Where to; none: everywhere.
    pub destination: Option<Prefix>,
    /// By way of whom.
    pub gateway: Option<IpAddr>,
    /// Out of which interface.
    pub device: String,
    /// From which address, if the sender does not care.
    pub source: Option<IpAddr>,
    /// How far.
    pub scope: Scope,
    /// The routing table; 0: the main one.
    pub table: u32,
    /// The lower the better.
    pub metric: u32,
    /// The longest packet in bytes; 0: the interface's.
    pub mtu: u32,
    /// The gateway is on the link although no address says so.
    pub onlink: bool,
}

/// A neighbour that somebody entered for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// On which interface's link.
    pub device: String,
    /// Its address on the link.
    pub mac: Mac,
}

/// The network of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// All Ethernet interfaces that are up.
    pub interfaces: Vec<Interface>,
    /// Routes out of these; those that others need to reach their gateway are first.
    pub routes: Vec<Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<Neighbour>,
    /// What the guest cannot be given, for people.
    pub left_out: Vec<String>,
}

impl From<&Interface> for v1::Interface {
    fn from(interface: &Interface) -> v1::Interface {
        v1::Interface {
            mac: interface.mac.to_string(),
            name: interface.name.clone(),
            mtu: interface.mtu,
            addresses: interface.addresses.iter().map(Prefix::to_string).collect(),
            // The namespace's routes to prefixes are told like all others: some plugins remove them.
            no_prefix_routes: true,
            ..v1::Interface::default()
        }
    }
}

impl From<&Route> for v1::Route {
    fn from(route: &Route) -> v1::Route {
        let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        let scope = match route.scope {
            Scope::Universe => v1::route::Scope::Universe,
            Scope::Link => v1::route::Scope::Link,
            Scope::Host => v1::route::Scope::Host,
        };
        v1::Route {
            destination: route.destination.map(|to| to.to_string()).unwrap_or_default(),
            gateway: text(route.gateway),
            device: route.device.clone(),
            source: text(route.source),
            scope: scope.into(),
            table: route.table,
            metric: route.metric,
            mtu: route.mtu,
            onlink: route.onlink,
        }
    }
}

impl From<&Neighbour> for v1::Neighbour {
    fn from(neighbour: &Neighbour) -> v1::Neighbour {
        v1::Neighbour {
            address: neighbour.address.to_string(),
            device: neighbour.device.clone(),
            mac: neighbour.mac.to_string(),
        }
    }
}

impl From<&Description> for v1::NetworkConfig {
    fn from(description: &Description) -> v1::NetworkConfig {
        v1::NetworkConfig {
            interfaces: description.interfaces.iter().map(Into::into).collect(),
            routes: description.routes.iter().map(Into::into).collect(),
            neighbours: description.neighbours.iter().map(Into::into).collect(),
        }
    }
}
