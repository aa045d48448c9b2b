use serde::Serialize;

use crate::metrics::Counter;

/// A disk's counters.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Requests to read that succeeded.
    pub reads: Counter,
    /// Bytes that they read.
    pub read_bytes: Counter,
    /// Requests to write that succeeded.
    pub writes: Counter,
    /// Bytes that they wrote.
    pub written_bytes: Counter,
    /// Flushes that succeeded.
    pub flushes: Counter,
    /// Discards that succeeded.
    pub discards: Counter,
    /// Write-zeroes requests that succeeded.
    pub write_zeroes: Counter,
    /// Requests that the host failed.
    pub failed: Counter,
    /// Requests that were refused: beyond the end, malformed, of an unknown kind, or writing to a read-only
    /// disk.
    pub refused: Counter,
    /// Times that a request had to wait for the rate limiter.
    pub throttled: Counter,
}
