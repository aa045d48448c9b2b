//! virtio-net: a network card on a tap device (VIRTIO 1.3, section 5.1).
//!
//! | module | owns |
//! |---|---|
//! | `config` | the card in the machine file, and the configuration space |
//! | `backend` | the tap device |
//! | `header` | the header in front of each frame, and offloads |
//! | `rx`, `tx` | the two queues |
//! | `state`, `metrics` | what a snapshot and an observer see |
//!
//! The tap is watched edge-triggered: while the guest has no buffer for a frame, or a limit is reached,
//! nothing spins on a descriptor that stays readable; whatever ends the wait looks at the tap again.

mod backend;
mod config;
mod header;
mod metrics;
mod rx;
mod state;
#[cfg(test)]
mod tests;
mod tx;

use std::{fmt, io, os::fd::AsRawFd, os::fd::OwnedFd, sync::Arc};

use caisson_vmm_api::devices::NetConfig;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS},
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

pub use self::{
    backend::{NetBackend, Tap, TapError},
    config::{MAX_FRAME, MIN_MTU, QUEUE_SIZE},
    header::{HEADER, Offloads},
    metrics::NetMetrics,
    state::{NetResources, NetState},
};
use self::{
    rx::{Negotiated, Receiver},
    tx::Sender,
};
use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, PollSource, SavedQueue,
    VirtioDevice,
    rate_limiter::{RateLimitError, RateLimiter},
};

/// The tap has a frame, or room for one.
const TOKEN_TAP: u32 = 0;
/// There is more to do than one turn allowed.
const TOKEN_AGAIN: u32 = 1;
/// The rate limiter lets received frames through again.
const TOKEN_RX_TIMER: u32 = 2;
/// The rate limiter lets sent frames through again.
const TOKEN_TX_TIMER: u32 = 3;

