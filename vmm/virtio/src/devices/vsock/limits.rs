//! How much of the host one guest can hold, and for how long.

use std::time::Duration;

/// The most connections at one time, half-open and lingering ones included.
pub const MAX_CONNECTIONS: usize = 1024;

/// The most resets that wait for a receive buffer before packets of the guest are left where they are.
pub(super) const MAX_RESETS: usize = 256;

/// The largest and smallest receive buffer of a connection, and what all share beyond the smallest ones.
///
/// A connection is promised a 64th of what is left of the pool, within the two bounds: 256 KiB for the first,
/// less and less for each further one. So few connections are fast, and the most that a guest can make us
/// hold is `POOL` + `MAX_CONNECTIONS` × `SMALLEST_BUFFER` = 24 MiB; it takes a thousand host-side readers
/// that don't read. A promise costs nothing until it is used.
const LARGEST_BUFFER: usize = 256 << 10;
const SMALLEST_BUFFER: usize = 8 << 10;
const POOL: usize = 16 << 20;

/// The buffer of the next connection, when so many bytes are promised to others.
#[expect(clippy::cast_possible_truncation, reason = "no more than LARGEST_BUFFER")]
pub(super) fn buffer_size(promised: usize) -> u32 {
    (POOL.saturating_sub(promised) / 64).clamp(SMALLEST_BUFFER, LARGEST_BUFFER) as u32
}

/// How long to wait for a peer.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For a host's client to say which port it wants.
    pub handshake: Duration,
    /// For the guest to accept a connection.
    pub connect: Duration,
    /// For the guest to confirm the end of a connection, as long as Linux waits for ours.
    pub close: Duration,
    /// For the guest to act on a transport reset after a restore, before it hears of new connections.
    pub transport_reset: Duration,
    /// Until the listener is tried again, when the process is out of descriptors.
    pub accept: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            connect: Duration::from_secs(5),
            close: Duration::from_secs(8),
            transport_reset: Duration::from_secs(2),
            accept: Duration::from_millis(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_stay_within_the_pool_and_the_smallest_buffers() {
        let mut promised = 0;
        assert_eq!(buffer_size(0), 256 << 10);
        for _ in 0..MAX_CONNECTIONS {
            promised += usize::try_from(buffer_size(promised)).unwrap();
        }
        assert!(promised <= POOL + MAX_CONNECTIONS * SMALLEST_BUFFER);
    }
}
