//! A driver that does whatever the fuzzer says, to a device behind its registers.
//!
//! The input is a [`Session`]: how the driver sets the device up, and what it does then. Besides panics, it
//! finds a device that does not come to rest: each event is handled once, and a device that works on without
//! end trips libFuzzer's timeout.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::Path,
    sync::{Arc, Mutex},
};

use arbitrary::Arbitrary;
use caisson_virtio::{devices::fs::{Fs, Workers}, memory::GuestMem, DeviceEvent, PollSource, VirtioDevice, mmio::{IrqLine, MmioTransport, TransportState, Watcher}};
use caisson_vmm_api::devices::FsConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// How much memory the guest has. Addresses are taken modulo a little more, so that some lie outside.
pub const MEMORY: u64 = 1 << 20;
const REACH: u64 = MEMORY + 0x2000;
/// Where each queue's rings are, one after the other.
const RINGS: u64 = 0x1000;
const RING_SPACE: u64 = 0x1000;
const QUEUE_SIZE: u16 = 16;
/// Where chains put their data.
const DATA: u64 = 0x2_0000;

/// All that one run does.
#[derive(Arbitrary, Debug)]
pub struct Session {
    /// Feature bits that the driver does without.
    refused: u64,
    steps: Vec<Step>,
}

impl Session {
    /// A driver that takes all features, and does what it is told.
    #[must_use]
    pub fn of(steps: Vec<Step>) -> Self {
        Self { refused: 0, steps }
    }
}

/// One thing that the driver or the host does.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Offers a chain: what the device reads, split at `split`, then room of `room` bytes.
    Chain { queue: u8, readable: Vec<u8>, split: u8, room: u16 },
    /// Writes a descriptor as it is.
    Descriptor { queue: u8, index: u8, addr: u32, len: u32, flags: u8, next: u8 },
    /// Offers whatever chain starts there.
    Offer { queue: u8, head: u16 },
    /// Moves the available index.
    Available { queue: u8, index: u16 },
    /// Writes memory.
    Memory { addr: u32, bytes: Vec<u8> },
    /// Notifies a queue.
    Notify { queue: u8 },
    /// Lets the device look at its host-side descriptors.
    Poll,
    /// Reads a register or the configuration space.
    Read { offset: u16, len: u8 },
    /// Writes one.
    Write { offset: u16, bytes: [u8; 4], len: u8 },
    /// Resets the device and sets it up again.
    Restart { refused: u64 },
    /// Saves the device, as for a snapshot that is not its end.
    Save,
    /// The host's side does something.
    Host { what: u8, bytes: Vec<u8> },
}

struct Silent;

impl IrqLine for Silent {
    fn pulse(&self) {}
}

/// Remembers what an active device waits for.
#[derive(Default)]
struct Watched(Mutex<Vec<PollSource>>);

impl Watcher for Watched {
    fn watch(&self, sources: &[PollSource]) -> std::io::Result<()> {
        *self.0.lock().expect("a lock") = sources.to_vec();
        Ok(())
    }

    fn unwatch(&self, _sources: &[PollSource]) {
        self.0.lock().expect("a lock").clear();
    }
}

/// Where a register is.
mod register {
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC: u64 = 0x80;
    pub(super) const QUEUE_DRIVER: u64 = 0x90;
    pub(super) const QUEUE_DEVICE: u64 = 0xa0;
}

/// The driver's side.
struct Driver {
    mem: GuestMem,
    transport: MmioTransport,
    watched: Arc<Watched>,
    queues: u64,
    available: Vec<u16>,
    descriptors: Vec<u16>,
    data: u64,
}

/// A guest's memory.
#[must_use]
pub fn memory() -> GuestMem {
    let ranges = [(GuestAddress(0), usize::try_from(MEMORY).expect("a small number"))];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("a megabyte"))
}

thread_local! {
    /// What serves files in this process.
    static WORKERS: Arc<Workers> = {
        limit_file_size();
        Workers::start(1, open(Path::new("/proc/self/fd")), || {}).expect("a worker")
    };
}