/// Why a network card could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap was refused.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Smaller than IP allows.
    #[error("mtu must be at least {MIN_MTU}, not {0}")]
    Mtu(u16),
    /// A limit on what is received makes no sense.
    #[error("receive_limits")]
    ReceiveLimits(#[source] RateLimitError),
    /// A limit on what is sent makes no sense.
    #[error("send_limits")]
    SendLimits(#[source] RateLimitError),
    /// An event descriptor could not be made.
    #[error("creating an event descriptor")]
    Event(#[source] io::Error),
}

/// The device, on a tap or, in tests, on something like it.
pub struct Net<B = Tap> {
    config: NetConfig,
    backend: B,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    again: EventFd,
    metrics: Arc<NetMetrics>,
    active: Option<Active>,
}

impl<B> fmt::Debug for Net<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What there is between activation and reset.
struct Active {
    receiver: Receiver,
    sender: Sender,
    /// What the tap has not been told yet.
    new_offloads: Option<Offloads>,
    /// The tap may have a frame: it was not seen empty since it last said so.
    readable: bool,
    /// The tap may have room.
    writable: bool,
}

impl Net<Tap> {
    /// A card on this tap device.
    ///
    /// # Errors
    /// When the tap or the configuration is refused.
    pub fn new(config: NetConfig, tap: OwnedFd) -> Result<Self, NetError> {
        Self::with_backend(config, Tap::new(tap)?)
    }
}

impl<B: NetBackend> Net<B> {
    /// A card on any backend.
    ///
    /// # Errors
    /// When the configuration is refused.
    pub fn with_backend(config: NetConfig, backend: B) -> Result<Self, NetError> {
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let rx_limiter = RateLimiter::new(config.receive_limits).map_err(NetError::ReceiveLimits)?;
        let tx_limiter = RateLimiter::new(config.send_limits).map_err(NetError::SendLimits)?;
        let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(NetError::Event)?;
        Ok(Self { config, backend, rx_limiter, tx_limiter, again, metrics: Arc::default(), active: None })
    }

    /// The device's counters, shared with it.
    #[must_use]
    pub fn metrics(&self) -> Arc<NetMetrics> {
        self.metrics.clone()
    }

    /// Moves frames both ways as far as possible now.
    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if let Some(offloads) = active.new_offloads.take() {
            self.backend.set_offloads(offloads).map_err(DeviceError::Backend)?;
        }
        let mut again = false;
        if active.writable && active.sender.queue.is_ready() && !self.tx_limiter.is_blocked() {
            match active.sender.send(&mut self.backend, &mut self.tx_limiter, &self.metrics)? {
                tx::Pause::NoRoom => active.writable = false,
                tx::Pause::Turn => again = true,
                tx::Pause::NoFrame | tx::Pause::Limited => {}
            }
            active.sender.queue.kick()?;
        }
        if active.readable && active.receiver.queue.is_ready() && !self.rx_limiter.is_blocked() {
            match active.receiver.receive(&mut self.backend, &mut self.rx_limiter, &self.metrics)? {
                rx::Pause::NoFrame => active.readable = false,
                rx::Pause::Turn => again = true,
                rx::Pause::NoBuffers | rx::Pause::Limited => {}
            }
            active.receiver.queue.kick()?;
        }
        if again {
            self.again.write(1).map_err(DeviceError::Backend)?;
        }
        Ok(())
    }
}

impl<B: NetBackend> VirtioDevice for Net<B> {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn features(&self) -> u64 {
        let own = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        let mtu = self.config.mtu.map(|_| VIRTIO_NET_F_MTU);
        let bits = own.into_iter().chain(mtu).chain(self.backend.supported().feature_bits());
        bits.fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read_space(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The address was writable before VIRTIO 1.0 only.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let [rx, tx] = activation.into_queues(2)?;
        let accepted = |bit: u32| features & (1 << bit) != 0;
        let offloads = Offloads::to_guest(features);
        let unsegmented = usize::from(self.config.mtu.unwrap_or(0).max(1500)) + 18;
        let longest = if (offloads - Offloads::CSUM).is_empty() { unsegmented } else { MAX_FRAME };
        let negotiated = Negotiated { mergeable: accepted(VIRTIO_NET_F_MRG_RXBUF), longest };
        self.active = Some(Active {
            receiver: Receiver::new(rx, negotiated),
            sender: Sender::new(tx, Offloads::to_host(features)),
            // The vCPU thread that activates may lack the system call.
            new_offloads: Some(offloads),
            readable: true,
            writable: true,
        });
        // A restored driver may wait for what was announced before the snapshot, and the tap has had its
        // edge.
        self.again.write(1).map_err(ActivateError::Backend)
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let mut sources = vec![
            PollSource { fd: self.backend.fd(), events: edges, token: TOKEN_TAP },
            PollSource { fd: self.again.as_raw_fd(), events: EventSet::IN, token: TOKEN_AGAIN },
        ];
        let timers = [(&self.rx_limiter, TOKEN_RX_TIMER), (&self.tx_limiter, TOKEN_TX_TIMER)];
        sources.extend(timers.into_iter().filter_map(|(limiter, token)| {
            limiter.timer_fd().map(|fd| PollSource { fd, events: EventSet::IN, token })
        }));
        sources
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        match event {
            DeviceEvent::Queue(_) => {}
            DeviceEvent::Source { token: TOKEN_TAP, events } => {
                if let Some(active) = &mut self.active {
                    active.readable |= events.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
                    active.writable |= events.contains(EventSet::OUT);
                }
            }
            DeviceEvent::Source { token: TOKEN_RX_TIMER, .. } => self.rx_limiter.timer_expired(),
            DeviceEvent::Source { token: TOKEN_TX_TIMER, .. } => self.tx_limiter.timer_expired(),
            DeviceEvent::Source { .. } => {
                // Nothing to read is no error: the event may be spurious.
                let _ = self.again.read();
            }
        }
        self.work()
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        let mut queues = Vec::new();
        if let Some(active) = &mut self.active {
            active.receiver.give_back();
            // Should this machine go on, what it gave back is there to be taken again.
            queues = [&active.receiver.queue, &active.sender.queue].map(DeviceQueue::state).to_vec();
        }
        Ok(queues)
    }
}
