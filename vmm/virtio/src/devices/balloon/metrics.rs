use serde::Serialize;

use crate::metrics::Counter;

/// What the balloon did.
#[derive(Debug, Default, Serialize)]
pub struct BalloonMetrics {
    /// Pages of 4 KiB that the driver put into the balloon.
    pub inflated_pages: Counter,
    /// Pages of 4 KiB that it took out again.
    pub deflated_pages: Counter,
    /// Bytes of free memory that it reported.
    pub reported_bytes: Counter,
    /// Ranges that were not given back: outside guest memory, or refused by the host.
    pub discard_failures: Counter,
}