/// Shares a directory.
#[must_use]
pub fn share(config: FsConfig, directory: &Path) -> Fs {
    Fs::new(config, open(directory), WORKERS.with(Arc::clone)).expect("a device")
}

fn open(path: &Path) -> OwnedFd {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    File::options().read(true).custom_flags(flags).open(path).expect("a directory").into()
}

/// Has whatever would make a file longer than a megabyte fail in this process, so that no input fills a disk.
fn limit_file_size() {
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: the structure is as the call wants it.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
    assert_eq!(result, 0, "limiting the size of files");
}

/// Plays a session against a device. `host` does what [`Step::Host`] says.
pub fn play(
    session: &Session,
    mem: &GuestMem,
    device: Box<dyn VirtioDevice>,
    host: &mut dyn FnMut(u8, &[u8]),
) {
    let queues = device.queue_sizes().len() as u64;
    let watched = Arc::<Watched>::default();
    let transport = MmioTransport::new(device, mem.clone(), Arc::new(Silent), watched.clone());
    let mut driver = Driver::new(mem, transport, watched, queues);
    driver.set_up(session.refused);
    for step in session.steps.iter().take(200) {
        match step {
            Step::Host { what, bytes } => host(*what, bytes),
            step => driver.step(step),
        }
    }
    driver.poll();
}

/// Plays a session against a device that goes on from a saved state, wherever that left its queues.
pub fn play_restored(
    state: &TransportState,
    mem: &GuestMem,
    device: Box<dyn VirtioDevice>,
    session: Option<&Session>,
) {
    let queues = device.queue_sizes().len() as u64;
    let watched = Arc::<Watched>::default();
    let restored = MmioTransport::from_state(device, mem.clone(), Arc::new(Silent), watched.clone(), state);
    let Ok(mut transport) = restored else { return };
    transport.kick();
    let mut driver = Driver::new(mem, transport, watched, queues);
    driver.poll();
    for step in session.iter().flat_map(|session| &session.steps).take(200) {
        driver.step(step);
    }
}

impl Driver {
    fn new(mem: &GuestMem, transport: MmioTransport, watched: Arc<Watched>, queues: u64) -> Self {
        Self {
            mem: mem.clone(),
            transport,
            watched,
            queues,
            available: vec![0; queues as usize],
            descriptors: vec![0; queues as usize],
            data: DATA,
        }
    }

    fn register(&mut self, offset: u64, value: u64) {
        let bytes = (value as u32).to_le_bytes();
        self.transport.write(offset, &bytes);
    }

    fn wide_register(&mut self, offset: u64, value: u64) {
        self.register(offset, value);
        self.register(offset + 4, value >> 32);
    }

