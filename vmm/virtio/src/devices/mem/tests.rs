use std::{collections::BTreeSet, io, sync::Mutex};

use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::{
    Persist, RestoreError,
    memory::GuestMem,
    mock::{Buffer, CountingInterrupt, MockQueue},
};

const MIB: u64 = 1 << 20;
const START: u64 = 4 << 30;
const REQUEST: u64 = 0x4000;
const ANSWER: u64 = 0x5000;

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);

fn config() -> MemoryConfig {
    MemoryConfig { start: START, size: 64 * MIB, block_size: 2 * MIB, requested_size: 16 * MIB }
}

/// Keeps the set of plugged addresses, and fails on demand.
#[derive(Default)]
struct Recorder {
    plugged: Mutex<BTreeSet<u64>>,
    failing: Mutex<bool>,
}

impl Recorder {
    fn blocks(addr: u64, len: u64) -> impl Iterator<Item = u64> {
        assert!(addr >= START && addr + len <= START + 64 * MIB && addr.is_multiple_of(2 * MIB));
        (addr..addr + len).step_by(2 << 20)
    }

    fn fail(&self) -> io::Result<()> {
        if *self.failing.lock().unwrap() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

impl Blocks for Recorder {
    fn plug(&self, addr: u64, len: u64) -> io::Result<()> {
        self.fail()?;
        for block in Self::blocks(addr, len) {
            assert!(self.plugged.lock().unwrap().insert(block), "plugged twice");
        }
        Ok(())
    }

    fn unplug(&self, addr: u64, len: u64) -> io::Result<()> {
        self.fail()?;
        for block in Self::blocks(addr, len) {
            assert!(self.plugged.lock().unwrap().remove(&block), "was not plugged");
        }
        Ok(())
    }
}

struct Bench {
    mem: GuestMem,
    device: MemoryDevice,
    blocks: Arc<Recorder>,
    queue: MockQueue,
    interrupt: Arc<CountingInterrupt>,
}

impl Bench {
    fn new() -> Self {
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
        let blocks = Arc::new(Recorder::default());
        let mut device = MemoryDevice::new(config(), blocks.clone()).unwrap();
        let queue = MockQueue::new(&mem, 0, 16);
        let interrupt = CountingInterrupt::new();
        device.activate(activation(&mem, queue.device_side(), &interrupt)).unwrap();
        Self { mem, device, blocks, queue, interrupt }
    }

    /// Sends a request and reads the response's type and state.
    fn request(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&addr.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.mem.write_slice(&[0xff; 10], GuestAddress(ANSWER)).unwrap();
        self.queue.add(&[Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 10)]);
        self.device.process(DeviceEvent::Queue(0)).unwrap();
        assert_eq!(self.queue.used().pop().unwrap().1, 10);
        let read = |at| self.mem.read_obj::<u16>(GuestAddress(ANSWER + at)).unwrap();
        (read(0), read(8))
    }

    fn plug(&mut self, addr: u64, count: u16) -> (u16, u16) {
        self.request(0, addr, count)
    }

    fn unplug(&mut self, addr: u64, count: u16) -> (u16, u16) {
        self.request(1, addr, count)
    }

    fn unplug_all(&mut self) -> (u16, u16) {
        self.request(2, 0, 0)
    }

    fn state(&mut self, addr: u64, count: u16) -> (u16, u16) {
        self.request(3, addr, count)
    }

    fn plugged(&self) -> Vec<u64> {
        self.blocks.plugged.lock().unwrap().iter().map(|addr| (addr - START) / (2 * MIB)).collect()
    }
}

fn activation(mem: &GuestMem, queue: Queue, interrupt: &Arc<CountingInterrupt>) -> Activation {
    let features = F_UNPLUGGED_INACCESSIBLE | 1 << VIRTIO_F_VERSION_1;
    Activation::new(mem.clone(), vec![queue], features, interrupt.clone())
}

#[test]
fn blocks_are_plugged_and_unplugged() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START, 2), ACK);
    assert_eq!(bench.plug(START + 8 * MIB, 1), ACK);
    assert_eq!(bench.plugged(), [0, 1, 4]);
    assert_eq!(bench.device.plugged_size(), 6 * MIB);
    assert_eq!(bench.unplug(START + 2 * MIB, 1), ACK);
    assert_eq!(bench.plugged(), [0, 4]);
    assert_eq!(bench.unplug_all(), ACK);
    assert_eq!((bench.plugged(), bench.device.plugged_size()), (vec![], 0));
    assert_eq!(bench.unplug_all(), ACK, "of nothing");
}

