//! A driver against the registers of a device that only remembers what was done to it.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::{
    ActivateError, Activation, DeviceError, DeviceEvent, DeviceId, DeviceQueue, PollSource, SavedQueue,
    VirtioDevice, memory::GuestMem,
};

/// What has been done to the device.
#[derive(Default)]
struct Log {
    activation: Option<Activation>,
    activations: usize,
    resets: usize,
    processed: Vec<DeviceEvent>,
    config: Vec<(u64, Vec<u8>)>,
    fail: bool,
    /// Something is in flight, and is finished when the device is saved.
    busy: bool,
}

struct Dummy(Arc<Mutex<Log>>);

impl VirtioDevice for Dummy {
    fn id(&self) -> DeviceId {
        DeviceId::Rng
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = u8::try_from(offset & 0xff).unwrap().wrapping_add(u8::try_from(index).unwrap());
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().config.push((offset, data.to_vec()));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.0.lock().unwrap();
        if log.fail {
            return Err(ActivateError::QueueDisabled(0));
        }
        log.activations += 1;
        log.activation = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        let mut log = self.0.lock().unwrap();
        log.resets += 1;
        log.activation = None;
    }

    fn poll_sources(&self) -> Vec<PollSource> {
        Vec::new()
    }

    fn process(&mut self, event: DeviceEvent) -> Result<(), DeviceError> {
        let mut log = self.0.lock().unwrap();
        log.processed.push(event);
        if log.fail { Err(DeviceError::Driver { queue: 0, what: "as told" }) } else { Ok(()) }
    }

    fn quiesce(&mut self) -> Result<Vec<SavedQueue>, DeviceError> {
        let mut log = self.0.lock().unwrap();
        if let (true, Some(activation)) = (std::mem::take(&mut log.busy), &log.activation) {
            activation.interrupt.signal_queue(0);
        }
        Ok(log.activation.iter().flat_map(|activation| &activation.queues).map(DeviceQueue::state).collect())
    }
}

#[derive(Default)]
struct Edges(AtomicUsize);

