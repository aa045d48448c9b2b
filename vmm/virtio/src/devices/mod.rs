//! The devices, one folder each, every folder of the same shape:
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the device and its [`VirtioDevice`](crate::VirtioDevice) implementation |
//! | `queue.rs` (or several) | what happens to a descriptor chain |
//! | `state.rs` | its saved state, a plain struct |
//! | `metrics.rs` | its counters |
//! | `tests.rs` | a mock driver against the real device |

pub mod balloon;
pub mod block;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;

use crate::SavedQueue;

/// The saved state of any virtio device, tagged with its kind.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum DeviceState {
    /// Memory balloon.
    Balloon(balloon::BalloonState),
    /// Memory device.
    Mem(mem::MemoryState),
    /// Entropy source.
    Rng(rng::RngState),
    /// Disk.
    Block(block::BlockState),
    /// Network card.
    Net(net::NetState),
    /// Socket device.
    Vsock(vsock::VsockState),
    /// Shared directory.
    Fs(fs::FsState),
}

impl DeviceState {
    /// The saved queues of an active device, in order; empty for one that was not active. The transport
    /// rebuilds the device's [`Activation`](crate::Activation) from them.
    #[must_use]
    pub fn queues(&self) -> &[SavedQueue] {
        match self {
            Self::Balloon(state) => &state.queues,
            Self::Mem(state) => &state.queues,
            Self::Rng(state) => &state.queues,
            Self::Block(state) => &state.queues,
            Self::Net(state) => &state.queues,
            Self::Vsock(state) => &state.queues,
            Self::Fs(state) => &state.queues,
        }
    }
}

/// The counters of any virtio device, tagged with its kind.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceMetrics {
    /// Memory balloon.
    Balloon(std::sync::Arc<balloon::BalloonMetrics>),
    /// Memory device.
    Mem(std::sync::Arc<mem::MemoryMetrics>),
    /// Entropy source.
    Rng(std::sync::Arc<rng::RngMetrics>),
    /// Disk.
    Block(std::sync::Arc<block::BlockMetrics>),
    /// Network card.
    Net(std::sync::Arc<net::NetMetrics>),
    /// Socket device.
    Vsock(std::sync::Arc<vsock::VsockMetrics>),
    /// Shared directory.
    Fs(std::sync::Arc<fs::FsMetrics>),
}