#[test]
fn states_are_told() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START + 2 * MIB, 2), ACK);
    assert_eq!(bench.state(START + 2 * MIB, 2), (0, 0), "plugged");
    assert_eq!(bench.state(START + 6 * MIB, 29), (0, 1), "unplugged");
    assert_eq!(bench.state(START, 32), (0, 2), "mixed");
    assert_eq!(bench.state(START, 33), ERROR);
}

#[test]
fn no_more_is_plugged_than_was_asked_for() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START, 9), NACK);
    assert_eq!(bench.plug(START, 8), ACK);
    assert_eq!(bench.plug(START + 16 * MIB, 1), NACK);
    bench.device.set_requested_size(18 * MIB).unwrap();
    assert_eq!(bench.interrupt.take_config(), 1);
    assert_eq!(bench.plug(START + 16 * MIB, 1), ACK);
    // Less than is plugged: nothing is taken by force, but nothing more is given.
    bench.device.set_requested_size(0).unwrap();
    assert_eq!(bench.plug(START + 18 * MIB, 1), NACK);
    assert_eq!(bench.unplug(START, 9), ACK);
}

#[test]
fn wrong_requests_change_nothing() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START + 4 * MIB, 2), ACK);
    for (addr, count) in [
        (START + 1, 1),
        (START + MIB, 1),
        (START, 0),
        (START - 2 * MIB, 1),
        (START + 62 * MIB, 2),
        (START + 64 * MIB, 1),
        (0, u16::MAX),
        (u64::MAX, u16::MAX),
        (u64::MAX - 2 * MIB + 1, 1),
    ] {
        assert_eq!(bench.plug(addr, count), ERROR, "plug {addr:#x} {count}");
        assert_eq!(bench.unplug(addr, count), ERROR, "unplug {addr:#x} {count}");
        assert_eq!(bench.state(addr, count), ERROR, "state {addr:#x} {count}");
    }
    assert_eq!(bench.plug(START + 2 * MIB, 2), ERROR, "partly plugged already");
    assert_eq!(bench.unplug(START + 2 * MIB, 2), ERROR, "only partly plugged");
    assert_eq!(bench.request(4, START, 1), ERROR, "no such request");
    assert_eq!(bench.plugged(), [2, 3]);
    assert_eq!(bench.device.metrics.refused_requests.get(), 30);
}

#[test]
fn a_host_that_cannot_says_busy_and_nothing_changes() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START, 2), ACK);
    *bench.blocks.failing.lock().unwrap() = true;
    assert_eq!(bench.plug(START + 8 * MIB, 1), BUSY);
    assert_eq!(bench.unplug(START, 1), BUSY);
    assert_eq!(bench.unplug_all(), BUSY);
    assert_eq!((bench.plugged(), bench.device.plugged_size()), (vec![0, 1], 4 * MIB));
}

#[test]
fn the_configuration_space_is_as_specified() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START, 3), ACK);
    bench.device.write_config(48, &[0xff; 8]);
    let mut space = [0; 64];
    bench.device.read_config(0, &mut space);
    let field = |at: usize| u64::from_le_bytes(space[at..at + 8].try_into().unwrap());
    assert_eq!([0, 8, 16, 24].map(field), [2 * MIB, 0, START, 64 * MIB]);
    assert_eq!([32, 40, 48, 56].map(field), [64 * MIB, 6 * MIB, 16 * MIB, 0]);
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let blocks = || Arc::new(Recorder::default());
    let refused = |config| MemoryDevice::new(config, blocks()).err().unwrap();
    assert!(matches!(refused(MemoryConfig { block_size: 3 * MIB, ..config() }), MemoryError::BlockSize(_)));
    assert!(matches!(refused(MemoryConfig { block_size: MIB, ..config() }), MemoryError::BlockSize(_)));
    assert!(matches!(refused(MemoryConfig { block_size: 0, ..config() }), MemoryError::BlockSize(0)));
    assert!(matches!(
        refused(MemoryConfig { start: START + MIB, ..config() }),
        MemoryError::Unaligned { what: "start", .. }
    ));
    assert!(matches!(
        refused(MemoryConfig { size: 0, requested_size: 0, ..config() }),
        MemoryError::Region { .. }
    ));
    let end = 0_u64.wrapping_sub(2 * MIB);
    assert!(matches!(refused(MemoryConfig { start: end, ..config() }), MemoryError::Region { .. }));
    assert!(matches!(
        refused(MemoryConfig { requested_size: 66 * MIB, ..config() }),
        MemoryError::TooMuch { .. }
    ));
    let mut device = MemoryDevice::new(config(), blocks()).unwrap();
    assert!(device.set_requested_size(MIB).is_err());
    assert!(device.set_requested_size(66 * MIB).is_err());
    assert_eq!(device.requested_size(), 16 * MIB);
}

