use serde::Serialize;

use crate::metrics::Counter;

/// What the entropy device did.
#[derive(Debug, Default, Serialize)]
pub struct RngMetrics {
    /// Requests answered.
    pub requests: Counter,
    /// Random bytes handed out.
    pub bytes: Counter,
    /// How often a request had to wait for the rate limiter.
    pub throttled: Counter,
}
