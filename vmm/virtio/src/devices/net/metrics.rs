use serde::Serialize;

use crate::metrics::Counter;

/// A network card's counters. Received (rx) is what the guest receives.
#[derive(Debug, Default, Serialize)]
pub struct NetMetrics {
    /// Frames received.
    pub rx_frames: Counter,
    /// Their bytes, headers of the device not counted.
    pub rx_bytes: Counter,
    /// Times that there was no buffer for a frame.
    pub rx_starved: Counter,
    /// Times that a frame waited for the rate limiter.
    pub rx_throttled: Counter,
    /// Times that the tap device failed to deliver.
    pub rx_failed: Counter,
    /// Frames sent.
    pub tx_frames: Counter,
    /// Their bytes, headers of the device not counted.
    pub tx_bytes: Counter,
    /// Frames dropped for a header or a length that makes no sense or was not negotiated.
    pub tx_malformed: Counter,
    /// Times that a frame waited for the rate limiter.
    pub tx_throttled: Counter,
    /// Frames that the tap device refused.
    pub tx_failed: Counter,
}
