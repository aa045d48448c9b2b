//! The driver's side of a queue, for tests: well-behaved by default, hostile on request.
#![allow(clippy::unwrap_used, reason = "what is wrong here is wrong in a test")]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::{Interrupt, memory::GuestMem, queue::DeviceQueue};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: false }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: true }
    }
}

/// The driver's side of one split queue in guest memory.
pub struct MockQueue {
    mem: GuestMem,
    size: u16,
    table: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl MockQueue {
    /// VIRTQ_DESC_F_NEXT
    pub const NEXT: u16 = 1;
    /// VIRTQ_DESC_F_WRITE
    pub const WRITE: u16 = 2;
    /// VIRTQ_DESC_F_INDIRECT
    pub const INDIRECT: u16 = 4;

    /// An empty queue of `size` entries, its rings from `base` on. They take less than 0x40 + 26 × `size`
    /// bytes.
    pub fn new(mem: &GuestMem, base: u64, size: u16) -> Self {
        let table = base;
        let available = table + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size) + 3) & !3;
        let end = used + 6 + 8 * u64::from(size);
        mem.write_slice(&vec![0; usize::try_from(end - base).unwrap()], GuestAddress(base)).unwrap();
        let mem = mem.clone();
        Self { mem, size, table, available, used, next_descriptor: 0, next_available: 0, next_used: 0 }
    }

    /// The queue as the transport hands it to the device.
    pub fn device_side(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.table)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid::<GuestMemoryMmap<()>>(&self.mem));
        queue
    }

    /// The queue with index 0 of a device whose interrupts are not looked at, without VIRTIO_F_EVENT_IDX.
    pub fn device_queue(&self) -> DeviceQueue {
        DeviceQueue::new(self.device_side(), 0, self.mem.clone(), CountingInterrupt::new(), false)
    }

    /// Writes a descriptor as it is.
    pub fn raw_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor(self.table, index, Descriptor::new(addr, len, flags, next));
    }

    /// Makes the chain that starts with `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(self.next_available.wrapping_add(1));
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Writes the available index as it is.
    pub fn set_available(&self, index: u16) {
        self.mem.store(index, GuestAddress(self.available + 2), Ordering::Release).unwrap();
    }

    /// Asks to be interrupted once the device has used entry `index` (VIRTIO_F_EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let addr = self.available + 4 + 2 * u64::from(self.size);
        self.mem.store(index, GuestAddress(addr), Ordering::Release).unwrap();
    }

    /// The entry of which the device wants to be told that it is available (VIRTIO_F_EVENT_IDX).
    pub fn available_event(&self) -> u16 {
        let addr = self.used + 4 + 8 * u64::from(self.size);
        self.mem.load(GuestAddress(addr), Ordering::Acquire).unwrap()
    }

    /// Offers a chain of these buffers; returns its head. Descriptors are taken round-robin.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let count = u16::try_from(buffers.len()).unwrap();
        let head = self.next_descriptor;
        for (i, buffer) in (0..).zip(buffers) {
            let index = (head + i) % self.size;
            let next = (index + 1) % self.size;
            self.raw_descriptor(index, buffer.addr, buffer.len, flags(buffer, i + 1 < count), next);
        }
        self.next_descriptor = (head + count) % self.size;
        self.offer(head);
        head
    }

    /// Offers a chain of these buffers through an indirect table at `table`; returns its head.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        let count = u16::try_from(buffers.len()).unwrap();
        for (i, buffer) in (0..).zip(buffers) {
            let flags = flags(buffer, i + 1 < count);
            self.write_descriptor(table, i, Descriptor::new(buffer.addr, buffer.len, flags, i + 1));
        }
        let head = self.next_descriptor;
        self.raw_descriptor(head, table, 16 * u32::from(count), Self::INDIRECT, 0);
        self.next_descriptor = (head + 1) % self.size;
        self.offer(head);
        head
    }

    /// What the device has used since the last call: heads and lengths, in order.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self.mem.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap();
        let mut entries = Vec::new();
        while self.next_used != index {
            let entry = self.used + 4 + 8 * u64::from(self.next_used % self.size);
            let head: u32 = self.mem.read_obj(GuestAddress(entry)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(entry + 4)).unwrap();
            entries.push((u16::try_from(head).unwrap(), len));
            self.next_used = self.next_used.wrapping_add(1);
        }
        entries
    }

    fn write_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        let addr = GuestAddress(table + 16 * u64::from(index));
        self.mem.write_slice(descriptor.as_slice(), addr).unwrap();
    }
}

fn flags(buffer: &Buffer, next: bool) -> u16 {
    (if buffer.writable { MockQueue::WRITE } else { 0 }) | (if next { MockQueue::NEXT } else { 0 })
}

/// Counts interrupts instead of raising them.
#[derive(Debug, Default)]
pub struct CountingInterrupt {
    queue: AtomicUsize,
    config: AtomicUsize,
}

impl CountingInterrupt {
    /// A counter at zero.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Queue interrupts since the last call, of all queues together.
    pub fn take_queue(&self) -> usize {
        self.queue.swap(0, Ordering::Relaxed)
    }

    /// Configuration interrupts since the last call.
    pub fn take_config(&self) -> usize {
        self.config.swap(0, Ordering::Relaxed)
    }
}

impl Interrupt for CountingInterrupt {
    fn signal_queue(&self, _index: usize) {
        self.queue.fetch_add(1, Ordering::Relaxed);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}