    fn set_up(&mut self, refused: u64) {
        self.register(register::STATUS, 0);
        self.register(register::STATUS, 1);
        self.register(register::STATUS, 3);
        for half in 0..2 {
            self.register(register::DEVICE_FEATURES_SEL, half);
            let mut offered = [0; 4];
            self.transport.read(register::DEVICE_FEATURES, &mut offered);
            // VERSION_1, bit 32, is never refused: without it there is no device.
            let refused = (refused >> (32 * half)) & !half;
            self.register(register::DRIVER_FEATURES_SEL, half);
            self.register(register::DRIVER_FEATURES, u64::from(u32::from_le_bytes(offered)) & !refused);
        }
        self.register(register::STATUS, 11);
        for queue in 0..self.queues {
            let base = ring(queue);
            let _ = self.mem.write_slice(&[0; RING_SPACE as usize], GuestAddress(base));
            self.register(register::QUEUE_SEL, queue);
            self.register(register::QUEUE_SIZE, QUEUE_SIZE.into());
            self.wide_register(register::QUEUE_DESC, base);
            self.wide_register(register::QUEUE_DRIVER, base + 0x400);
            self.wide_register(register::QUEUE_DEVICE, base + 0x800);
            self.register(register::QUEUE_READY, 1);
        }
        self.register(register::STATUS, 15);
        self.available.fill(0);
        self.descriptors.fill(0);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Chain { queue, readable, split, room } => self.chain(*queue, readable, *split, *room),
            Step::Descriptor { queue, index, addr, len, flags, next } => {
                let addr = u64::from(*addr) % REACH;
                let queue = u64::from(*queue) % self.queues;
                self.descriptor(queue, (*index).into(), addr, *len, (*flags).into(), (*next).into());
            }
            Step::Offer { queue, head } => self.offer(u64::from(*queue) % self.queues, *head),
            Step::Available { queue, index } => {
                let queue = u64::from(*queue) % self.queues;
                let _ = self.mem.write_obj(*index, GuestAddress(ring(queue) + 0x402));
            }
            Step::Memory { addr, bytes } => {
                let _ = self.mem.write_slice(bytes, GuestAddress(u64::from(*addr) % REACH));
            }
            Step::Notify { queue } => {
                self.transport.process(DeviceEvent::Queue((u64::from(*queue) % self.queues) as usize));
            }
            Step::Poll => self.poll(),
            Step::Read { offset, len } => {
                let mut data = vec![0; usize::from(*len % 16)];
                self.transport.read((*offset).into(), &mut data);
            }
            Step::Write { offset, bytes, len } => {
                self.transport.write((*offset).into(), &bytes[..usize::from(*len % 5)]);
            }
            Step::Restart { refused } => self.set_up(*refused),
            Step::Save => {
                let _ = self.transport.save();
            }
            Step::Host { .. } => {}
        }
    }

    fn poll(&mut self) {
        let sources = self.watched.0.lock().expect("a lock").clone();
        for source in sources {
            // Spurious events are allowed, so nothing needs to be waited for.
            let event = DeviceEvent::Source { token: source.token, events: source.events | EventSet::IN };
            self.transport.process(event);
        }
    }

    fn chain(&mut self, queue: u8, readable: &[u8], split: u8, room: u16) {
        let queue = u64::from(queue) % self.queues;
        let slot = queue as usize;
        let (first, rest) = readable.split_at(usize::from(split).min(readable.len()));
        let mut parts = Vec::new();
        for part in [first, rest] {
            if !part.is_empty() {
                let _ = self.mem.write_slice(part, GuestAddress(self.data));
                parts.push((self.data, part.len() as u32, 0));
                self.data = DATA + (self.data - DATA + part.len() as u64) % (MEMORY / 2);
            }
        }
        if room > 0 {
            parts.push((self.data, u32::from(room), 2));
        }
        let head = self.descriptors[slot];
        let count = parts.len();
        for (i, (addr, len, flags)) in parts.into_iter().enumerate() {
            let index = self.descriptors[slot];
            let next = (index + 1) % QUEUE_SIZE;
            let flags = flags | u16::from(i + 1 < count);
            self.descriptor(queue, index, addr, len, flags, next);
            self.descriptors[slot] = next;
        }
        self.offer(queue, head);
    }

    fn descriptor(&mut self, queue: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = ring(queue) + 16 * u64::from(index % QUEUE_SIZE);
        let _ = self.mem.write_slice(&bytes, GuestAddress(at));
    }

    fn offer(&mut self, queue: u64, head: u16) {
        let available = self.available[queue as usize];
        let at = ring(queue) + 0x400;
        let _ = self.mem.write_obj(head, GuestAddress(at + 4 + 2 * u64::from(available % QUEUE_SIZE)));
        let available = available.wrapping_add(1);
        let _ = self.mem.write_obj(available, GuestAddress(at + 2));
        self.available[queue as usize] = available;
        self.transport.process(DeviceEvent::Queue(queue as usize));
    }
}

fn ring(queue: u64) -> u64 {
    RINGS + queue * RING_SPACE
}
