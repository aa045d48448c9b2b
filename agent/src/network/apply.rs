//! Brings the pod's namespace to a given state.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use caisson_protocol::v1 as proto;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMetric, RouteScope};
use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::parse::{self, Interface, Neighbour, Prefix, Route};
use super::{Connection, NetworkError};

/// Applies `config` in the namespace of `pod`. Doing it twice changes nothing.
///
/// # Errors
/// The first thing that is malformed, then the first that fails.
pub async fn apply(pod: &Connection, config: &proto::NetworkConfig) -> Result<(), NetworkError> {
    let config = parse::config(config)?;
    set_up(pod, index_of(pod, "lo").await?, "lo").await?;
    for interface in &config.interfaces {
        apply_interface(pod, interface).await?;
    }
    for route in &config.routes {
        apply_route(pod, route).await?;
    }
    for neighbour in &config.neighbours {
        apply_neighbour(pod, neighbour).await?;
    }
    Ok(())
}

/// Takes the interface with this MAC down and moves it back to the agent's namespace.
///
/// # Errors
/// When the pod has none.
pub async fn remove_interface(pod: &Connection, mac: &str) -> Result<(), NetworkError> {
    let link = find(pod, parse::mac(mac)?).await?.ok_or_else(|| NetworkError::NoInterface(mac.to_owned()))?;
    let index = link.header.index;
    let name = unused_name(index);
    let own = std::fs::File::open("/proc/self/ns/net")
        .map_err(|source| NetworkError::Io { action: "open the agent's network namespace", source })?;
    let down = LinkUnspec::new_with_index(index).down().build();
    pod.handle.link().set(down).execute().await.map_err(NetworkError::netlink(format!("take {mac} down")))?;
    let away = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::IfName(name))
        .append_extra_attribute(LinkAttribute::NetNsFd(own.as_raw_fd()))
        .build();
    pod.handle.link().set(away).execute().await.map_err(NetworkError::netlink(format!("move {mac} out")))
}

async fn apply_interface(pod: &Connection, interface: &Interface) -> Result<(), NetworkError> {
    let link = match find(pod, interface.mac).await? {
        Some(link) => link,
        None => move_in(pod, interface).await?,
    };
    let index = link.header.index;
    let name = &interface.name;
    if name_of(&link) != Some(name) {
        // An interface that is up can not be renamed.
        let down = LinkUnspec::new_with_index(index).down().build();
        set(pod, down, &format!("take {name} down")).await?;
        let renamed = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::IfName(name.clone()))
            .build();
        set(pod, renamed, &format!("rename an interface to {name}")).await?;
    }
    if let Some(mtu) = interface.mtu {
        let message =
            LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::Mtu(mtu)).build();
        set(pod, message, &format!("set the MTU of {name} to {mtu}")).await?;
    }
    for address in &interface.addresses {
        apply_address(pod, index, address, name).await?;
    }
    set_up(pod, index, name).await
}

async fn apply_address(
    pod: &Connection,
    index: u32,
    prefix: &Prefix,
    device: &str,
) -> Result<(), NetworkError> {
    let mut request = pod.handle.address().add(index, prefix.address, prefix.length).replace();
    if prefix.address.is_ipv6() {
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    let action = format!("add {}/{} to {device}", prefix.address, prefix.length);
    request.execute().await.map_err(NetworkError::netlink(action))
}

async fn apply_route(pod: &Connection, route: &Route) -> Result<(), NetworkError> {
    let Prefix { address, length } = route.destination;
    let invalid = |_| NetworkError::invalid("destination", address.to_string());
    let mut builder =
        RouteMessageBuilder::<IpAddr>::new().destination_prefix(address, length).map_err(invalid)?;
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway).map_err(invalid)?;
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(invalid)?;
    }
    if let Some(device) = &route.device {
        builder = builder.output_interface(index_of(pod, device).await?);
    }
    if route.table != 0 {
        builder = builder.table_id(route.table);
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    if route.onlink {
        builder = builder.onlink();
    }
    builder = builder.scope(match route.scope {
        proto::route::Scope::Universe => RouteScope::Universe,
        proto::route::Scope::Link => RouteScope::Link,
        proto::route::Scope::Host => RouteScope::Host,
    });
    if route.mtu != 0 {
        builder.get_mut().attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    let action = format!("add the route to {address}/{length}");
    let request = pod.handle.route().add(builder.build()).replace();
    request.execute().await.map_err(NetworkError::netlink(action))
}

async fn apply_neighbour(pod: &Connection, neighbour: &Neighbour) -> Result<(), NetworkError> {
    let index = index_of(pod, &neighbour.device).await?;
    let request = pod
        .handle
        .neighbours()
        .add(index, neighbour.address)
        .link_layer_address(&neighbour.mac)
        .state(NeighbourState::Permanent)
        .replace();
    request.execute().await.map_err(NetworkError::netlink(format!("add the neighbour {}", neighbour.address)))
}

/// Moves the interface from the agent's namespace to the pod's, under its new name at once: another `eth0` may be
/// there already.
async fn move_in(pod: &Connection, interface: &Interface) -> Result<LinkMessage, NetworkError> {
    let missing = || NetworkError::NoInterface(parse::format_mac(&interface.mac));
    let namespace = pod.namespace_fd().ok_or_else(missing)?;
    let own = Connection::own()?;
    let link = find(&own, interface.mac).await?.ok_or_else(missing)?;
    let message = LinkUnspec::new_with_index(link.header.index)
        .append_extra_attribute(LinkAttribute::IfName(interface.name.clone()))
        .append_extra_attribute(LinkAttribute::NetNsFd(namespace))
        .build();
    // The kernel renames before it moves, so the interface has to be down.
    let down = LinkUnspec::new_with_index(link.header.index).down().build();
    set(&own, down, "take an interface down").await?;
    set(&own, message, &format!("move {} into the pod", interface.name)).await?;
    find(pod, interface.mac).await?.ok_or_else(missing)
}

async fn set_up(pod: &Connection, index: u32, name: &str) -> Result<(), NetworkError> {
    set(pod, LinkUnspec::new_with_index(index).up().build(), &format!("bring {name} up")).await
}

async fn set(to: &Connection, message: LinkMessage, action: &str) -> Result<(), NetworkError> {
    to.handle.link().set(message).execute().await.map_err(NetworkError::netlink(action))
}

async fn find(within: &Connection, mac: [u8; 6]) -> Result<Option<LinkMessage>, NetworkError> {
    let mut links = within.handle.link().get().execute();
    let mut found = None;
    // To its end, or the next request would read the rest of the answer.
    while let Some(link) = links.try_next().await.map_err(NetworkError::netlink("list interfaces"))? {
        let has =
            |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Address(bytes) if *bytes == mac);
        if link.attributes.iter().any(has) {
            found = Some(link);
        }
    }
    Ok(found)
}

async fn index_of(pod: &Connection, name: &str) -> Result<u32, NetworkError> {
    let missing = |_| NetworkError::NoInterface(name.to_owned());
    let mut links = pod.handle.link().get().match_name(name).execute();
    let link = links.try_next().await.map_err(missing)?;
    link.map(|link| link.header.index).ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
}

pub(super) fn name_of(link: &LinkMessage) -> Option<&String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    })
}

/// A name for a device that goes back to the agent's namespace, where its own may be taken.
fn unused_name(index: u32) -> String {
    format!("spare{index}")
}
