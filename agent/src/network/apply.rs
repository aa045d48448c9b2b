//! Brings the pod's namespace to a given state.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use caisson_protocol::v1 as proto;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};

use super::link::Link;
use super::netlink::Netlink;
use super::parse::{self, Interface, Neighbour, Prefix, Route};
use super::route::RouteMessage;
use super::{NetworkError, enter, family, own};

/// A network namespace, and the way to speak to the kernel in it.
struct Pod<'a> {
    namespace: BorrowedFd<'a>,
    netlink: Netlink,
}

/// Applies `config` in `namespace`. Doing it twice changes nothing.
///
/// # Errors
/// The first thing that is malformed, then the first that fails.
pub fn apply(namespace: BorrowedFd<'_>, config: &proto::NetworkConfig) -> Result<(), NetworkError> {
    let config = parse::config(config)?;
    let mut pod = Pod { namespace, netlink: enter(namespace)? };
    let loopback = pod.index_of("lo")?;
    pod.set(&Link::change(loopback).up(true), "bring lo up")?;
    for interface in &config.interfaces {
        pod.apply_interface(interface)?;
    }
    for route in &config.routes {
        pod.apply_route(route)?;
    }
    for neighbour in &config.neighbours {
        pod.apply_neighbour(neighbour)?;
    }
    Ok(())
}

/// Takes the interface with this MAC down and moves it from `namespace` back to the agent's.
///
/// # Errors
/// When there is none.
pub fn remove_interface(namespace: BorrowedFd<'_>, mac: &str) -> Result<(), NetworkError> {
    let mut pod = Pod { namespace, netlink: enter(namespace)? };
    let link = find(&mut pod.netlink, parse::mac(mac)?)?;
    let index = link.ok_or_else(|| NetworkError::NoInterface(mac.to_owned()))?.index();
    let agents = std::fs::File::open("/proc/self/ns/net")
        .map_err(|source| NetworkError::Io { action: "open the agent's network namespace", source })?;
    pod.set(&Link::change(index).up(false), &format!("take {mac} down"))?;
    let away = Link::change(index).name(&unused_name(index)).namespace(agents.as_fd());
    pod.set(&away, &format!("move {mac} out"))
}

impl Pod<'_> {
    fn apply_interface(&mut self, interface: &Interface) -> Result<(), NetworkError> {
        let link = match find(&mut self.netlink, interface.mac)? {
            Some(link) => link,
            None => self.move_in(interface)?,
        };
        let (index, name) = (link.index(), &interface.name);
        if link.told_name() != *name {
            // An interface that is up can not be renamed.
            self.set(&Link::change(index).up(false), &format!("take {name} down"))?;
            self.set(&Link::change(index).name(name), &format!("rename an interface to {name}"))?;
        }
        if let Some(mtu) = interface.mtu {
            self.set(&Link::change(index).mtu(mtu), &format!("set the MTU of {name} to {mtu}"))?;
        }
        for prefix in &interface.addresses {
            let message = address(index, *prefix, interface.prefix_routes);
            let added = self.netlink.put(libc::RTM_NEWADDR, &message);
            let action = format!("add {}/{} to {name}", prefix.address, prefix.length);
            added.map_err(NetworkError::netlink(action))?;
        }
        self.set(&Link::change(index).up(true), &format!("bring {name} up"))
    }

    fn apply_route(&mut self, route: &Route) -> Result<(), NetworkError> {
        let device = route.device.as_ref().map(|device| self.index_of(device)).transpose()?;
        let added = self.netlink.put(libc::RTM_NEWROUTE, &RouteMessage::new(route, device));
        let Prefix { address, length } = route.destination;
        added.map_err(NetworkError::netlink(format!("add the route to {address}/{length}")))
    }

    fn apply_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), NetworkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(neighbour.address);
        message.header.ifindex = self.index_of(&neighbour.device)?;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(neighbour.address.into()),
            NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
        ];
        let added = self.netlink.put(libc::RTM_NEWNEIGH, &message);
        added.map_err(NetworkError::netlink(format!("add the neighbour {}", neighbour.address)))
    }

    /// Moves the interface from the agent's namespace to the pod's, under its new name at once: another `eth0` may
    /// be there already.
    fn move_in(&mut self, interface: &Interface) -> Result<Link, NetworkError> {
        let missing = || NetworkError::NoInterface(parse::format_mac(&interface.mac));
        let mut agents = own()?;
        let index = find(&mut agents, interface.mac)?.ok_or_else(missing)?.index();
        // The kernel renames before it moves, so the interface has to be down.
        set(&mut agents, &Link::change(index).up(false), "take an interface down")?;
        let moved = Link::change(index).name(&interface.name).namespace(self.namespace);
        set(&mut agents, &moved, &format!("move {} into the pod", interface.name))?;
        find(&mut self.netlink, interface.mac)?.ok_or_else(missing)
    }

    fn set(&mut self, change: &Link, action: &str) -> Result<(), NetworkError> {
        set(&mut self.netlink, change, action)
    }

    fn index_of(&mut self, name: &str) -> Result<u32, NetworkError> {
        let found = self.netlink.link_by_name(name).map_err(NetworkError::netlink(format!("find {name}")))?;
        found.map(|link| link.index()).ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
    }
}

fn set(netlink: &mut Netlink, change: &Link, action: &str) -> Result<(), NetworkError> {
    netlink.set_link(change).map_err(NetworkError::netlink(action))
}

fn find(netlink: &mut Netlink, mac: [u8; 6]) -> Result<Option<Link>, NetworkError> {
    let links: Vec<Link> = netlink
        .dump(libc::RTM_GETLINK, &Link::default())
        .map_err(NetworkError::netlink("list interfaces"))?;
    Ok(links.into_iter().find(|link| link.mac() == Some(&mac[..])))
}

fn address(index: u32, prefix: Prefix, routes: bool) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(prefix.address);
    message.header.prefix_len = prefix.length;
    message.header.index = index;
    message.attributes =
        vec![AddressAttribute::Address(prefix.address), AddressAttribute::Local(prefix.address)];
    if let (IpAddr::V4(address), 0..31) = (prefix.address, prefix.length) {
        let hosts = u32::MAX >> prefix.length;
        message.attributes.push(AddressAttribute::Broadcast((address.to_bits() | hosts).into()));
    }
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Nodad, prefix.address.is_ipv6());
    flags.set(AddressFlags::Noprefixroute, !routes);
    message.attributes.push(AddressAttribute::Flags(flags));
    message
}

/// A name for a device that goes back to the agent's namespace, where its own may be taken.
fn unused_name(index: u32) -> String {
    format!("spare{index}")
}
