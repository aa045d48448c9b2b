//! Limits that both ends enforce. Beyond any of them a call fails with `RESOURCE_EXHAUSTED`.

use std::time::Duration;

/// The largest gRPC message in bytes, either way. An OCI specification with a large seccomp profile takes 0.1 MiB.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Calls in flight on one control connection; `Wait` and the server streams count.
pub const MAX_IN_FLIGHT: u32 = 1024;
/// Control connections at a time; the agent closes what is opened beyond.
pub const MAX_CONTROL_CONNECTIONS: usize = 32;
/// Stream connections at a time; the agent refuses what is opened beyond.
pub const MAX_STREAM_CONNECTIONS: usize = 4096;
/// Containers in a sandbox.
pub const MAX_CONTAINERS: usize = 1024;
/// Execs, running or not yet deleted, in a container.
pub const MAX_EXECS: usize = 1024;
/// Storages, all owners together.
pub const MAX_STORAGES: usize = 1024;
/// Bytes of an id of a sandbox, container, exec or storage.
pub const MAX_ID: usize = 128;
/// Events kept for resumption.
pub const EVENT_RING: usize = 4096;
/// Log lines kept for resumption.
pub const LOG_RING: usize = 512;
/// How long a peer may take for the stream handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an exit waits for its output to be taken before it is reported with `output_complete` unset.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
