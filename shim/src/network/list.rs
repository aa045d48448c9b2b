//! Reads what the network namespace of the calling thread has.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteScope, RouteType,
};

use super::description::{Description, Interface, Mac, Neighbour, Prefix, Route, Scope};
use super::{Link, NetworkError, netlink};

/// RT_TABLE_MAIN of linux/rtnetlink.h.
const MAIN_TABLE: u32 = 254;
/// RT_TABLE_LOCAL: the kernel's own entries.
const LOCAL_TABLE: u32 = 255;
/// Interfaces that one pod may have; each takes a device of its machine.
const MAX_INTERFACES: usize = 16;

/// Reads interfaces, addresses, routes and neighbours.
pub(super) async fn describe(link: &Link) -> Result<Description, NetworkError> {
    let mut description = Description::default();
    let messages: Vec<LinkMessage> =
        link.handle.link().get().execute().try_collect().await.map_err(netlink("list interfaces"))?;
    for message in &messages {
        match interface(message)? {
            Some(interface) => description.interfaces.push(interface),
            None => description.left_out.extend(why_left_out(message)),
        }
    }
    if description.interfaces.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany(description.interfaces.len()));
    }
    let messages: Vec<AddressMessage> =
        link.handle.address().get().execute().try_collect().await.map_err(netlink("list addresses"))?;
    for message in &messages {
        let owner = description.interfaces.iter_mut().find(|own| own.index == message.header.index);
        if let (Some(owner), Some(address)) = (owner, address(message)) {
            owner.addresses.push(address);
        }
    }
    let names: HashMap<u32, String> =
        description.interfaces.iter().map(|interface| (interface.index, interface.name.clone())).collect();
    routes(link, &names, &mut description).await?;
    let messages: Vec<NeighbourMessage> =
        link.handle.neighbours().get().execute().try_collect().await.map_err(netlink("list neighbours"))?;
    description.neighbours.extend(messages.iter().filter_map(|message| neighbour(message, &names)));
    Ok(description)
}

/// An interface that the guest is to have: any that is up, but for loopback, which it has.
fn interface(message: &LinkMessage) -> Result<Option<Interface>, NetworkError> {
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let (mut name, mut mac, mut mtu) = (String::new(), None, 0);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            _ => {}
        }
    }
    let mac = mac.filter(|_| message.header.link_layer_type == LinkLayerType::Ether);
    // The tunnels that the kernel adds to every namespace are down. One that is up is there to be used.
    let mac = mac.ok_or_else(|| NetworkError::NotEthernet(name.clone()))?;
    Ok(Some(Interface { index: message.header.index, name, mac, mtu, addresses: Vec::new() }))
}

fn why_left_out(message: &LinkMessage) -> Option<String> {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    })?;
    let loopback = message.header.flags.contains(LinkFlags::Loopback);
    (!loopback).then(|| format!("interface {name}: it is down"))
}

/// An address that is in use: not one that turned out to be somebody else's.
fn address(message: &AddressMessage) -> Option<Prefix> {
    let (mut address, mut local, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(bits) => flags = *bits,
            _ => {}
        }
    }
    // On a point-to-point link, `Address` is the other end's.
    let address = local.or(address).filter(|_| !flags.contains(AddressFlags::Dadfailed))?;
    Some(Prefix { address, length: message.header.prefix_len })
}

async fn routes(
    link: &Link,
    names: &HashMap<u32, String>,
    description: &mut Description,
) -> Result<(), NetworkError> {
    let both =
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
    for filter in both {
        let messages: Vec<RouteMessage> =
            link.handle.route().get(filter).execute().try_collect().await.map_err(netlink("list routes"))?;
        for message in &messages {
            match route(message, names) {
                Kind::Usable(route) => description.routes.push(*route),
                Kind::LeftOut(why) => description.left_out.push(why),
                Kind::Kernels => {}
            }
        }
    }
    // A gateway has to be reachable before a route by way of it is added.
    description.routes.sort_by_key(|route| route.gateway.is_some());
    Ok(())
}

/// What a route is to the guest.
enum Kind {
    Usable(Box<Route>),
    /// The guest's kernel makes its own.
    Kernels,
    LeftOut(String),
}

fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Kind {
    let header = &message.header;
    let mut route = Route { onlink: header.flags.contains(RouteFlags::Onlink), ..Route::default() };
    let mut table = u32::from(header.table);
    let (mut device, mut odd) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                let length = header.destination_prefix_length;
                route.destination = ip(to).map(|address| Prefix { address, length });
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Metrics(metrics) => route.mtu = metrics.iter().find_map(mtu).unwrap_or(0),
            RouteAttribute::MultiPath(_) => odd = Some("it has several next hops"),
            RouteAttribute::Via(_) => odd = Some("its gateway is of the other family"),
            RouteAttribute::Encap(_) => odd = Some("it encapsulates"),
            _ => {}
        }
    }
    if table == LOCAL_TABLE
        || matches!(header.kind, RouteType::Multicast | RouteType::Broadcast | RouteType::Local)
    {
        return Kind::Kernels;
    }
    route.scope = match header.scope {
        RouteScope::Link => Scope::Link,
        RouteScope::Host => Scope::Host,
        _ => Scope::Universe,
    };
    route.table = if table == MAIN_TABLE { 0 } else { table };
    if header.kind != RouteType::Unicast {
        odd = Some("it forbids");
    }
    if route.destination.is_none() && route.gateway.is_none() {
        // Without a gateway nothing else tells the family of a default route.
        let all: IpAddr = if header.address_family == rtnetlink::packet_route::AddressFamily::Inet6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        route.destination = Some(Prefix { address: all, length: 0 });
    }
    let to = route.destination.map_or("default".into(), |to| to.to_string());
    match (odd, device.and_then(|index| names.get(&index))) {
        (Some(odd), _) => Kind::LeftOut(format!("route {to}: {odd}")),
        (None, Some(name)) => Kind::Usable(Box::new(Route { device: name.clone(), ..route })),
        // Out of loopback, or of an interface that is down.
        (None, None) => Kind::Kernels,
    }
}

fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let device = names.get(&message.header.ifindex)?.clone();
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some((*ip).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some((*ip).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            _ => {}
        }
    }
    Some(Neighbour { address: address?, device, mac: mac? })
}
