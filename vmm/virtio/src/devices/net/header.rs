//! The header in front of each frame (VIRTIO 1.3, section 5.1.6), and which offloads it may ask for.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::config::{MAX_FRAME, MIN_FRAME};

/// Bytes of the header: with `num_buffers`, as VIRTIO 1.0 and later have it.
pub const HEADER: usize = 12;
/// Where `num_buffers` is in it.
pub(super) const NUM_BUFFERS: usize = 10;

bitflags::bitflags! {
    /// What one side may leave to the other: bit for bit the TUN_F_* flags of TUNSETOFFLOAD.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums.
        const CSUM = 0x01;
        /// Segmentation of TCP over IPv4.
        const TSO4 = 0x02;
        /// Segmentation of TCP over IPv6.
        const TSO6 = 0x04;
        /// Segmentation of TCP with ECN.
        const TSO_ECN = 0x08;
        /// Segmentation of UDP over IPv4.
        const USO4 = 0x20;
        /// Segmentation of UDP over IPv6.
        const USO6 = 0x40;
    }
}

/// Which feature bit stands for what the host may leave to the guest.
const TO_GUEST: [(u32, Offloads); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, Offloads::TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, Offloads::USO4),
    (VIRTIO_NET_F_GUEST_USO6, Offloads::USO6),
];

/// Which feature bit stands for what the guest may leave to the host.
const TO_HOST: [(u32, Offloads); 5] = [
    (VIRTIO_NET_F_CSUM, Offloads::CSUM),
    (VIRTIO_NET_F_HOST_TSO4, Offloads::TSO4),
    (VIRTIO_NET_F_HOST_TSO6, Offloads::TSO6),
    (VIRTIO_NET_F_HOST_ECN, Offloads::TSO_ECN),
    (VIRTIO_NET_F_HOST_USO, Offloads::USO4.union(Offloads::USO6)),
];

impl Offloads {
    /// The feature bits to offer, for both directions.
    pub(super) fn feature_bits(self) -> impl Iterator<Item = u32> {
        let offered = move |(bit, offload): (u32, Self)| self.contains(offload).then_some(bit);
        TO_GUEST.into_iter().chain(TO_HOST).filter_map(offered)
    }

    /// What the host may leave to a guest that accepted `features`.
    pub(super) fn to_guest(features: u64) -> Self {
        Self::accepted(&TO_GUEST, features)
    }

    /// What a guest that accepted `features` may leave to the host.
    pub(super) fn to_host(features: u64) -> Self {
        Self::accepted(&TO_HOST, features)
    }

    /// Each of the others depends on checksums (section 5.1.3.1), and the kernel takes both kinds of USO or
    /// none.
    fn accepted(bits: &[(u32, Self)], features: u64) -> Self {
        let accepted = bits.iter().filter(|(bit, _)| features & (1 << bit) != 0);
        let mut offloads = accepted.fold(Self::empty(), |all, &(_, offload)| all | offload);
        if !offloads.contains(Self::CSUM) {
            return Self::empty();
        }
        if !offloads.contains(Self::USO4 | Self::USO6) {
            offloads -= Self::USO4 | Self::USO6;
        }
        offloads
    }
}

/// Why a frame from the guest is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Checks the header of a frame of `len` bytes that the guest sends, and returns it as the tap may see it.
///
/// Bits that mean nothing in this direction are cleared; what was not negotiated, or points outside the
/// frame, is refused.
pub(super) fn check_sent(
    header: [u8; HEADER],
    len: usize,
    allowed: Offloads,
) -> Result<[u8; HEADER], Malformed> {
    if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
        return Err(Malformed);
    }
    let [flags, gso, hl0, hl1, gs0, gs1, cs0, cs1, co0, co1, _, _] = header;
    if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
        // Segments need new checksums, so there is no segmentation without.
        return if u32::from(gso) == VIRTIO_NET_HDR_GSO_NONE { Ok([0; HEADER]) } else { Err(Malformed) };
    }
    let start = usize::from(u16::from_le_bytes([cs0, cs1]));
    let field = start + usize::from(u16::from_le_bytes([co0, co1]));
    if !allowed.contains(Offloads::CSUM) || field + 2 > len {
        return Err(Malformed);
    }
    let needs_csum = 1;
    let ecn = u32::from(gso) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let needed = match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE if !ecn => return Ok([needs_csum, 0, 0, 0, 0, 0, cs0, cs1, co0, co1, 0, 0]),
        VIRTIO_NET_HDR_GSO_TCPV4 => Offloads::TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => Offloads::TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 if !ecn => Offloads::USO4 | Offloads::USO6,
        _ => return Err(Malformed),
    };
    let needed = if ecn { needed | Offloads::TSO_ECN } else { needed };
    let header_len = usize::from(u16::from_le_bytes([hl0, hl1]));
    if !allowed.contains(needed) || header_len > len || [gs0, gs1] == [0, 0] {
        return Err(Malformed);
    }
    Ok([needs_csum, gso, hl0, hl1, gs0, gs1, cs0, cs1, co0, co1, 0, 0])
}
