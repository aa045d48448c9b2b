//! Reads the pod's network back.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use caisson_protocol::v1 as proto;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};

use super::link::Link;
use super::parse::format_mac;
use super::route::RouteMessage;
use super::{NetworkError, enter};

/// Of `pod`, a network namespace: interfaces except loopback, unicast routes of all tables but the local one,
/// permanent neighbours.
///
/// # Errors
/// When the kernel does not answer.
pub fn list(pod: BorrowedFd<'_>) -> Result<proto::NetworkConfig, NetworkError> {
    let mut pod = enter(pod)?;
    let links: Vec<Link> =
        pod.dump(libc::RTM_GETLINK, &Link::default()).map_err(NetworkError::netlink("list interfaces"))?;
    let addresses: Vec<AddressMessage> = pod
        .dump(libc::RTM_GETADDR, &AddressMessage::default())
        .map_err(NetworkError::netlink("list addresses"))?;
    let routes: Vec<RouteMessage> = pod
        .dump(libc::RTM_GETROUTE, &RouteMessage::default())
        .map_err(NetworkError::netlink("list routes"))?;
    let neighbours: Vec<NeighbourMessage> = pod
        .dump(libc::RTM_GETNEIGH, &NeighbourMessage::default())
        .map_err(NetworkError::netlink("list neighbours"))?;
    let names: HashMap<u32, String> = links.iter().map(|link| (link.index(), link.told_name())).collect();
    let wired = links.iter().filter(|link| !link.is_loopback());
    Ok(proto::NetworkConfig {
        interfaces: wired.map(|link| interface(link, &addresses)).collect(),
        routes: routes.iter().filter_map(|message| message.told(&names)).collect(),
        neighbours: neighbours.iter().filter_map(|message| neighbour(message, &names)).collect(),
    })
}

fn interface(link: &Link, addresses: &[AddressMessage]) -> proto::Interface {
    let own = addresses.iter().filter(|message| message.header.index == link.index());
    proto::Interface {
        mac: link.mac().map(format_mac).unwrap_or_default(),
        name: link.told_name(),
        mtu: link.told_mtu().unwrap_or(0),
        addresses: own.filter_map(address).collect(),
        up: link.is_up(),
        counters: link.counters(),
        ..proto::Interface::default()
    }
}

/// In CIDR notation. On a link to one peer, the other attribute is the peer's.
fn address(message: &AddressMessage) -> Option<String> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    Some(format!("{}/{}", local.or(any)?, message.header.prefix_len))
}

fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<proto::Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let device = names.get(&message.header.ifindex)?.clone();
    let mut neighbour = proto::Neighbour { device, ..proto::Neighbour::default() };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => neighbour.address = ip.to_string(),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbour.address = ip.to_string()
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac = format_mac(mac),
            _ => {}
        }
    }
    (!neighbour.address.is_empty()).then_some(neighbour)
}
