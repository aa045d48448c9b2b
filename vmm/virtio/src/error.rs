use std::io;

/// Why a device gave up on its driver, or lost its backend.
///
/// The transport answers by setting DEVICE_NEEDS_RESET and leaving the device alone until it is reset: a
/// hostile driver ends its own device and nothing else.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the protocol in a way that leaves no defined next step.
    #[error("queue {queue}: driver error: {what}")]
    Driver {
        /// The queue on which it happened.
        queue: usize,
        /// What it did.
        what: &'static str,
    },
    /// The driver moved the available index back, or by more chains than the queue can hold.
    #[error("queue {queue}: the driver moved the available index to {available}, where {next} comes next")]
    AvailableIndex {
        /// The queue on which it happened.
        queue: usize,
        /// Where the driver puts the next chain, as it says.
        available: u16,
        /// Where the device would read the next one.
        next: u16,
    },
    /// The ring itself could not be read or written (such as an address outside memory).
    #[error("queue {queue}: broken ring")]
    Ring {
        /// The queue on which it happened.
        queue: usize,
        /// What the queue implementation found.
        #[source]
        source: virtio_queue::Error,
    },
    /// The host side failed in a way that the device cannot hide.
    #[error("backend")]
    Backend(#[source] io::Error),
}
