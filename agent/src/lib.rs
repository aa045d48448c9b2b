//! `caisson-agent`: PID 1 of a pod's virtual machine.
//!
//! - [`reaper`]: the one place that calls `wait4(2)`, and hands exit statuses to whoever started the process.
//! - [`container`]: OCI containers; knows neither gRPC nor vsock.

pub mod container;
pub mod reaper;
