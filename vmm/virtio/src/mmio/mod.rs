//! The virtio-mmio transport, version 2 (VIRTIO 1.3, section 4.2).
//!
//! | module | owns |
//! |---|---|
//! | `registers` | the register map |
//! | `interrupt` | the interrupt status register and the line behind it |
//! | `transport` | one device behind its registers: the status machine, queue set-up, activation |
//! | `slot` | a place for a device, which may be empty |
//! | `state` | what of it goes into a snapshot |
//!
//! Once the driver has set DRIVER_OK, the configuration that it chose (features, queue sizes and addresses)
//! is frozen: writes to it are ignored until it resets the device. A driver that breaks the rules gets
//! DEVICE_NEEDS_RESET and a device that stands still; nothing else in the machine notices.

mod interrupt;
mod registers;
mod slot;
mod state;
#[cfg(test)]
mod tests;
mod transport;

pub use interrupt::{IrqLine, MmioInterrupt};
pub use registers::{QUEUE_NOTIFY, Register, Status};
pub use slot::{EMPTY_DEVICE_ID, Slot};
pub use state::{TransportState, TransportStateError};
pub use transport::{MmioTransport, Watcher};
