//! Rates that a device is held to.

use serde::{Deserialize, Serialize};

/// The limits of one direction of a device. What is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimits {
    /// Tokens are bytes of payload.
    pub bytes: Option<Bucket>,
    /// Tokens are requests (block) or frames (net).
    pub operations: Option<Bucket>,
}

/// One token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// Tokens in a full bucket.
    pub size: u64,
    /// How long an empty bucket takes to fill, in milliseconds.
    pub refill_ms: u64,
    /// Tokens that are there once at the start, on top of a full bucket, and never come back.
    #[serde(default)]
    pub initial_burst: u64,
}
