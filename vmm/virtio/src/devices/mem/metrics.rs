use serde::Serialize;

use crate::metrics::Counter;

/// What the memory device did.
#[derive(Debug, Default, Serialize)]
pub struct MemoryMetrics {
    /// Bytes plugged since the start.
    pub plugged_bytes: Counter,
    /// Bytes unplugged since the start.
    pub unplugged_bytes: Counter,
    /// Requests that were wrong, or that the host could not fulfil.
    pub refused_requests: Counter,
}
