//! Reads the pod's network back.

use std::collections::HashMap;
use std::net::IpAddr;

use caisson_protocol::v1 as proto;
use futures_util::TryStreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteScope, RouteType,
};
use std::net::{Ipv4Addr, Ipv6Addr};

use super::apply::name_of;
use super::parse::format_mac;
use super::{Connection, NetworkError};

/// RT_TABLE_MAIN of linux/rtnetlink.h.
const MAIN_TABLE: u32 = 254;
/// RT_TABLE_LOCAL: the kernel's own entries.
const LOCAL_TABLE: u32 = 255;

/// Interfaces except loopback, unicast routes of all tables but the local one, permanent neighbours.
///
/// # Errors
/// When the kernel does not answer.
pub async fn list(pod: &Connection) -> Result<proto::NetworkConfig, NetworkError> {
    let mut names = HashMap::new();
    let mut interfaces = Vec::new();
    let mut links = pod.handle.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(NetworkError::netlink("list interfaces"))? {
        let name = name_of(&link).cloned().unwrap_or_default();
        names.insert(link.header.index, name.clone());
        if !link.header.flags.contains(LinkFlags::Loopback) {
            interfaces.push((link.header.index, interface(&link, name)));
        }
    }
    let mut addresses = pod.handle.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(NetworkError::netlink("list addresses"))? {
        let local = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        };
        let any = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        };
        let found = message.attributes.iter().find_map(local).or(message.attributes.iter().find_map(any));
        let owner = interfaces.iter_mut().find(|(index, _)| *index == message.header.index);
        if let (Some(address), Some((_, interface))) = (found, owner) {
            interface.addresses.push(format!("{address}/{}", message.header.prefix_len));
        }
    }
    Ok(proto::NetworkConfig {
        interfaces: interfaces.into_iter().map(|(_, interface)| interface).collect(),
        routes: routes(pod, &names).await?,
        neighbours: neighbours(pod, &names).await?,
    })
}

fn interface(link: &LinkMessage, name: String) -> proto::Interface {
    let mut interface = proto::Interface { name, ..proto::Interface::default() };
    interface.up = link.header.flags.contains(LinkFlags::Up);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => interface.mac = format_mac(bytes),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Stats64(stats) => {
                interface.counters = Some(proto::InterfaceCounters {
                    rx_bytes: stats.rx_bytes,
                    rx_packets: stats.rx_packets,
                    rx_errors: stats.rx_errors,
                    rx_dropped: stats.rx_dropped,
                    tx_bytes: stats.tx_bytes,
                    tx_packets: stats.tx_packets,
                    tx_errors: stats.tx_errors,
                    tx_dropped: stats.tx_dropped,
                });
            }
            _ => {}
        }
    }
    interface
}

async fn routes(pod: &Connection, names: &HashMap<u32, String>) -> Result<Vec<proto::Route>, NetworkError> {
    let mut routes = Vec::new();
    for filter in
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
    {
        let mut messages = pod.handle.route().get(filter).execute();
        while let Some(message) = messages.try_next().await.map_err(NetworkError::netlink("list routes"))? {
            routes.extend(route(&message, names));
        }
    }
    Ok(routes)
}

fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<proto::Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast {
        return None;
    }
    let mut route = proto::Route { onlink: header.flags.contains(RouteFlags::Onlink), ..Default::default() };
    let mut table = u32::from(header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.destination = format!("{}/{}", ip(to)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address)?.to_string(),
            RouteAttribute::PrefSource(address) => route.source = ip(address)?.to_string(),
            RouteAttribute::Oif(index) => route.device = names.get(index).cloned().unwrap_or_default(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(mtu).unwrap_or(0);
            }
            _ => {}
        }
    }
    route.scope = match header.scope {
        RouteScope::Link => proto::route::Scope::Link,
        RouteScope::Host => proto::route::Scope::Host,
        _ => proto::route::Scope::Universe,
    }
    .into();
    route.table = if table == MAIN_TABLE { 0 } else { table };
    (table != LOCAL_TABLE).then_some(route)
}

fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

async fn neighbours(
    pod: &Connection,
    names: &HashMap<u32, String>,
) -> Result<Vec<proto::Neighbour>, NetworkError> {
    let mut neighbours = Vec::new();
    let mut messages = pod.handle.neighbours().get().execute();
    while let Some(message) = messages.try_next().await.map_err(NetworkError::netlink("list neighbours"))? {
        neighbours.extend(neighbour(&message, names));
    }
    Ok(neighbours)
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
