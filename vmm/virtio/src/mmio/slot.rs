use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    MmioTransport, Register,
    registers::{MAGIC, VENDOR, VERSION},
};
use crate::DeviceEvent;

/// What an empty slot says it is: a placeholder, which drivers pass over in silence (VIRTIO 1.3, section
/// 4.2.2.2).
pub const EMPTY_DEVICE_ID: u32 = 0;

/// A place for a device on the bus. The guest knows of it from boot on; a device may come and go.
#[derive(Default)]
pub struct Slot {
    transport: Mutex<Option<MmioTransport>>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<MmioTransport>> {
        // A device that panicked has been aborted with the process; in tests its state is still the best
        // there is.
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills the slot. The device that was there before, if any, is handed back.
    pub fn insert(&self, transport: MmioTransport) -> Option<MmioTransport> {
        self.lock().replace(transport)
    }

    /// Empties the slot.
    pub fn take(&self) -> Option<MmioTransport> {
        self.lock().take()
    }

    /// Looks at the device in the slot, unless it is empty.
    pub fn with<T>(&self, f: impl FnOnce(&mut MmioTransport) -> T) -> Option<T> {
        self.lock().as_mut().map(f)
    }

    /// Whether no device is there.
    pub fn is_empty(&self) -> bool {
        self.lock().is_none()
    }

    /// A read at `offset` of the slot.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(transport) = self.lock().as_ref() {
            transport.read(offset, data);
            return;
        }
        data.fill(0);
        let value = match Register::at(offset) {
            Some(Register::MagicValue) => MAGIC,
            Some(Register::Version) => VERSION,
            Some(Register::DeviceId) => EMPTY_DEVICE_ID,
            Some(Register::VendorId) => VENDOR,
            _ => return,
        };
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = value.to_le_bytes();
        }
    }

    /// A write at `offset` of the slot.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(transport) = self.lock().as_mut() {
            transport.write(offset, data);
        }
    }

    /// Hands an event to the device, if there is one.
    pub fn process(&self, event: DeviceEvent) {
        if let Some(transport) = self.lock().as_mut() {
            transport.process(event);
        }
    }
}
