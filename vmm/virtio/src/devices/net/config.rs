use caisson_vmm_api::devices::NetConfig;
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

/// Entries of each of the two queues.
pub const QUEUE_SIZE: u16 = 256;
/// The largest frame: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;
/// The smallest frame: an Ethernet header.
pub(super) const MIN_FRAME: usize = 14;
/// The smallest MTU that IPv4 allows (RFC 791).
pub const MIN_MTU: u16 = 68;

/// The configuration space (VIRTIO 1.3, section 5.1.4): address, status, number of queue pairs, MTU.
pub(super) fn read_space(config: &NetConfig, offset: u64, data: &mut [u8]) {
    let status = u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or_default();
    let fields = config.mac.bytes().into_iter().chain(status.to_le_bytes());
    let fields = fields.chain(1u16.to_le_bytes()).chain(config.mtu.unwrap_or_default().to_le_bytes());
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    data.iter_mut().zip(fields.skip(skip)).for_each(|(to, from)| *to = from);
}
