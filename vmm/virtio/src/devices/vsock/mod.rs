//! The socket device (VIRTIO 1.3, section 5.10): streams between the guest and unix sockets of the host.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the device |
//! | `queue.rs` | descriptor chains: packets in, packets out, events |
//! | `muxer.rs` | all connections: lookup, turns, deadlines, the host's sockets |
//! | `connection.rs`, `credit.rs` | one connection as a state machine, and its flow control |
//! | `stream.rs`, `handshake.rs`, `poller.rs` | a host's socket, the line that opens it, waiting for all of them |
//! | `host.rs` | how connections enter and leave on the host's side |
//! | `packet.rs` | the packet's header |
//! | `limits.rs` | how much a guest can hold, and for how long |
//! | `state.rs`, `metrics.rs` | the saved state, the counters |
//!
//! # Who could do harm
//!
//! *The guest* may send any bytes in any order. A packet that breaks a connection's rules ends that
//! connection; a ring or chain that is broken ends the device until it is reset. Data goes between guest
//! memory and sockets by the kernel, without a copy here, so there is little to get wrong; only what a slow
//! reader has not taken yet is held, and no more than the guest has credit for. *The host's clients* are
//! those who can reach the socket; a slow one costs its own connection's credit.
//!
//! The packet type of the `virtio-vsock` crate is not used: it takes a packet's data as one piece of memory,
//! while Linux sends data of MSG_ZEROCOPY as one descriptor per page.

mod connection;
mod credit;
mod handshake;
mod host;
mod limits;
mod metrics;
mod muxer;
pub mod packet;
mod poller;
mod queue;
mod state;
mod stream;
#[cfg(any(test, feature = "test-utils"))]
mod tests;

use std::{io, sync::Arc};

pub use host::{DialReceiver, Dialer, HostEnd, PassingDialer, PathDialer};
pub use limits::{MAX_CONNECTIONS, Timeouts};
pub use metrics::VsockMetrics;
pub use state::{VsockResources, VsockState};
#[cfg(any(test, feature = "test-utils"))]
pub use tests::exercise_device;

use caisson_vmm_api::devices::VsockConfig;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::epoll::EventSet;

use self::{
    muxer::Muxer,
    queue::{EVENT, Progress, Queues},
};
use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, PollSource, SavedQueue,
    VirtioDevice,
};

/// VIRTIO_VSOCK_F_STREAM: stream sockets are supported.
const FEATURE_STREAM: u32 = 0;

/// Receive, transmit, event. A guest keeps the receive queue full of buffers of 4 KiB, which is memory that it can't
/// use otherwise.
const QUEUE_SIZES: [u16; 3] = [64, 256, 16];

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The guest's address is one that VIRTIO keeps for other uses (section 5.10.4): 0, 1, 2 and 2^32 - 1.
    #[error("guest_cid {0} is reserved")]
    ReservedCid(u32),
    /// The descriptors that it waits on could not be made.
    #[error("preparing to wait for sockets")]
    Poll(#[source] io::Error),
}

/// The device; see the module's description.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    active: Option<Queues>,
    metrics: Arc<VsockMetrics>,
}

impl Vsock {
    /// A new device. `host`: its sockets on the host's side, already open.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn new(config: VsockConfig, host: HostEnd) -> Result<Self, VsockError> {
        Self::with_timeouts(config, host, Timeouts::default())
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        self.metrics.clone()
    }

    /// As [`new`](Self::new), with other patience.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn with_timeouts(config: VsockConfig, host: HostEnd, timeouts: Timeouts) -> Result<Self, VsockError> {
        if matches!(config.guest_cid, 0..=2 | u32::MAX) {
            return Err(VsockError::ReservedCid(config.guest_cid));
        }
        let guest_cid = u64::from(config.guest_cid);
        let metrics = Arc::<VsockMetrics>::default();
        let muxer = Muxer::new(guest_cid, host, timeouts, metrics.clone()).map_err(VsockError::Poll)?;
        Ok(Self { guest_cid, muxer, active: None, metrics })
    }

    /// Connections, and bytes allocated for them.
    #[cfg(test)]
    fn holdings(&self) -> (usize, usize) {
        self.muxer.holdings()
    }

    /// Moves whatever can be moved. Cheap when nothing can, so events need not be told apart.
    fn run(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &mut self.active else { return Ok(()) };
        queues.handle_events()?;
        let mut more = false;
        // The two queues may wait for each other once: resets need receive buffers, packets room for resets.
        for _ in 0..2 {
            let sent = queues.transmit(&mut self.muxer)?;
            let received = queues.receive(&mut self.muxer)?;
            let unblocked = sent == Progress::Blocked && self.muxer.takes_packets();
            more = unblocked || sent == Progress::More || received == Progress::More;
            if !unblocked {
                break;
            }
        }
        // Whoever is accepted, or ended, may have something to send as well.
        self.muxer.settle(queues.held_until()).map_err(DeviceError::Backend)?;
        let received = queues.receive(&mut self.muxer)?;
        if more || received == Progress::More {
            self.muxer.ring().map_err(DeviceError::Backend)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> DeviceId {
        DeviceId::Vsock
    }

    fn features(&self) -> u64 {
        [FEATURE_STREAM, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC]
            .iter()
            .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.get(start..).unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let restored = activation.restored;
        // The last one, for events, may stay disabled.
        let mut active = Queues::new(activation.into_queues(EVENT)?, self.metrics.clone());
        // A restored guest holds connections that are gone.
        if restored && active.queues[EVENT].is_ready() {
            active.reset_transport(self.muxer.timeouts().transport_reset);
        }
        self.active = Some(active);
        // Notifications from before do not come again, nor do edges of the host's sockets: look at
        // everything.
        self.muxer.ring().map_err(ActivateError::Backend)
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.clear();
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        vec![PollSource { fd: self.muxer.fd(), events: EventSet::IN, token: 0 }]
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        if self.active.is_some() && matches!(event, DeviceEvent::Source { .. }) {
            self.muxer.dispatch().map_err(DeviceError::Backend)?;
        }
        self.run()
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        // Nothing is ever in flight between two calls, and the connections stay with this machine.
        Ok(self.active.iter().flat_map(|active| &active.queues).map(DeviceQueue::state).collect())
    }
}
