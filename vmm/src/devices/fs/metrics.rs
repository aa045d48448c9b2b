use serde::Serialize;

use crate::metrics::Counter;

/// A shared directory's counters.
#[derive(Debug, Default, Serialize)]
pub struct FsMetrics {
    /// Requests that were taken up.
    pub requests: Counter,
    /// Bytes of all requests.
    pub request_bytes: Counter,
    /// Bytes of all replies.
    pub reply_bytes: Counter,
    /// Requests that were refused unread: malformed, too large, or of a kind that is not served.
    pub refused: Counter,
}