#[test]
fn a_driver_that_would_read_unplugged_memory_is_refused() {
    let bench = Bench::new();
    let mut device = MemoryDevice::new(config(), bench.blocks.clone()).unwrap();
    let mut activation = activation(&bench.mem, bench.queue.device_side(), &bench.interrupt);
    activation.features &= !F_UNPLUGGED_INACCESSIBLE;
    assert!(matches!(device.activate(activation), Err(ActivateError::Backend(_))));
}

#[test]
fn a_reset_leaves_plugged_blocks_alone() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START, 2), ACK);
    bench.device.reset();
    bench.device.process(DeviceEvent::Queue(0)).unwrap();
    assert_eq!((bench.plugged(), bench.device.plugged_size()), (vec![0, 1], 4 * MIB));
}

fn resources(bench: &Bench) -> MemoryResources {
    MemoryResources { config: config(), blocks: bench.blocks.clone() }
}

#[test]
fn a_restored_device_plugs_what_was_plugged() {
    let mut bench = Bench::new();
    assert_eq!(bench.plug(START, 2), ACK);
    assert_eq!(bench.plug(START + 8 * MIB, 1), ACK);
    bench.device.set_requested_size(8 * MIB).unwrap();
    let queues = bench.device.quiesce().unwrap();
    let state = postcard::to_allocvec(&bench.device.state()).unwrap();
    let state: MemoryState = postcard::from_bytes(&state).unwrap();

    bench.blocks = Arc::new(Recorder::default());
    let other = MemoryResources {
        config: MemoryConfig { start: START + 2 * MIB, ..config() },
        blocks: bench.blocks.clone(),
    };
    assert!(matches!(MemoryDevice::restore(&state, other), Err(RestoreError::Mismatch(_))));
    bench.device = MemoryDevice::restore(&state, resources(&bench)).unwrap();
    let queue = Queue::try_from(queues[0]).unwrap();
    bench.device.activate(activation(&bench.mem, queue, &bench.interrupt)).unwrap();
    assert_eq!(bench.plugged(), [0, 1, 4]);
    assert_eq!((bench.device.plugged_size(), bench.device.requested_size()), (6 * MIB, 8 * MIB));
    assert_eq!(bench.plug(START + 2 * MIB, 1), ERROR, "is plugged");
    assert_eq!(bench.plug(START + 10 * MIB, 1), ACK);
}

#[test]
fn a_state_that_contradicts_itself_is_refused() {
    let bench = Bench::new();
    let state = bench.device.state();
    for bad in [
        MemoryState { plugged: vec![true; 33], ..state.clone() },
        MemoryState { requested_size: 1, ..state.clone() },
        // More blocks than there is memory to remember them in.
        MemoryState { config: MemoryConfig { start: 0, size: 1 << 62, ..config() }, ..state.clone() },
        MemoryState { config: MemoryConfig { block_size: 5, ..config() }, ..state.clone() },
    ] {
        assert!(MemoryDevice::from_state(&bad, resources(&bench)).is_err());
    }
    assert!(bench.plugged().is_empty());
}

