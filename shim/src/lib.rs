//! The groundwork of Caisson's containerd shim.
//!
//! | module | holds |
//! |---|---|
//! | [`id`] | containerd's identifiers, checked before they become file names |
//! | [`invocation`] | how containerd calls the shim's binary, and the answer to `start` |
//! | [`bundle`] | which pod a container belongs to, from its bundle's `config.json` |
//! | [`config`] | the node's configuration, and what a pod's annotations may change of it |
//! | [`sizing`] | how many vCPUs and how much memory a pod's machine gets |
//! | [`journal`] | the record of all that was made for a pod, and its undoing |
//! | [`cgroup`] | the pod's control group on the host |
//! | [`network`] | the pod's network namespace, joined with the machine's cards |
//! | [`share`] | the directory that a pod's machine is served: root file systems, volumes, whose files they are |
//!
//! The task service, which drives a pod's machine through these, is not part of this crate yet: there is no
//! binary that containerd could start.

pub mod bundle;
pub mod cgroup;
pub mod config;
pub mod id;
pub mod invocation;
pub mod journal;
pub mod network;
pub mod share;
pub mod sizing;
