//! Virtio for a VMM: guest memory, queues, the virtio-mmio transport and the devices.
//!
//! | module | owns |
//! |---|---|
//! | [`memory`] | the guest's memory and the one type by which every other module reaches it |
//! | [`buffers`] | descriptor chains as buffers of the host |
//! | [`queue`] | a queue as its device uses it |
//! | [`mmio`] | the transport: registers, the status machine, interrupts |
//! | [`devices`] | the devices, one folder each |
//! | [`metrics`] | lock-free counters |
//! | [`rate_limiter`] | token buckets for bytes and operations |
//!
//! A device that is in snapshots implements [`Persist`] beside its state.
//!
//! A device knows queues, guest memory and its backend; a transport knows registers, the status machine and
//! interrupts. They meet in [`VirtioDevice`] and [`Interrupt`], so each is tested without the other, and both
//! without KVM. What needs the machine is handed in: interrupt lines ([`mmio::IrqLine`]), what watches descriptors
//! ([`mmio::Watcher`]), and how a device's threads are confined ([`ThreadSetup`]).
//!
//! The feature `test-utils` adds the driver's side of a queue (`mock`), for tests of devices.

pub mod buffers;
mod descriptors;
mod device;
pub mod devices;
mod error;
mod interrupt;
pub mod memory;
pub mod metrics;
pub mod mmio;
#[cfg(any(test, feature = "test-utils"))]
pub mod mock;
mod persist;
pub mod queue;
pub mod rate_limiter;

pub use device::{ActivateError, Activation, DeviceEvent, DeviceId, PollSource, ThreadSetup, VirtioDevice};
pub use error::DeviceError;
pub use interrupt::Interrupt;
pub use persist::{Persist, RestoreError, StateMismatch};
pub use queue::{DeviceQueue, Drained, SavedQueue};
