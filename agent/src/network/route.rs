//! Messages of routes (`struct rtmsg` of rtnetlink(7), and its attributes).

use std::collections::HashMap;
use std::net::IpAddr;

use caisson_protocol::v1 as proto;
use netlink_packet_core::{DecodeError, Emitable, Parseable};
use netlink_packet_route::route::{RouteFlags, RouteHeader, RouteProtocol, RouteScope, RouteType};

use super::attributes::Attributes;
use super::parse::Route;

// Attributes, of linux/rtnetlink.h.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
/// In RTA_METRICS.
const RTAX_MTU: u16 = 2;

/// The kernel's own entries, of linux/rtnetlink.h.
const RT_TABLE_LOCAL: u32 = 255;

/// A route as the kernel tells it, or is told.
#[derive(Default)]
pub(super) struct RouteMessage {
    header: RouteHeader,
    attributes: Attributes,
}

impl RouteMessage {
    /// For a route through the interface with this index, if one is named.
    pub(super) fn new(route: &Route, device: Option<u32>) -> Self {
        let mut message = Self::default();
        let header = &mut message.header;
        header.address_family = super::family(route.destination.address);
        header.destination_prefix_length = route.destination.length;
        // Its number is an attribute, as it may be too large for the header.
        header.table = RouteHeader::RT_TABLE_UNSPEC;
        header.protocol = RouteProtocol::Static;
        header.kind = RouteType::Unicast;
        header.scope = match route.scope {
            proto::route::Scope::Universe => RouteScope::Universe,
            proto::route::Scope::Link => RouteScope::Link,
            proto::route::Scope::Host => RouteScope::Host,
        };
        header.flags.set(RouteFlags::Onlink, route.onlink);
        let main = u32::from(RouteHeader::RT_TABLE_MAIN);
        let table = if route.table == 0 { main } else { route.table };
        let addresses = [
            (RTA_DST, Some(route.destination.address)),
            (RTA_GATEWAY, route.gateway),
            (RTA_PREFSRC, route.source),
        ];
        for (kind, address) in addresses {
            match address {
                Some(IpAddr::V4(address)) => message.attributes.push(kind, address.octets()),
                Some(IpAddr::V6(address)) => message.attributes.push(kind, address.octets()),
                None => {}
            }
        }
        let numbers = [
            (RTA_TABLE, Some(table)),
            (RTA_OIF, device),
            (RTA_PRIORITY, Some(route.metric).filter(|&metric| metric != 0)),
        ];
        for (kind, number) in numbers {
            if let Some(number) = number {
                message.attributes.push(kind, number.to_ne_bytes());
            }
        }
        if route.mtu != 0 {
            let mut metrics = Attributes::default();
            metrics.push(RTAX_MTU, route.mtu.to_ne_bytes());
            message.attributes.nest(RTA_METRICS, &metrics);
        }
        message
    }