impl IrqLine for Edges {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts how often it was told to watch and to stop.
#[derive(Default)]
struct Watched(AtomicUsize, AtomicUsize);

impl Watcher for Watched {
    fn watch(&self, _: &[PollSource]) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn unwatch(&self, _: &[PollSource]) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

struct Bench {
    transport: MmioTransport,
    log: Arc<Mutex<Log>>,
    edges: Arc<Edges>,
    watched: Arc<Watched>,
}

impl Bench {
    fn new() -> Self {
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let (log, edges, watched) = (Arc::default(), Arc::<Edges>::default(), Arc::<Watched>::default());
        let device = Box::new(Dummy(Arc::clone(&log)));
        let transport = MmioTransport::new(device, mem, edges.clone(), watched.clone());
        Self { transport, log, edges, watched }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut word = [0xff; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> Status {
        Status::from_bits_retain(self.read(0x70))
    }

    fn negotiate(&mut self, low: u32, high: u32) {
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, low);
        self.write(0x24, 1);
        self.write(0x20, high);
        self.write(0x70, 11);
    }

    fn set_up_queue(&mut self, index: u32, base: u32) {
        self.write(0x30, index);
        self.write(0x38, 16);
        self.write(0x80, base);
        self.write(0x90, base + 0x1000);
        self.write(0xa0, base + 0x2000);
        self.write(0x44, 1);
    }

    fn ready() -> Self {
        let mut bench = Self::new();
        bench.negotiate(1, 1);
        bench.set_up_queue(0, 0x1_0000);
        bench.write(0x70, 15);
        bench
    }
}

#[test]
fn says_what_it_is() {
    let mut bench = Bench::new();
    assert_eq!((bench.read(0), bench.read(4), bench.read(8)), (0x7472_6976, 2, DeviceId::Rng as u32));
    assert_eq!(bench.read(0x34), 256);
    bench.write(0x30, 1);
    assert_eq!(bench.read(0x34), 64);
    bench.write(0x30, 2);
    assert_eq!(bench.read(0x34), 0);
    bench.write(0x14, 1);
    assert_eq!(u64::from(bench.read(0x10)) << 32, 1 << VIRTIO_F_VERSION_1);
    bench.write(0x14, 2);
    assert_eq!(bench.read(0x10), 0);
}

#[test]
fn a_driver_that_keeps_the_order_gets_its_device() {
    let bench = Bench::ready();
    assert_eq!(bench.status().bits(), 15);
    let log = bench.log.lock().unwrap();
    let activation = log.activation.as_ref().unwrap();
    assert_eq!(activation.features, (1 << 32) | 1);
    assert_eq!(activation.queues.len(), 2);
    assert_eq!(activation.queues[0].size(), 16);
    assert!(activation.queues[0].is_ready());
    assert!(!activation.queues[1].is_ready());
    assert_eq!(bench.watched.0.load(Ordering::Relaxed), 1);
}

#[test]
fn steps_cannot_be_skipped() {
    let mut bench = Bench::new();
    bench.write(0x70, 4);
    assert_eq!(bench.status(), Status::empty());
    bench.write(0x70, 2);
    assert_eq!(bench.status(), Status::empty());
    bench.write(0x70, 1);
    bench.write(0x70, 1 | 8);
    assert_eq!(bench.status(), Status::ACKNOWLEDGE);
    assert_eq!(bench.log.lock().unwrap().activations, 0);
}

#[test]
fn features_that_were_not_offered_or_a_missing_version_are_refused() {
    for (low, high) in [(0b10, 1), (0, 2), (1, 0)] {
        let mut bench = Bench::new();
        bench.negotiate(low, high);
        assert_eq!(bench.status(), Status::ACKNOWLEDGE | Status::DRIVER, "{low:#b} {high:#b}");
    }
}

#[test]
fn features_are_fixed_once_accepted() {
    let mut bench = Bench::new();
    bench.negotiate(1, 1);
    bench.write(0x24, 0);
    bench.write(0x20, 4);
    bench.write(0x70, 15);
    assert_eq!(bench.log.lock().unwrap().activation.as_ref().unwrap().features, (1 << 32) | 1);
}

#[test]
fn nothing_changes_after_driver_ok() {
    let mut bench = Bench::ready();
    let before = bench.transport.save().unwrap();
    for (offset, value) in
        [(0x38, 256), (0x44, 0), (0x80, 0x5000), (0x84, 1), (0x90, 0x5000), (0xa0, 0x5000), (0x20, 4)]
    {
        bench.write(0x30, 0);
        bench.write(offset, value);
    }
    assert_eq!(bench.transport.save().unwrap(), before);
    assert_eq!(bench.log.lock().unwrap().activations, 1);
}

#[test]
fn a_second_driver_ok_does_not_activate_again() {
    let mut bench = Bench::ready();
    bench.write(0x70, 15);
    assert_eq!(bench.log.lock().unwrap().activations, 1);
}

#[test]
fn a_queue_outside_memory_ends_the_device() {
    let mut bench = Bench::new();
    bench.negotiate(1, 1);
    bench.set_up_queue(0, 0xfff_f000);
    bench.write(0x70, 15);
    assert!(bench.status().contains(Status::NEEDS_RESET));
    assert_eq!(bench.log.lock().unwrap().activations, 0);
    // Only a reset helps.
    bench.write(0x70, 15);
    assert_eq!(bench.log.lock().unwrap().activations, 0);
    bench.write(0x70, 0);
    assert_eq!(bench.status(), Status::empty());
}

#[test]
fn a_device_that_gives_up_is_left_alone_until_its_reset() {
    let mut bench = Bench::ready();
    bench.log.lock().unwrap().fail = true;
    bench.write(0x50, 0);
    assert!(bench.status().contains(Status::NEEDS_RESET));
    // The driver is told by a configuration interrupt.
    assert_eq!(bench.read(0x60), 2);
    assert_eq!(bench.edges.0.load(Ordering::Relaxed), 1);
    bench.write(0x50, 0);
    assert_eq!(bench.log.lock().unwrap().processed.len(), 1);
    // What is ready and never dealt with would keep the event loop busy.
    let watched = |bench: &Bench| [&bench.watched.0, &bench.watched.1].map(|n| n.load(Ordering::Relaxed));
    assert_eq!(watched(&bench), [1, 1]);
    bench.write(0x70, 0);
    assert_eq!(watched(&bench), [1, 1]);
    bench.log.lock().unwrap().fail = false;
    bench.negotiate(1, 1);
    bench.set_up_queue(0, 0x1_0000);
    bench.write(0x70, 15);
    assert_eq!(watched(&bench), [2, 1]);
    drop(bench.transport);
    assert_eq!(bench.watched.1.load(Ordering::Relaxed), 2);
}

#[test]
fn notifications_reach_existing_queues_of_an_active_device() {
    let mut bench = Bench::new();
    bench.write(0x50, 0);
    assert!(bench.log.lock().unwrap().processed.is_empty());
    let mut bench = Bench::ready();
    bench.write(0x50, 1);
    bench.write(0x50, 2);
    bench.write(0x50, u32::MAX);
    assert_eq!(bench.log.lock().unwrap().processed, [DeviceEvent::Queue(1)]);
}

#[test]
fn interrupts_are_raised_and_acknowledged() {
    let mut bench = Bench::ready();
    let interrupt = bench.log.lock().unwrap().activation.as_ref().unwrap().interrupt.clone();
    let generation = bench.read(0xfc);
    interrupt.signal_queue(0);
    interrupt.signal_config();
    assert_eq!(bench.read(0x60), 3);
    assert_ne!(bench.read(0xfc), generation);
    bench.write(0x64, 1);
    assert_eq!(bench.read(0x60), 2);
    assert_eq!(bench.edges.0.load(Ordering::Relaxed), 2);
}

#[test]
fn a_reset_forgets_everything_but_the_generation() {
    let mut bench = Bench::ready();
    let interrupt = bench.log.lock().unwrap().activation.as_ref().unwrap().interrupt.clone();
    interrupt.signal_config();
    let generation = bench.read(0xfc);
    bench.write(0x70, 0);
    assert_eq!((bench.status(), bench.read(0x60), bench.read(0x44)), (Status::empty(), 0, 0));
    assert_eq!(bench.read(0xfc), generation);
    assert_eq!(bench.log.lock().unwrap().resets, 1);
    assert_eq!(bench.watched.1.load(Ordering::Relaxed), 1);
}

#[test]
fn configuration_space_is_the_devices() {
    let mut bench = Bench::new();
    let mut bytes = [0; 3];
    bench.transport.read(0x105, &mut bytes);
    assert_eq!(bytes, [5, 6, 7]);
    bench.transport.write(0x101, &[9]);
    assert!(bench.log.lock().unwrap().config.is_empty());
    bench.write(0x70, 1);
    bench.write(0x70, 3);
    bench.transport.write(0x101, &[9]);
    assert_eq!(bench.log.lock().unwrap().config, [(1, vec![9])]);
}

#[test]
fn registers_are_accessed_as_words() {
    let mut bench = Bench::new();
    let mut short = [0xff; 2];
    bench.transport.read(0, &mut short);
    assert_eq!(short, [0; 2]);
    bench.transport.write(0x70, &[1]);
    assert_eq!(bench.status(), Status::empty());
}

#[test]
fn an_empty_slot_is_a_placeholder() {
    let slot = Slot::default();
    let read = |offset| {
        let mut word = [0xff; 4];
        slot.read(offset, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!((read(0), read(4), read(8), read(0x70), read(0x100)), (0x7472_6976, 2, 0, 0, 0));
    slot.write(0x70, &1u32.to_le_bytes());
    assert_eq!(read(0x70), 0);
    slot.insert(Bench::new().transport);
    assert_eq!(read(8), DeviceId::Rng as u32);
    slot.take();
    assert_eq!(read(8), 0);
}

/// What a device finishes while it is saved is in the saved memory, so the interrupt for it must be in the
/// saved state.
#[test]
fn an_interrupt_raised_while_saving_is_saved() {
    let mut bench = Bench::ready();
    assert!(bench.transport.is_active());
    bench.log.lock().unwrap().busy = true;
    assert_eq!(bench.transport.save().unwrap().interrupt_status, 1);
}

#[test]
fn a_saved_transport_that_does_not_fit_is_refused() {
    let state = Bench::ready().transport.save().unwrap();
    let restore = |state: &TransportState| {
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let device = Box::new(Dummy(Arc::default()));
        let (edges, watched) = (Arc::<Edges>::default(), Arc::<Watched>::default());
        MmioTransport::from_state(device, mem, edges, watched, state).map(|_| ())
    };
    restore(&state).unwrap();
    let without_queues = TransportState { queues: Vec::new(), ..state.clone() };
    assert!(matches!(restore(&without_queues), Err(TransportStateError::QueueCount { expected: 2, got: 0 })));
    for missing in [Status::ACKNOWLEDGE, Status::DRIVER, Status::FEATURES_OK, Status::DRIVER_OK] {
        let half_way = TransportState { status: state.status - missing, ..state.clone() };
        assert!(matches!(restore(&half_way), Err(TransportStateError::Status(_))), "{missing:?}");
    }
    let inactive = TransportState { active: false, ..state.clone() };
    restore(&inactive).unwrap();
    let foreign = TransportState { driver_features: 1 << 63, ..inactive.clone() };
    assert!(matches!(restore(&foreign), Err(TransportStateError::Features(_))));
    let mut outside = inactive;
    outside.queues[0].desc_table = 1 << 40;
    assert!(matches!(restore(&outside), Err(TransportStateError::QueueInvalid(0))));
}

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![0u64..0x120, any::<u64>(), Just(0x70), Just(0x44), Just(0x50)];
    let value = prop_oneof![
        any::<u32>(),
        0u32..16,
        prop_oneof![Just(1u32), Just(3), Just(11), Just(15), Just(0x1_0000)]
    ];
    prop_oneof![
        (offset.clone(), 0usize..9).prop_map(|(offset, len)| Access::Read(offset, len)),
        (offset.clone(), value)
            .prop_map(|(offset, value)| Access::Write(offset, value.to_le_bytes().to_vec())),
        (offset, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Access::Write(offset, data)),
    ]
}

proptest! {
    /// Whatever is read and written, and in which order: no panic, every queue that reaches the device lies
    /// in memory, and an active device's configuration stays.
    #[test]
    fn no_sequence_of_accesses_gets_past_the_rules(accesses in prop::collection::vec(access(), 0..200)) {
        let mut bench = Bench::new();
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for access in accesses {
            let before = bench.transport.is_active().then(|| bench.transport.save().unwrap());
            match access {
                Access::Read(offset, len) => bench.transport.read(offset, &mut vec![0; len]),
                Access::Write(offset, data) => bench.transport.write(offset, &data),
            }
            if let (Some(before), true) = (before, bench.transport.is_active()) {
                let after = bench.transport.save().unwrap();
                prop_assert_eq!(after.queues, before.queues);
                prop_assert_eq!(after.driver_features, before.driver_features);
            }
            if let Some(activation) = &bench.log.lock().unwrap().activation {
                prop_assert!(activation.features & (1 << VIRTIO_F_VERSION_1) != 0);
                prop_assert_eq!(activation.features & !(0b101 | (1 << VIRTIO_F_VERSION_1)), 0);
                for queue in &activation.queues {
                    let queue = Queue::try_from(queue.state()).unwrap();
                    prop_assert!(!queue.ready() || queue.is_valid(&mem));
                }
            }
        }
    }
}
