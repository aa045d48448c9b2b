//! The contract between a virtio device and its transport.
//!
//! A device knows queues, guest memory and its backend; a transport knows registers, the status machine and
//! interrupts. They meet in [`VirtioDevice`] and [`Interrupt`], so each is tested without the other, and both
//! without KVM.

pub mod buffers;
mod device;
mod drain;
pub mod mmio;
#[cfg(test)]
pub(crate) mod mock;
mod saved_queue;

pub use device::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, Interrupt, PollSource, ThreadSetup,
    VirtioDevice,
};
pub use drain::{Drained, drain};
pub use saved_queue::SavedQueue;
