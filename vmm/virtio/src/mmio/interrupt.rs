use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use crate::Interrupt;

/// `InterruptStatus` bits.
pub(super) const USED_BUFFER: u32 = 1;
pub(super) const CONFIG_CHANGE: u32 = 2;

/// An interrupt line into the guest, possibly shared with other slots. Edge-triggered: each call is one edge.
pub trait IrqLine: Send + Sync {
    /// Raises an edge. It must not block.
    fn pulse(&self);
}

impl IrqLine for vmm_sys_util::eventfd::EventFd {
    fn pulse(&self) {
        // It fails only when the counter is full, and then an edge is pending anyway.
        let _ = self.write(1);
    }
}

/// The interrupt side of a transport: shared by the device, which raises, and the registers, which
/// acknowledge.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    line: Arc<dyn IrqLine>,
}

impl MmioInterrupt {
    /// An interrupt with nothing pending.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { status: AtomicU32::new(0), generation: AtomicU32::new(0), line }
    }

    pub(super) fn restored(line: Arc<dyn IrqLine>, status: u32, generation: u32) -> Self {
        Self { status: AtomicU32::new(status), generation: AtomicU32::new(generation), line }
    }

    /// Why the device interrupted.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Counts changes of the configuration space.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
    }

    /// Raises the line again when something is pending: an edge may have been lost with the machine that was
    /// saved, and one too many does no harm.
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.line.pulse();
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.pulse();
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_queue(&self, _index: usize) {
        self.raise(USED_BUFFER);
    }

    fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }
}
