//! Virtual processors.
//!
//! | module | owns |
//! |---|---|
//! | `allowed` | which leaves and bits of CPUID a guest may see |
//! | [`cpuid`] | what a processor says that it is, and where it sits |
//! | `msrs` | which MSRs a snapshot may hold |
//! | [`registers`] | the state in which the first processor enters the kernel |
//! | [`thread`] | the thread that runs one processor, and how it is paused and stopped |
//!
//! A processor that the guest may bring up later does not exist until the machine is resized: the MP table
//! names it, KVM drops interrupts to it, and only [`thread::VcpuThread::spawn`] makes it real. From then on
//! it waits inside KVM for the guest's INIT and SIPI.

mod allowed;
pub mod cpuid;
mod kick;
pub(crate) mod msrs;
pub mod registers;
pub mod thread;

pub(crate) use allowed::only_allowed;
pub use thread::{Bus, VcpuCommandError, VcpuThread};

/// Why a virtual processor could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A KVM call failed.
    #[error("vCPU {id}: {what}")]
    Kvm {
        /// The processor.
        id: u8,
        /// Which call.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host lacks the memory or the permission for a thread.
    #[error("vCPU {id}: starting its thread")]
    Thread {
        /// The processor.
        id: u8,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The CPUID table has more entries than KVM takes.
    #[error("vCPU {id}: too many CPUID entries")]
    Cpuid {
        /// The processor.
        id: u8,
    },
    /// Boot structures did not fit into guest memory.
    #[error("writing boot tables to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}
