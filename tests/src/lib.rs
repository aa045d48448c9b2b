//! What the whole-system tests share.
//!
//! | module | owns |
//! |---|---|
//! | [`node`] | the machine under test: its containerd, the products and images that the runner handed over |
//! | [`containerd`] | a private containerd: configuration for 1.7 and 2.x, start, images, stop |
//! | [`cri`] | a small CRI client, the kubelet's side |
//! | [`streaming`] | the streams that CRI serves beside its calls: exec, attach, port-forward |
//! | [`ctr`] | containerd's own client, as a person types it |
//! | [`tasks`] | containerd's own service for tasks, call by call |
//! | [`events`] | what containerd tells of containers' lives |
//! | [`record`] | which processes a pod of ours consists of |
//! | [`cost`] | the time of each call of a pod's life, the memory of its processes |
//! | [`agent`] | the agent as a plain process, and a client of it |
//! | [`containers`] | containers of busybox through an agent, and what must hold of them |
//! | [`oci`] | containers through the agent's library, and the same under runc |
//! | [`guest`] | Linux guests booted by something other than containerd |
//! | [`guest_share`] | a script that runs here, and in a jailed guest on a directory that it shares |
//! | [`net`] | network interfaces of this machine that guests are tied to |
//! | [`vmm`] | Linux guests in our own VMM |
//! | [`pod_vm`] | the agent as PID 1 of a guest in our own VMM |
//! | [`vsock`] | a guest of our own VMM that serves vsock ports |
//! | [`cgroups`] | this machine's control groups, of either version |
//! | [`templates`] | whether the pods of the machine under test start from templates |
//! | [`leaks`] | what a machine holds (processes, mounts, cgroups, links…) and what came on top since |
//!
//! A test is an ordinary `#[test]` that says "run this on a machine with KVM and containerd". It fails, and does
//! not skip, when something that it needs is missing: the runner (`cargo xtask test`) provides all of it.

pub mod agent;
pub mod cgroups;
pub mod containerd;
pub mod containers;
pub mod cost;
pub mod cri;
pub mod ctr;
pub mod events;
pub mod guest;
pub mod guest_share;
pub mod leaks;
pub mod net;
pub mod node;
pub mod oci;
pub mod pod_vm;
pub mod record;
pub mod streaming;
pub mod tasks;
pub mod templates;
pub mod vmm;
pub mod vsock;
