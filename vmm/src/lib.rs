//! The microVM: one KVM virtual machine, one pod, one jailed process.
//!
//! | module | owns |
//! |---|---|
//! | [`boot`] | what a kernel needs in memory before its first instruction |
//! | [`machine_file`] | from the machine file to the machine |
//! | [`control`] | the event loop that serves the control API |
//! | [`snapshot`] | saving a machine, and making one from what was saved |
//! | [`resources`] | what a machine needs from the host, opened before it runs |
//! | [`machine`] | a KVM virtual machine with its processors, bus and slots |
//! | [`vcpu`] | virtual processors and the threads that run them |
//! | [`devices`] | serial console and exit port |
//! | [`layout`] | the guest's physical address space |
//! | [`jail`] | what is left to a process whose guest has broken out |
//! | [`seccomp`] | system call filters, thread by thread |
//! | [`malloc_arena`] | the arena that all threads allocate from |
//! | [`probe`] | whether this host's KVM can run a guest, and if not, why |
//!
//! Guest memory, queues, the virtio transport and its devices are [`caisson_virtio`].
//! What a program that starts the VMM sees of it (the machine file, the control protocol and its client) is
//! [`caisson_vmm_api`].
//!
//! The guest is hostile. Whatever it can influence (descriptors, registers, indices, packets) is validated
//! and bounded where it enters; nothing it does may panic, stall or grow this process without limit.

pub mod boot;
pub mod control;
pub mod devices;
pub mod jail;
pub mod layout;
pub mod machine;
pub mod machine_file;
pub mod malloc_arena;
pub mod probe;
pub mod resources;
pub mod seccomp;
pub mod snapshot;
pub mod vcpu;
