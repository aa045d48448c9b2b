//! What the device counts.

use serde::Serialize;

use crate::metrics::Counter;

/// The counters of a vsock device.
#[derive(Debug, Default, Serialize)]
pub struct VsockMetrics {
    /// Packets to the guest.
    pub rx_packets: Counter,
    /// Bytes of data to the guest.
    pub rx_bytes: Counter,
    /// Packets from the guest.
    pub tx_packets: Counter,
    /// Bytes of data from the guest.
    pub tx_bytes: Counter,
    /// Times that there was something to send and no buffer to send it in.
    pub rx_starved: Counter,
    /// Connections that were opened, from either side.
    pub opened: Counter,
    /// Connections of the guest that were refused.
    pub refused: Counter,
    /// Connections that ended, in whatever way.
    pub closed: Counter,
    /// Connections that were ended because the guest broke the protocol or overran its credit.
    pub violations: Counter,
    /// Connections that were ended because the guest did not answer in time.
    pub timeouts: Counter,
    /// Packets that were dropped: not from the guest's own address, or shorter than they say.
    pub dropped: Counter,
    /// Host clients that were turned away, as they did not say which port they want.
    pub bad_handshakes: Counter,
}