#[test]
fn chains_of_another_shape_end_the_device() {
    for buffers in [
        &[Buffer::readable(REQUEST, 24)][..],
        &[Buffer::writable(ANSWER, 10)],
        &[Buffer::writable(ANSWER, 10), Buffer::readable(REQUEST, 24)],
        &[Buffer::readable(REQUEST, 23), Buffer::writable(ANSWER, 10)],
        &[Buffer::readable(REQUEST, u32::MAX), Buffer::writable(ANSWER, 10)],
        &[Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 9)],
        &[Buffer::readable(0xfff0, 24), Buffer::writable(ANSWER, 10)],
        &[Buffer::readable(REQUEST, 24), Buffer::writable(0xfffc, 10)],
    ] {
        let mut bench = Bench::new();
        bench.queue.add(buffers);
        let result = bench.device.process(DeviceEvent::Queue(0));
        assert!(matches!(result, Err(DeviceError::Driver { queue: 0, .. })), "{buffers:?}");
    }
}

/// What the driver may ask for, in blocks of the region and around it.
fn any_request() -> impl Strategy<Value = (u16, u64, u16)> {
    let near = (0u64..34).prop_map(|block| START + block * 2 * MIB);
    let addr = prop_oneof![8 => near, 1 => any::<u64>()];
    (0u16..5, addr, prop_oneof![8 => 0u16..6, 1 => any::<u16>()])
}

proptest! {
    /// Against a model: the device, the host's view and a plain set of blocks never disagree.
    #[test]
    fn agrees_with_a_set_of_blocks(requests in proptest::collection::vec(any_request(), 0..60)) {
        let mut bench = Bench::new();
        let mut model = BTreeSet::new();
        for (kind, addr, count) in requests {
            let blocks: Option<Vec<u64>> = (addr >= START && (addr - START).is_multiple_of(2 * MIB) && count > 0)
                .then(|| (addr - START) / (2 * MIB)).filter(|first| first + u64::from(count) <= 32)
                .map(|first| (first..first + u64::from(count)).collect());
            let present = blocks.as_ref().map_or(0, |b| b.iter().filter(|block| model.contains(*block)).count());
            let expected = match (kind, blocks) {
                (2, _) => { model.clear(); ACK }
                (0 | 1 | 3, None) | (4, _) => ERROR,
                (0, Some(_)) if present > 0 => ERROR,
                (0, Some(blocks)) if model.len() + blocks.len() > 8 => NACK,
                (0, Some(blocks)) => { model.extend(blocks); ACK }
                (1, Some(blocks)) if present < blocks.len() => ERROR,
                (1, Some(blocks)) => { model.retain(|block| !blocks.contains(block)); ACK }
                (_, Some(blocks)) if present == blocks.len() => (0, 0),
                (_, Some(_)) if present == 0 => (0, 1),
                _ => (0, 2),
            };
            prop_assert_eq!(bench.request(kind, addr, count), expected);
            prop_assert_eq!(bench.plugged(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(bench.device.plugged_size(), model.len() as u64 * 2 * MIB);
        }
    }

    /// Random descriptors, heads and indices: an answer, an error, never a panic or an endless loop.
    #[test]
    fn survives_any_chain(
        descriptors in proptest::collection::vec((any::<u64>(), any::<bool>(), any::<u32>(), 0u16..8, 0u16..20), 16),
        heads in proptest::collection::vec(0u16..20, 0..16),
        jump in proptest::option::of(any::<u16>()),
        memory in proptest::collection::vec(any::<u8>(), 0x100),
    ) {
        let mut bench = Bench::new();
        bench.mem.write_slice(&memory, GuestAddress(REQUEST)).unwrap();
        for (index, (addr, near, len, flags, next)) in (0u16..).zip(descriptors) {
            let (addr, len) = if near { (REQUEST + addr % 0x100, 24) } else { (addr % 0x1_0020, len % 64) };
            bench.queue.raw_descriptor(index, addr, len, flags, next);
        }
        heads.into_iter().for_each(|head| bench.queue.offer(head));
        if let Some(jump) = jump {
            bench.queue.set_available(jump);
        }
        for event in [DeviceEvent::Queue(0), DeviceEvent::Source { token: 0, events: EventSet::IN }] {
            let _ = bench.device.process(event);
        }
        prop_assert!(bench.device.plugged_size() <= bench.device.requested_size());
    }
}
