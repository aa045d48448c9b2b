use std::sync::{Arc, Mutex, PoisonError};

use caisson_vmm_api::exit::ExitReason;
use vmm_sys_util::eventfd::EventFd;

use super::slots::Slots;
use crate::{
    devices::{exit::ExitPort, serial::Console},
    vcpu::Bus,
};

/// Everything that a processor reaches by I/O.
pub struct MachineBus {
    pub(super) console: Arc<Console>,
    pub(super) exit_port: Arc<ExitPort>,
    pub(super) slots: Arc<Slots>,
    pub(super) end: Arc<End>,
}

impl MachineBus {
    /// The console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }
}

impl Bus for MachineBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if Console::has(port) {
            self.console.read(port, data);
        } else if ExitPort::has(port) {
            self.exit_port.read(port, data);
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        if Console::has(port) {
            self.console.write(port, data);
        } else if ExitPort::has(port) {
            return self.exit_port.write(port, data).map(ExitReason::from);
        }
        None
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.slots.read(addr, data);
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.slots.write(addr, data);
    }

    fn ended(&self, reason: ExitReason) {
        self.end.set(reason);
    }
}

/// How the machine ended: the first reason counts.
pub struct End {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl End {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { reason: Mutex::new(None), event: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)? })
    }

    /// Readable once the machine has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The machine has ended.
    pub fn set(&self, reason: ExitReason) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(reason);
        let _ = self.event.write(1);
    }

    /// How it ended, if it has.
    pub fn get(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
