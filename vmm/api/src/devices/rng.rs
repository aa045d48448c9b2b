//! Options of the entropy source.

use serde::{Deserialize, Serialize};

use super::{Bucket, RateLimits};

/// How the entropy device is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// How fast the guest may draw entropy. Every request counts as 1 KiB, however little it asks
    /// for. By default 256 KiB a second, with bursts of as much: 256 requests.
    pub rate: RateLimits,
}

impl Default for RngConfig {
    fn default() -> Self {
        let bucket = Bucket { size: 256 << 10, refill_ms: 1000, initial_burst: 0 };
        Self { rate: RateLimits { bytes: Some(bucket), operations: None } }
    }
}
