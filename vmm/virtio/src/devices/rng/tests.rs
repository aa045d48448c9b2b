use caisson_vmm_api::devices::{Bucket, RateLimits, RngConfig};
use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Rng, *};
use crate::{
    Persist,
    memory::GuestMem,
    mock::{Buffer, CountingInterrupt, MockQueue},
};

const BUFFER: u64 = 0x8000;

/// 1, 2, 3… so that a test sees which bytes came from where.
#[derive(Default)]
struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, to: &mut [u8]) -> io::Result<()> {
        for byte in to {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(())
    }
}

struct Broken;

impl Entropy for Broken {
    fn fill(&mut self, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

const UNLIMITED: RngConfig = RngConfig { rate: RateLimits { bytes: None, operations: None } };

struct Bench<E> {
    mem: GuestMem,
    device: Rng<E>,
    queue: MockQueue,
    interrupt: Arc<CountingInterrupt>,
}

impl<E: Entropy> Bench<E> {
    fn new(config: RngConfig, entropy: E) -> Self {
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
        let mut device = Rng::new(config, entropy).unwrap();
        let queue = MockQueue::new(&mem, 0, 16);
        let interrupt = CountingInterrupt::new();
        device.activate(activation(&mem, queue.device_side(), &interrupt)).unwrap();
        Self { mem, device, queue, interrupt }
    }

    fn kick(&mut self) -> Result<(), DeviceError> {
        self.device.process(DeviceEvent::Queue(0))
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        bytes
    }
}

fn activation(mem: &GuestMem, queue: Queue, interrupt: &Arc<CountingInterrupt>) -> Activation {
    Activation::new(mem.clone(), vec![queue], 0, interrupt.clone())
}

fn limited(bytes: u64, refill_ms: u64) -> RngConfig {
    let bucket = Bucket { size: bytes, refill_ms, initial_burst: 0 };
    RngConfig { rate: RateLimits { bytes: Some(bucket), operations: None } }
}

#[test]
fn buffers_are_filled_in_order() {
    let mut bench = Bench::new(UNLIMITED, Counting::default());
    let head = bench.queue.add(&[Buffer::writable(BUFFER + 2, 3), Buffer::writable(BUFFER, 2)]);
    bench.kick().unwrap();
    assert_eq!(bench.queue.used(), [(head, 5)]);
    assert_eq!(bench.bytes(6), [4, 5, 1, 2, 3, 0]);
    assert_eq!(bench.interrupt.take_queue(), 1);
}

#[test]
fn a_greedy_request_gets_a_chunk() {
    let mut bench = Bench::new(UNLIMITED, Counting::default());
    let head = bench.queue.add(&[Buffer::writable(BUFFER, u32::MAX)]);
    bench.kick().unwrap();
    assert_eq!(bench.queue.used(), [(head, 1024)]);
    assert_eq!(bench.bytes(1025)[1023..], [0, 0], "1024 is 0 in the counting source, and no byte follows");
    assert_eq!(bench.bytes(1)[0], 1);
}

#[test]
fn the_host_is_a_source() {
    let mut bench = Bench::new(RngConfig::default(), HostEntropy);
    bench.queue.add(&[Buffer::writable(BUFFER, 64)]);
    bench.kick().unwrap();
    let first = bench.bytes(64);
    bench.queue.add(&[Buffer::writable(BUFFER, 64)]);
    bench.kick().unwrap();
    assert_ne!(first, bench.bytes(64));
    assert!(first.iter().any(|byte| *byte != 0));
}

#[test]
fn a_request_waits_in_the_ring_for_the_limiter() {
    let mut bench = Bench::new(limited(2048, 20), Counting::default());
    for _ in 0..3 {
        bench.queue.add(&[Buffer::writable(BUFFER, 16)]);
    }
    bench.kick().unwrap();
    assert_eq!(bench.queue.used().len(), 2);
    assert_eq!(bench.device.metrics.throttled.get(), 1);
    bench.kick().unwrap();
    assert!(bench.queue.used().is_empty(), "another kick changes nothing");
    // Half a bucket takes 10 ms.
    let timer = bench.device.poll_sources().into_iter().find(|source| source.token == TIMER).unwrap();
    let mut poll = libc::pollfd { fd: timer.fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1);
    bench.device.process(DeviceEvent::Source { token: TIMER, events: EventSet::IN }).unwrap();
    assert_eq!(bench.queue.used().len(), 1);
}

#[test]
fn a_reset_does_not_fill_the_bucket() {
    let mut bench = Bench::new(limited(1024, 1_000_000), Counting::default());
    bench.queue.add(&[Buffer::writable(BUFFER, 16)]);
    bench.kick().unwrap();
    assert_eq!(bench.queue.used().len(), 1);
    bench.device.reset();
    bench.queue = MockQueue::new(&bench.mem, 0, 16);
    bench.device.activate(activation(&bench.mem, bench.queue.device_side(), &bench.interrupt)).unwrap();
    bench.queue.add(&[Buffer::writable(BUFFER, 16)]);
    bench.kick().unwrap();
    assert!(bench.queue.used().is_empty());
}

#[test]
fn a_failing_source_is_a_backend_error() {
    let mut bench = Bench::new(UNLIMITED, Broken);
    bench.queue.add(&[Buffer::writable(BUFFER, 16)]);
    assert!(matches!(bench.kick(), Err(DeviceError::Backend(_))));
}

#[test]
fn wrong_requests_end_the_device() {
    for buffers in [
        &[Buffer::readable(BUFFER, 16)][..],
        &[Buffer::writable(BUFFER, 16), Buffer::readable(BUFFER, 16)],
        &[Buffer::writable(BUFFER, 0)],
        &[Buffer::writable(0xfff8, 16)],
        &[Buffer::writable(u64::MAX, 16)],
    ] {
        let mut bench = Bench::new(UNLIMITED, Counting::default());
        bench.queue.add(buffers);
        assert!(matches!(bench.kick(), Err(DeviceError::Driver { queue: 0, .. })), "{buffers:?}");
    }
}

#[test]
fn a_waiting_request_survives_a_snapshot() {
    let mut bench = Bench::new(limited(1024, 1_000_000), Counting::default());
    bench.queue.add(&[Buffer::writable(BUFFER, 16)]);
    bench.queue.add(&[Buffer::writable(BUFFER, 16)]);
    bench.kick().unwrap();
    assert_eq!(bench.queue.used().len(), 1);
    let queues = bench.device.quiesce().unwrap();
    let state = postcard::to_allocvec(&bench.device.state()).unwrap();
    let state: RngState = postcard::from_bytes(&state).unwrap();
    let mut restored = Rng::restore(&state, Counting::default()).unwrap();
    let queue = Queue::try_from(queues[0]).unwrap();
    restored.activate(activation(&bench.mem, queue, &bench.interrupt)).unwrap();
    bench.device = restored;
    bench.kick().unwrap();
    assert_eq!(bench.queue.used().len(), 1);
}

proptest! {
    /// Random descriptors, heads and indices: an answer, an error, never a panic or an endless loop, and no
    /// byte beyond what a chain may have.
    #[test]
    fn survives_any_chain(
        descriptors in proptest::collection::vec((any::<u64>(), any::<bool>(), any::<u32>(), 0u16..8, 0u16..20), 16),
        heads in proptest::collection::vec(0u16..20, 0..16),
        jump in proptest::option::of(any::<u16>()),
    ) {
        let mut bench = Bench::new(UNLIMITED, Counting::default());
        for (index, (addr, near, len, flags, next)) in (0u16..).zip(descriptors) {
            let (addr, len) = if near { (BUFFER + addr % 0x4000, len % 4096) } else { (addr, len) };
            bench.queue.raw_descriptor(index, addr, len, flags, next);
        }
        heads.into_iter().for_each(|head| bench.queue.offer(head));
        if let Some(jump) = jump {
            bench.queue.set_available(jump);
        }
        for event in [DeviceEvent::Queue(0), DeviceEvent::Source { token: AGAIN, events: EventSet::IN }] {
            let _ = bench.device.process(event);
        }
        let metrics = &bench.device.metrics;
        prop_assert!(metrics.bytes.get() <= metrics.requests.get() * MAX_CHUNK as u64);
    }
}
