//! What happens to descriptor chains: packets from the guest, packets to it, and events for it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    metrics::VsockMetrics,
    muxer::Muxer,
    packet::{HEADER_LEN, Header},
};
use crate::{DeviceError, DeviceQueue};

/// The queue with buffers for packets to the guest.
pub(super) const RX: usize = 0;
/// The queue with packets from the guest.
pub(super) const TX: usize = 1;
/// The queue with buffers for events.
pub(super) const EVENT: usize = 2;

/// The most chains that one call takes from each queue, so that a driver that keeps adding does not keep us.
const BUDGET: usize = 256;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, section 5.10.6.7, as little-endian bytes.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// What a call left undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing: the next event will bring news.
    Idle,
    /// The budget was used up.
    More,
    /// It waits for the other queue.
    Blocked,
}

/// How far telling a restored guest to forget its connections has come.
///
/// Linux resets every connection that it has *when it handles the event*, new ones as well, and the host's
/// clients connect the moment that the machine is restored. So nothing is sent to the guest before the driver
/// has given the event's buffer back, which Linux does after having handled it, or for a time that ends by
/// itself.
#[derive(Clone, Copy, Debug)]
enum TransportReset {
    Due { until: Instant },
    Sent { available: u16, until: Instant },
}

/// The queues of an active device.
pub(super) struct Queues {
    pub(super) queues: [DeviceQueue; 3],
    pub(super) metrics: Arc<VsockMetrics>,
    transport_reset: Option<TransportReset>,
}

impl Queues {
    pub(super) fn new(queues: [DeviceQueue; 3], metrics: Arc<VsockMetrics>) -> Self {
        Self { queues, metrics, transport_reset: None }
    }

    /// Tells the guest to forget its connections, and holds back new ones until it has, for `wait` at most.
    pub(super) fn reset_transport(&mut self, wait: Duration) {
        self.transport_reset = Some(TransportReset::Due { until: Instant::now() + wait });
    }

    /// Until when new connections are held back.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.transport_reset.map(|reset| match reset {
            TransportReset::Due { until } | TransportReset::Sent { until, .. } => until,
        })
    }

    /// Sends the event that is due, or finds out whether the guest has handled it.
    pub(super) fn handle_events(&mut self) -> Result<(), DeviceError> {
        let Some(reset) = self.transport_reset else { return Ok(()) };
        match reset {
            TransportReset::Due { until } => {
                if let Some(available) = self.send_event()? {
                    self.transport_reset = Some(TransportReset::Sent { available, until });
                    self.queues[EVENT].kick()?;
                }
            }
            TransportReset::Sent { available, .. } => {
                let now = self.queues[EVENT].available_index()?;
                if now != available {
                    self.transport_reset = None;
                }
            }
        }
        // An event that could not be sent for want of a buffer is not worth a machine without connections.
        if self.held_until().is_some_and(|until| until <= Instant::now()) {
            self.transport_reset = None;
        }
        Ok(())
    }

    /// Returns the available index as of the event, or `None` when there is no buffer for it.
    fn send_event(&mut self) -> Result<Option<u16>, DeviceError> {
        let queue = &mut self.queues[EVENT];
        // The driver has all other buffers of its queue available, and is to notify of this one when it gives it back.
        let available = queue.notify_of_next()?;
        let Some(chain) = queue.pop()? else { return Ok(None) };
        let (head, _, writable) = chain.into_buffers()?;
        if writable.copy_from(0, &TRANSPORT_RESET) < TRANSPORT_RESET.len() {
            return Err(queue.driver_error("event buffer too short"));
        }
        queue.complete(head, 4)?;
        Ok(Some(available))
    }

    /// Takes in packets from the guest.
    pub(super) fn transmit(&mut self, muxer: &mut Muxer) -> Result<Progress, DeviceError> {
        let queue = &mut self.queues[TX];
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if !muxer.takes_packets() {
                progress = Progress::Blocked;
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_notification()? {
                    continue;
                }
                progress = Progress::Idle;
                break;
            };
            let (head, mut packet, _) = chain.into_buffers()?;
            let mut header = [0; HEADER_LEN];
            if packet.copy_to(0, &mut header) < HEADER_LEN {
                return Err(queue.driver_error("packet without a whole header"));
            }
            packet.advance(HEADER_LEN);
            muxer.receive(&Header::decode(&header), packet);
            queue.complete(head, 0)?;
        }
        queue.kick()?;
        Ok(progress)
    }

    /// Sends packets to the guest.
    pub(super) fn receive(&mut self, muxer: &mut Muxer) -> Result<Progress, DeviceError> {
        if self.transport_reset.is_some() {
            return Ok(Progress::Blocked);
        }
        let queue = &mut self.queues[RX];
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if !muxer.has_packets() {
                progress = Progress::Idle;
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_notification()? {
                    continue;
                }
                self.metrics.rx_starved.inc();
                progress = Progress::Blocked;
                break;
            };
            let (head, _, mut room) = chain.into_buffers()?;
            if room.len() < HEADER_LEN {
                return Err(queue.driver_error("buffer too short for a header"));
            }
            let mut payload = room.split_off(HEADER_LEN);
            let packet = muxer
                .next_packet(&mut payload)
                .map_err(|_| queue.driver_error("buffer with no room for data"))?;
            let Some(header) = packet else {
                queue.undo_pop(head);
                progress = Progress::Idle;
                break;
            };
            room.copy_from(0, &header.encode());
            queue.complete(head, header.packet_len())?;
        }
        queue.kick()?;
        Ok(progress)
    }
}
