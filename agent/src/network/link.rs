//! Messages of network interfaces (`struct ifinfomsg` of rtnetlink(7), and its attributes).

use std::os::fd::{AsRawFd, BorrowedFd};

use caisson_protocol::v1::InterfaceCounters;
use netlink_packet_core::{DecodeError, Emitable, Parseable};
use netlink_packet_route::link::{LinkFlags, LinkHeader};

use super::attributes::Attributes;

// Attributes, of linux/if_link.h.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_STATS64: u16 = 23;
const IFLA_NET_NS_FD: u16 = 28;

/// An interface as the kernel tells it, or a change of one: what is not named stays.
#[derive(Default)]
pub(super) struct Link {
    header: LinkHeader,
    attributes: Attributes,
}

impl Link {
    /// A change of the link with this index, of nothing so far.
    pub(super) fn change(index: u32) -> Self {
        Self { header: LinkHeader { index, ..LinkHeader::default() }, attributes: Attributes::default() }
    }

    /// Up or down.
    pub(super) fn up(mut self, up: bool) -> Self {
        self.header.change_mask = LinkFlags::Up;
        self.header.flags.set(LinkFlags::Up, up);
        self
    }

    /// Another name.
    pub(super) fn name(self, name: &str) -> Self {
        let mut value = name.as_bytes().to_vec();
        value.push(0);
        self.with(IFLA_IFNAME, value)
    }

    /// Another MTU.
    pub(super) fn mtu(self, mtu: u32) -> Self {
        self.with(IFLA_MTU, mtu.to_ne_bytes())
    }

    /// Another network namespace.
    pub(super) fn namespace(self, namespace: BorrowedFd<'_>) -> Self {
        self.with(IFLA_NET_NS_FD, namespace.as_raw_fd().to_ne_bytes())
    }

    fn with(mut self, kind: u16, value: impl Into<Vec<u8>>) -> Self {
        self.attributes.push(kind, value);
        self
    }

    pub(super) fn index(&self) -> u32 {
        self.header.index
    }

    pub(super) fn is_up(&self) -> bool {
        self.header.flags.contains(LinkFlags::Up)
    }

    pub(super) fn is_loopback(&self) -> bool {
        self.header.flags.contains(LinkFlags::Loopback)
    }

    /// Its name; empty if the kernel did not tell.
    pub(super) fn told_name(&self) -> String {
        let bytes = self.attributes.value(IFLA_IFNAME).unwrap_or_default();
        String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
    }

    pub(super) fn mac(&self) -> Option<&[u8]> {
        self.attributes.value(IFLA_ADDRESS)
    }

    pub(super) fn told_mtu(&self) -> Option<u32> {
        self.attributes.number(IFLA_MTU)
    }

    /// `struct rtnl_link_stats64`, which may grow at its end.
    pub(super) fn counters(&self) -> Option<InterfaceCounters> {
        let (numbers, _) = self.attributes.value(IFLA_STATS64)?.as_chunks::<8>();
        let [rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped] =
            numbers.first_chunk()?.map(u64::from_ne_bytes);
        Some(InterfaceCounters {
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
        })
    }
}

impl Emitable for Link {
    fn buffer_len(&self) -> usize {
        self.header.buffer_len() + self.attributes.buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        let (header, attributes) = buffer.split_at_mut(self.header.buffer_len());
        self.header.emit(header);
        self.attributes.emit(attributes);
    }
}

impl Parseable<[u8]> for Link {
    fn parse(bytes: &[u8]) -> Result<Self, DecodeError> {
        let header = LinkHeader::parse(bytes)?;
        let attributes = Attributes::parse(bytes.get(header.buffer_len()..).unwrap_or_default())?;
        Ok(Self { header, attributes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_change_is_read_back_as_it_was_written() {
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        let change = Link::change(7).up(true).name("eth0").mtu(1400).namespace(namespace.as_fd());
        let mut bytes = vec![0; change.buffer_len()];
        change.emit(&mut bytes);
        let read = Link::parse(&bytes).unwrap();
        assert_eq!((read.index(), read.is_up(), read.is_loopback()), (7, true, false));
        assert_eq!((read.told_name().as_str(), read.told_mtu()), ("eth0", Some(1400)));
        assert_eq!(read.attributes.value(IFLA_NET_NS_FD), Some(&namespace.as_raw_fd().to_ne_bytes()[..]));
        assert!(read.mac().is_none() && read.counters().is_none());
    }

    #[test]
    fn counters_are_told_by_their_places() {
        let numbers: Vec<u8> = (1_u64..=24).flat_map(u64::to_ne_bytes).collect();
        let counters = Link::default().with(IFLA_STATS64, numbers).counters().unwrap();
        assert_eq!((counters.rx_packets, counters.tx_packets, counters.rx_bytes), (1, 2, 3));
        assert_eq!((counters.tx_bytes, counters.rx_errors, counters.tx_errors), (4, 5, 6));
        assert_eq!((counters.rx_dropped, counters.tx_dropped), (7, 8));
        assert!(Link::default().with(IFLA_STATS64, vec![0; 63]).counters().is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(link) = Link::parse(&bytes) {
                let _ = (link.told_name(), link.mac(), link.told_mtu(), link.counters());
            }
        }
    }
}
