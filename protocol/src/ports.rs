//! vsock ports of the agent.

/// gRPC.
pub const CONTROL: u32 = 1024;
/// Byte streams, see the handshake of this crate's stream module.
pub const STREAMS: u32 = 1025;
