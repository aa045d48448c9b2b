//! The options of the devices, as the machine file and the control API have them.

mod balloon;
mod block;
mod fs;
mod net;
mod rate_limits;
mod rng;
mod vsock;

pub use balloon::BalloonConfig;
pub use block::{BlockConfig, CacheMode, IoEngine};
pub use fs::{CachePolicy, FsConfig};
pub use net::{MacAddress, MacError, NetConfig};
pub use rate_limits::{Bucket, RateLimits};
pub use rng::RngConfig;
pub use vsock::VsockConfig;
