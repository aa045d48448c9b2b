//! The kinds of virtio devices that a machine may have: the one list of them.

use std::sync::Arc;

use caisson_virtio::{
    Persist,
    devices::{balloon, block, fs, mem, net, rng, vsock},
    mmio::MmioTransport,
};
use serde::{Deserialize, Serialize};

/// Makes the types over all kinds of devices from a list of them: each with its device and its counters.
macro_rules! kinds {
    ($($(#[$doc:meta])+ $kind:ident: $device:ty, $metrics:ty;)+) => {
        /// The saved state of a device of any kind. A snapshot tells kinds apart by their place in the list: one that is
        /// added anywhere but at its end makes another version of the file.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub enum DeviceState {
            $($(#[$doc])+ $kind(<$device as Persist>::State),)+
        }

        impl DeviceState {
            /// The state of the device behind a transport, which has come to rest; `None` if it is of no kind in the
            /// list.
            pub fn of(transport: &mut MmioTransport) -> Option<Self> {
                $(if let Some(device) = transport.device_as::<$device>() {
                    return Some(Self::$kind(device.state()));
                })+
                None
            }
        }

        /// The counters of a device of any kind.
        #[derive(Clone, Debug, Serialize)]
        #[serde(rename_all = "lowercase")]
        pub enum DeviceMetrics {
            $($(#[$doc])+ $kind(Arc<$metrics>),)+
        }

        impl DeviceMetrics {
            /// The counters of the device behind a transport; `None` if it is of no kind in the list.
            pub fn of(transport: &mut MmioTransport) -> Option<Self> {
                $(if let Some(device) = transport.device_as::<$device>() {
                    return Some(Self::$kind(device.metrics()));
                })+
                None
            }
        }
    };
}

kinds! {
    /// Memory balloon.
    Balloon: balloon::Balloon, balloon::BalloonMetrics;
    /// Memory device.
    Mem: mem::MemoryDevice, mem::MemoryMetrics;
    /// Entropy source.
    Rng: rng::Rng, rng::RngMetrics;
    /// Disk.
    Block: block::Block, block::BlockMetrics;
    /// Network card.
    Net: net::Net, net::NetMetrics;
    /// Socket device.
    Vsock: vsock::Vsock, vsock::VsockMetrics;
    /// Shared directory.
    Fs: fs::Fs, fs::FsMetrics;
}