    /// What the protocol says of a unicast route outside of the local table; `names` are the interfaces'. None: it is
    /// another, or has addresses that are not IP's.
    pub(super) fn told(&self, names: &HashMap<u32, String>) -> Option<proto::Route> {
        let (header, attributes) = (&self.header, &self.attributes);
        let table = attributes.number(RTA_TABLE).unwrap_or(header.table.into());
        if header.kind != RouteType::Unicast || table == RT_TABLE_LOCAL {
            return None;
        }
        let text = |kind, suffix: &str| match attributes.value(kind) {
            Some(bytes) => ip(bytes).map(|address| format!("{address}{suffix}")),
            None => Some(String::new()),
        };
        let device = attributes.number(RTA_OIF).and_then(|index| names.get(&index));
        let metrics = attributes.value(RTA_METRICS).and_then(|bytes| Attributes::parse(bytes).ok());
        let scope = match header.scope {
            RouteScope::Link => proto::route::Scope::Link,
            RouteScope::Host => proto::route::Scope::Host,
            _ => proto::route::Scope::Universe,
        };
        Some(proto::Route {
            destination: text(RTA_DST, &format!("/{}", header.destination_prefix_length))?,
            gateway: text(RTA_GATEWAY, "")?,
            source: text(RTA_PREFSRC, "")?,
            device: device.cloned().unwrap_or_default(),
            scope: scope.into(),
            table: if table == u32::from(RouteHeader::RT_TABLE_MAIN) { 0 } else { table },
            metric: attributes.number(RTA_PRIORITY).unwrap_or(0),
            mtu: metrics.and_then(|metrics| metrics.number(RTAX_MTU)).unwrap_or(0),
            onlink: header.flags.contains(RouteFlags::Onlink),
        })
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

impl Emitable for RouteMessage {
    fn buffer_len(&self) -> usize {
        self.header.buffer_len() + self.attributes.buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        let (header, attributes) = buffer.split_at_mut(self.header.buffer_len());
        self.header.emit(header);
        self.attributes.emit(attributes);
    }
}

impl Parseable<[u8]> for RouteMessage {
    fn parse(bytes: &[u8]) -> Result<Self, DecodeError> {
        let header = RouteHeader::parse(bytes)?;
        let attributes = Attributes::parse(bytes.get(header.buffer_len()..).unwrap_or_default())?;
        Ok(Self { header, attributes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::network::parse::Prefix;

    fn route(destination: &str, length: u8) -> Route {
        Route {
            destination: Prefix { address: destination.parse().unwrap(), length },
            gateway: None,
            device: None,
            source: None,
            scope: proto::route::Scope::Universe,
            table: 0,
            metric: 0,
            mtu: 0,
            onlink: false,
        }
    }

    fn told(route: &Route, device: Option<u32>) -> Option<proto::Route> {
        let message = RouteMessage::new(route, device);
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        RouteMessage::parse(&bytes).unwrap().told(&HashMap::from([(7, "eth0".to_owned())]))
    }

    #[test]
    fn a_route_is_read_back_as_it_was_written() {
        let bare = proto::Route { destination: "fd00::/64".into(), ..proto::Route::default() };
        assert_eq!(told(&route("fd00::", 64), None), Some(bare));
        let whole = Route {
            gateway: Some("10.0.0.1".parse().unwrap()),
            source: Some("10.0.0.2".parse().unwrap()),
            scope: proto::route::Scope::Link,
            table: 1000,
            metric: 5,
            mtu: 1400,
            onlink: true,
            ..route("10.1.0.0", 16)
        };
        let wanted = proto::Route {
            destination: "10.1.0.0/16".into(),
            gateway: "10.0.0.1".into(),
            source: "10.0.0.2".into(),
            device: "eth0".into(),
            scope: proto::route::Scope::Link.into(),
            table: 1000,
            metric: 5,
            mtu: 1400,
            onlink: true,
        };
        assert_eq!(told(&whole, Some(7)), Some(wanted));
    }

    #[test]
    fn the_kernels_own_routes_are_left_out() {
        assert_eq!(told(&Route { table: RT_TABLE_LOCAL, ..route("10.0.0.0", 8) }, None), None);
        let mut message = RouteMessage::new(&route("10.0.0.0", 8), None);
        message.header.kind = RouteType::BlackHole;
        assert_eq!(message.told(&HashMap::new()), None);
    }

    #[test]
    fn a_message_is_as_the_kernel_has_it() {
        let message = RouteMessage::new(&Route { mtu: 1400, ..route("10.0.0.0", 8) }, Some(7));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        // struct rtmsg of an AF_INET route by RTPROT_STATIC; RTA_DST, RTA_TABLE, RTA_OIF, RTA_METRICS with RTAX_MTU.
        let wanted: &[&[u8]] = &[
            &[2, 8, 0, 0, 0, 4, 0, 1, 0, 0, 0, 0],
            &[8, 0, 1, 0, 10, 0, 0, 0],
            &[8, 0, 15, 0, 254, 0, 0, 0],
            &[8, 0, 4, 0, 7, 0, 0, 0],
            &[12, 0, 8, 0, 8, 0, 2, 0, 0x78, 5, 0, 0],
        ];
        assert_eq!(bytes, wanted.concat());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = RouteMessage::parse(&bytes) {
                let _ = message.told(&HashMap::new());
            }
        }
    }
}
