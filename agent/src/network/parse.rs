//! From the protocol's strings to addresses, all checked.

use std::net::IpAddr;

use caisson_protocol::v1 as proto;

use super::NetworkError;

/// IFNAMSIZ without its null byte.
const MAX_NAME: usize = 15;

/// An address and its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) address: IpAddr,
    pub(super) length: u8,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) mac: [u8; 6],
    pub(super) name: String,
    pub(super) mtu: Option<u32>,
    pub(super) addresses: Vec<Prefix>,
    /// Whether each address brings a route to its prefix.
    pub(super) prefix_routes: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Prefix,
    pub(super) gateway: Option<IpAddr>,
    pub(super) device: Option<String>,
    pub(super) source: Option<IpAddr>,
    pub(super) scope: proto::route::Scope,
    pub(super) table: u32,
    pub(super) metric: u32,
    pub(super) mtu: u32,
    pub(super) onlink: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) address: IpAddr,
    pub(super) device: String,
    pub(super) mac: [u8; 6],
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) interfaces: Vec<Interface>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

pub(super) fn config(config: &proto::NetworkConfig) -> Result<Config, NetworkError> {
    Ok(Config {
        interfaces: config.interfaces.iter().map(interface).collect::<Result<_, _>>()?,
        routes: config.routes.iter().map(route).collect::<Result<_, _>>()?,
        neighbours: config.neighbours.iter().map(neighbour).collect::<Result<_, _>>()?,
    })
}

fn interface(interface: &proto::Interface) -> Result<Interface, NetworkError> {
    Ok(Interface {
        mac: mac(&interface.mac)?,
        name: device_name(&interface.name)?,
        mtu: (interface.mtu != 0).then_some(interface.mtu),
        addresses: interface
            .addresses
            .iter()
            .map(|text| prefix("address", text))
            .collect::<Result<_, _>>()?,
        prefix_routes: !interface.no_prefix_routes,
    })
}

fn route(route: &proto::Route) -> Result<Route, NetworkError> {
    let gateway = optional(&route.gateway, |text| address("gateway", text))?;
    let source = optional(&route.source, |text| address("source", text))?;
    let device = optional(&route.device, device_name)?;
    let destination = if route.destination.is_empty() {
        let gateway = gateway.ok_or_else(|| NetworkError::invalid("gateway", ""))?;
        Prefix { address: unspecified(gateway), length: 0 }
    } else {
        prefix("destination", &route.destination)?
    };
    let same_family = |other: &IpAddr| other.is_ipv4() == destination.address.is_ipv4();
    if !gateway.iter().chain(&source).all(same_family) {
        return Err(NetworkError::invalid("gateway", &route.gateway));
    }
    if gateway.is_none() && device.is_none() {
        return Err(NetworkError::invalid("device", ""));
    }
    let scope = proto::route::Scope::try_from(route.scope)
        .map_err(|_| NetworkError::invalid("scope", route.scope.to_string()))?;
    Ok(Route {
        destination,
        gateway,
        device,
        source,
        scope,
        table: route.table,
        metric: route.metric,
        mtu: route.mtu,
        onlink: route.onlink,
    })
}

fn neighbour(neighbour: &proto::Neighbour) -> Result<Neighbour, NetworkError> {
    Ok(Neighbour {
        address: address("address", &neighbour.address)?,
        device: device_name(&neighbour.device)?,
        mac: mac(&neighbour.mac)?,
    })
}

fn optional<T>(
    text: &str,
    parse: impl FnOnce(&str) -> Result<T, NetworkError>,
) -> Result<Option<T>, NetworkError> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    }
}

pub(super) fn address(field: &'static str, text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::invalid(field, text))
}

fn prefix(field: &'static str, text: &str) -> Result<Prefix, NetworkError> {
    let invalid = || NetworkError::invalid(field, text);
    let (address, length) = text.split_once('/').ok_or_else(invalid)?;
    let address: IpAddr = address.parse().map_err(|_| invalid())?;
    let length: u8 = length.parse().map_err(|_| invalid())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if length > most {
        return Err(invalid());
    }
    Ok(Prefix { address, length })
}

pub(super) fn mac(text: &str) -> Result<[u8; 6], NetworkError> {
    let invalid = || NetworkError::invalid("mac", text);
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(invalid)?;
        if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
    }
    if parts.next().is_some() { Err(invalid()) } else { Ok(bytes) }
}

/// As the kernel's dev_valid_name().
fn device_name(name: &str) -> Result<String, NetworkError> {
    let valid = (1..=MAX_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.bytes().any(|byte| byte == b'/' || byte == b':' || byte.is_ascii_whitespace() || byte == 0);
    if valid { Ok(name.to_owned()) } else { Err(NetworkError::invalid("name", name)) }
}

pub(super) fn format_mac(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prefixes() {
        assert_eq!(prefix("a", "10.0.0.5/24").unwrap().length, 24);
        assert_eq!(prefix("a", "fd00::1/128").unwrap().length, 128);
        for bad in ["10.0.0.5", "10.0.0.5/33", "fd00::1/129", "10.0.0/8", "/8", "10.0.0.5/-1", "10.0.0.5/ 8"]
        {
            assert!(prefix("a", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_what_the_kernel_takes() {
        assert!(device_name("eth0").is_ok());
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "0123456789abcdef"] {
            assert!(device_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_default_route_takes_its_family_from_the_gateway() {
        let parsed = route(&proto::Route { gateway: "fd00::1".into(), ..proto::Route::default() }).unwrap();
        assert_eq!(parsed.destination, Prefix { address: "::".parse().unwrap(), length: 0 });
        let mixed = proto::Route {
            gateway: "fd00::1".into(),
            destination: "10.0.0.0/8".into(),
            ..Default::default()
        };
        assert!(route(&mixed).is_err());
        assert!(route(&proto::Route::default()).is_err());
        let nowhere = proto::Route { destination: "10.0.0.0/8".into(), ..Default::default() };
        assert!(route(&nowhere).is_err());
    }

    proptest! {
        #[test]
        fn macs_survive(bytes: [u8; 6]) {
            prop_assert_eq!(mac(&format_mac(&bytes)).unwrap(), bytes);
        }

        #[test]
        fn strings_never_panic(text in ".{0,24}") {
            let _ = (mac(&text), prefix("x", &text), device_name(&text));
        }
    }
}
