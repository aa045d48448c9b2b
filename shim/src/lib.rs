//! Caisson's containerd shim: one process a pod, which turns containerd's requests into a machine and what runs in it.
//!
//! A request goes one way: [`service`] → [`pod`] → ([`machine`] | the agent's client | [`share`]).
//!
//! | module | holds |
//! |---|---|
//! | [`action`] | what a call of the binary does: start, serve, delete, info |
//! | [`invocation`] | how containerd calls the binary, and the answer to `start` |
//! | [`options`] | what containerd's configuration says for a runtime handler |
//! | [`id`] | containerd's identifiers, checked before they become file names |
//! | [`bundle`] | which pod a container belongs to, from its bundle's `config.json` |
//! | [`config`] | the node's configuration, and what a pod's annotations may change of it |
//! | [`template`] | guests that were booted once, to be cloned for pods |
//! | [`sizing`] | how many vCPUs and how much memory a pod's machine gets |
//! | [`service`] | containerd's task and sandbox APIs on the shim's socket |
//! | [`pod`] | the pod: its sandbox, containers and processes |
//! | [`machine`] | the jailed VMM and the agent in it |
//! | [`share`] | the directory that the machine is served, with root file systems and volumes in it |
//! | [`cgroup`] | the pod's control group on the host |
//! | [`network`] | the pod's network namespace, joined with the machine's cards |
//! | [`streams`] | standard streams between containerd's fifos and the guest |
//! | [`events`] | events on their way to containerd |
//! | [`oom_score`] | how readily the kernel ends the machine when the node is short of memory |
//! | [`rest`] | what a shim with nothing to do gives back |
//! | [`phases`] | where the time of a start goes |
//! | [`directory`] | the pod's directory, and who owns it |
//! | [`journal`] | the record of all that was made for a pod, and its undoing |
//! | `failpoint` | dying on purpose, for tests |
//! | [`mountinfo`] | the mounts in sight |
//! | [`log`], [`wire`] | lines for containerd's log; pieces of its messages |

pub mod action;
pub mod bundle;
pub mod cgroup;
pub mod config;
pub mod directory;
pub mod events;
#[cfg(any(test, feature = "failpoints"))]
mod failpoint;
pub mod id;
pub mod invocation;
pub mod journal;
pub mod log;
pub mod machine;
pub mod mountinfo;
pub mod network;
pub mod oom_score;
pub mod options;
pub mod phases;
pub mod pod;
pub mod rest;
pub mod service;
pub mod share;
pub mod sizing;
pub mod streams;
pub mod template;
pub mod wire;
