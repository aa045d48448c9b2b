//! The contract between the host (shim, CLI) and `caisson-agent`.
//!
//! - [`v1`]: the gRPC services and messages, generated from `proto/`; every verb and status code is described there.
//! - [`client`]: the host's end: typed clients of all services.
//! - [`connect`]: the `CONNECT <port>` handshake of the unix socket behind a vsock device, both sides.
//! - [`stream`]: the handshake of byte streams, both sides.
//! - [`ports`], [`limits`]: constants that both ends keep to.

pub mod client;
pub mod connect;
pub mod limits;
pub mod ports;
pub mod stream;

/// Generated gRPC services and messages of protocol version 1.
#[allow(missing_docs, rustdoc::all, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("caisson.agent.v1");
}

/// The lowest protocol version that this crate speaks.
pub const MIN_PROTOCOL: u32 = 1;
/// The highest protocol version that this crate speaks.
pub const MAX_PROTOCOL: u32 = 1;
/// Directory under which an agent that is PID 1 keeps its state and mounts.
pub const DEFAULT_ROOT: &str = "/run/caisson";
