//! `caisson-agent`: PID 1 of a pod's virtual machine.
//!
//! - [`init`]: the duties of PID 1: mounts, the kernel's log, the end of the machine.
//! - [`options`]: the command line, and `caisson.*` of the kernel's.
//! - [`connection`]: connections from the host; [`streams`]: byte streams over them.
//! - [`service`]: the gRPC services; thin layers over the modules below.
//! - [`state`]: what they share; [`ring`]: numbered histories of events and log lines; [`log`].
//! - [`guest`]: the guest as a machine: entropy, names, processors, memory, device slots; [`clock`]; [`metrics`].
//! - [`network`]: the pod's interfaces, addresses, routes, neighbours; [`namespace`]: work in another namespace.
//! - [`pod`]: the namespaces that containers share; [`storage`]: file systems that the host names;
//!   [`transfer`]: files in and out, connections into the pod.
//! - [`task`]: tasks, and work that blocks; `failpoint`: failures on purpose, for tests.
//! - [`process`]: how this process itself begins.
//! - [`reaper`]: the one place that calls `wait4(2)`, and hands exit statuses to whoever started the process.
//! - [`container`]: OCI containers; knows neither gRPC nor vsock; [`oci`]: the runtime specification's types.

pub mod clock;
pub mod connection;
pub mod container;
#[cfg(any(test, feature = "failpoints"))]
pub mod failpoint;
pub mod guest;
pub mod init;
pub mod log;
pub mod metrics;
pub mod namespace;
pub mod network;
pub mod oci;
pub mod options;
pub mod pod;
pub mod process;
pub mod reaper;
pub mod ring;
pub mod service;
pub mod state;
pub mod storage;
pub mod streams;
pub mod task;
pub mod transfer;
