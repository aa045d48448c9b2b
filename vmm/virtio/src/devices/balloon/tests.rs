use std::{io, sync::Mutex};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::*;
use crate::{
    Persist,
    memory::GuestMem,
    mock::{Buffer, CountingInterrupt, MockQueue},
};

const MEM_SIZE: u64 = 1 << 20;
/// Where the tests' buffers are: behind the queues.
const BUFFER: u64 = 0x8000;

fn memory() -> GuestMem {
    let size = usize::try_from(MEM_SIZE).unwrap();
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

/// Notes what was discarded, and refuses what is not memory, as the real one does.
#[derive(Default)]
struct Recorder(Mutex<Vec<(u64, u64)>>);

impl Recorder {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Discard for Recorder {
    fn discard(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        assert!(addr.0.is_multiple_of(4096) && len.is_multiple_of(4096) && len > 0);
        if addr.0.checked_add(len).is_none_or(|end| end > MEM_SIZE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.0.lock().unwrap().push((addr.0, len));
        Ok(())
    }
}

struct Bench {
    mem: GuestMem,
    balloon: Balloon,
    discarded: Arc<Recorder>,
    queues: Vec<MockQueue>,
    interrupt: Arc<CountingInterrupt>,
}

impl Bench {
    fn new(config: BalloonConfig, features: u64) -> Self {
        let mem = memory();
        let discarded = Arc::new(Recorder::default());
        let mut balloon = Balloon::new(config, discarded.clone()).unwrap();
        let queues: Vec<_> =
            (0..).take(queue_count(config)).map(|i| MockQueue::new(&mem, i * 0x1000, 16)).collect();
        let interrupt = CountingInterrupt::new();
        balloon
            .activate(Activation::new(
                mem.clone(),
                queues.iter().map(MockQueue::device_side).collect(),
                features,
                interrupt.clone(),
            ))
            .unwrap();
        Self { mem, balloon, discarded, queues, interrupt }
    }

    fn full() -> Self {
        let config = BalloonConfig::default();
        Self::new(config, features(config) & !(1 << VIRTIO_RING_F_EVENT_IDX))
    }

    /// Puts page numbers in a queue, and lets the device look.
    fn pages(&mut self, queue: usize, pages: &[u32]) -> Result<(), DeviceError> {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.mem.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
        self.queues[queue].add(&[Buffer::readable(BUFFER, u32::try_from(bytes.len()).unwrap())]);
        self.balloon.process(DeviceEvent::Queue(queue))
    }

    fn statistics(&mut self, entries: &[(u16, u64)]) -> Result<(), DeviceError> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| tag.to_le_bytes().into_iter().chain(value.to_le_bytes()))
            .collect();
        self.mem.write_slice(&bytes, GuestAddress(BUFFER)).unwrap();
        self.queues[2].add(&[Buffer::readable(BUFFER, u32::try_from(bytes.len()).unwrap())]);
        self.balloon.process(DeviceEvent::Queue(2))
    }
}

#[test]
fn inflating_discards_joined_ranges_once() {
    let mut bench = Bench::full();
    bench.pages(0, &[0x42, 0x41, 0x40, 0x50, 0x41, 0x43]).unwrap();
    assert_eq!(bench.discarded.take(), [(0x4_0000, 0x4000), (0x5_0000, 0x1000)]);
    assert_eq!(bench.queues[0].used().len(), 1);
    assert_eq!(bench.interrupt.take_queue(), 1);
    assert_eq!(bench.balloon.metrics.inflated_pages.get(), 6);
}

#[test]
fn pages_outside_memory_are_counted_and_skipped() {
    let mut bench = Bench::full();
    bench.pages(0, &[u32::MAX, 0x20, 0x100, u32::MAX - 1]).unwrap();
    assert_eq!(bench.discarded.take(), [(0x2_0000, 0x1000)]);
    assert_eq!(bench.balloon.metrics.discard_failures.get(), 2);
}

#[test]
fn deflating_takes_nothing_away() {
    let mut bench = Bench::full();
    bench.pages(1, &[0x42, 0x43]).unwrap();
    assert_eq!(bench.discarded.take(), []);
    assert_eq!(bench.balloon.metrics.deflated_pages.get(), 2);
}

#[test]
fn reported_ranges_are_discarded_in_whole_pages() {
    let mut bench = Bench::full();
    bench.queues[3].add(&[
        Buffer::writable(0x1_0000, 0x2000),
        Buffer::writable(0x2_0800, 0x1900), // one whole page in it
        Buffer::writable(0x3_0800, 0x0700), // none
        Buffer::writable(u64::MAX - 10, 0x1000),
    ]);
    bench.balloon.process(DeviceEvent::Queue(3)).unwrap();
    assert_eq!(bench.discarded.take(), [(0x1_0000, 0x2000), (0x2_1000, 0x1000)]);
    assert_eq!(bench.balloon.metrics.reported_bytes.get(), 0x3000);
    assert_eq!(bench.balloon.metrics.discard_failures.get(), 1);
}

/// Linux leaves no gap in the numbering for a queue that it did not ask for.
#[test]
fn queues_move_up_when_statistics_are_declined() {
    let config = BalloonConfig::default();
    let mut bench = Bench::new(config, features(config) & !(F_STATS_VQ | 1 << VIRTIO_RING_F_EVENT_IDX));
    bench.queues[2].add(&[Buffer::writable(0x1_0000, 0x1000)]);
    bench.balloon.process(DeviceEvent::Queue(2)).unwrap();
    assert_eq!(bench.discarded.take(), [(0x1_0000, 0x1000)]);
}

#[test]
fn statistics_are_asked_for_and_answered() {
    let mut bench = Bench::full();
    assert!(!bench.balloon.request_statistics().unwrap(), "the driver has posted no buffer yet");
    bench.statistics(&[(4, 1234), (99, 1), (5, 5678)]).unwrap();
    let expected = Statistics { free_memory: Some(1234), total_memory: Some(5678), ..Default::default() };
    assert_eq!(*bench.balloon.statistics(), expected);
    assert_eq!(bench.queues[2].used(), [], "the buffer waits with the device");

    assert!(bench.balloon.request_statistics().unwrap());
    assert_eq!(bench.queues[2].used().len(), 1);
    assert!(!bench.balloon.request_statistics().unwrap(), "already asked");
    bench.statistics(&[(4, 1000)]).unwrap();
    assert_eq!(bench.balloon.statistics().free_memory, Some(1000));
    assert_eq!(bench.balloon.statistics().total_memory, None);
}

#[test]
fn the_driver_is_told_to_say_when_it_has_answered() {
    let mut bench = Bench::new(BalloonConfig::default(), balloon_features());
    for answer in 1..4 {
        bench.statistics(&[(4, answer)]).unwrap();
        assert_eq!(u64::from(bench.queues[2].available_event()), answer);
        assert!(bench.balloon.request_statistics().unwrap());
    }
}

#[test]
fn a_second_statistics_buffer_ends_the_device() {
    let mut bench = Bench::full();
    bench.statistics(&[]).unwrap();
    assert!(matches!(bench.statistics(&[]), Err(DeviceError::Driver { queue: 2, .. })));
}

#[test]
fn oversized_and_misdirected_lists_end_the_device() {
    let too_long: Vec<u32> = (0..1025).collect();
    assert!(matches!(Bench::full().pages(0, &too_long), Err(DeviceError::Driver { queue: 0, .. })));
    for buffer in [
        Buffer::writable(BUFFER, 4),
        Buffer::readable(MEM_SIZE - 2, 4),
        Buffer::readable(u64::MAX - 1, 4),
        Buffer::readable(BUFFER, u32::MAX),
    ] {
        let mut bench = Bench::full();
        bench.queues[0].add(&[buffer]);
        assert!(bench.balloon.process(DeviceEvent::Queue(0)).is_err(), "{buffer:?}");
    }
    let mut bench = Bench::full();
    bench.queues[3].add(&[Buffer::readable(BUFFER, 0x1000)]);
    assert!(bench.balloon.process(DeviceEvent::Queue(3)).is_err());
}

#[test]
fn a_new_target_is_a_configuration_change() {
    let mut bench = Bench::full();
    bench.balloon.set_target_pages(0x1234);
    assert_eq!(bench.interrupt.take_config(), 1);
    let mut config = [0xff; 12];
    bench.balloon.write_config(4, &0x1000_u32.to_le_bytes());
    bench.balloon.write_config(0, &0xdead_u32.to_le_bytes()); // read-only
    bench.balloon.write_config(4, &[1]); // not a whole field
    bench.balloon.read_config(0, &mut config);
    assert_eq!(config, [0x34, 0x12, 0, 0, 0, 0x10, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(bench.balloon.actual_pages(), 0x1000);
    bench.balloon.read_config(u64::MAX, &mut config);
}

#[test]
fn only_what_is_configured_is_offered() {
    let bare = BalloonConfig {
        deflate_on_oom: false,
        free_page_reporting: false,
        statistics: false,
        ..Default::default()
    };
    let balloon = Balloon::new(bare, Arc::new(Recorder::default())).unwrap();
    assert_eq!(balloon.features() & 0xff, 0);
    assert_eq!(balloon.queue_sizes().len(), 2);
    let balloon = Balloon::new(BalloonConfig::default(), Arc::new(Recorder::default())).unwrap();
    assert_eq!(balloon.features() & 0xff, 0b10_0110);
    assert_eq!(balloon.queue_sizes().len(), 4);
}

#[test]
fn the_first_two_queues_are_required() {
    let bench = Bench::full();
    let mut balloon = Balloon::new(BalloonConfig::default(), Arc::new(Recorder::default())).unwrap();
    let activation =
        |queues| Activation::new(bench.mem.clone(), queues, balloon_features(), CountingInterrupt::new());
    let ready = || bench.queues.iter().map(MockQueue::device_side);
    let mut without_deflate: Vec<_> = ready().collect();
    without_deflate[1].set_ready(false);
    assert!(matches!(balloon.activate(activation(without_deflate)), Err(ActivateError::QueueDisabled(1))));
    assert!(matches!(
        balloon.activate(activation(ready().take(2).collect())),
        Err(ActivateError::QueueCount { expected: 4, got: 2 })
    ));
    let mut without_reporting: Vec<_> = ready().collect();
    without_reporting[3].set_ready(false);
    balloon.activate(activation(without_reporting)).unwrap();
    balloon.process(DeviceEvent::Queue(3)).unwrap();
}

/// Without VIRTIO_F_EVENT_IDX.
fn plain_features() -> u64 {
    balloon_features() & !(1 << VIRTIO_RING_F_EVENT_IDX)
}

fn balloon_features() -> u64 {
    features(BalloonConfig::default())
}

#[test]
fn a_restored_balloon_goes_on_where_the_saved_one_was() {
    let mut bench = Bench::full();
    bench.balloon.set_target_pages(77);
    bench.balloon.write_config(4, &33_u32.to_le_bytes());
    bench.statistics(&[(4, 1)]).unwrap();
    let queues = bench.balloon.quiesce().unwrap();
    let bytes = postcard::to_allocvec(&bench.balloon.state()).unwrap();
    let state: BalloonState = postcard::from_bytes(&bytes).unwrap();

    let mut restored = Balloon::restore(&state, bench.discarded.clone()).unwrap();
    let queues = queues.iter().map(|queue| Queue::try_from(*queue).unwrap()).collect();
    let activation = Activation::new(bench.mem.clone(), queues, plain_features(), bench.interrupt.clone());
    restored.activate(activation).unwrap();
    assert_eq!((restored.target_pages(), restored.actual_pages()), (77, 33));
    assert!(restored.request_statistics().unwrap(), "the held buffer survives");
    assert_eq!(bench.queues[2].used().len(), 1);
    bench.balloon = restored;
    bench.pages(0, &[0x30]).unwrap();
    assert_eq!(bench.discarded.take(), [(0x3_0000, 0x1000)]);
}

#[test]
fn reset_forgets_the_driver() {
    let mut bench = Bench::full();
    bench.balloon.write_config(4, &33_u32.to_le_bytes());
    bench.statistics(&[(4, 1)]).unwrap();
    bench.balloon.reset();
    assert_eq!(bench.balloon.actual_pages(), 0);
    assert_eq!(*bench.balloon.statistics(), Statistics::default());
    assert!(!bench.balloon.request_statistics().unwrap());
    bench.balloon.process(DeviceEvent::Queue(0)).unwrap();
    assert_eq!(bench.balloon.quiesce().unwrap(), []);
}

proptest! {
    /// Whatever a list holds, each page of it in guest memory is discarded exactly once, and nothing else is.
    #[test]
    fn lists_discard_exactly_their_pages(pages in proptest::collection::vec(0u32..0x100, 0..1024)) {
        let mut bench = Bench::full();
        bench.pages(0, &pages).unwrap();
        let mut discarded: Vec<u32> = bench.discarded.take().into_iter()
            .flat_map(|(addr, len)| (addr >> 12..(addr + len) >> 12).map(|page| u32::try_from(page).unwrap()))
            .collect();
        discarded.sort_unstable();
        let mut expected = pages;
        expected.sort_unstable();
        expected.dedup();
        prop_assert_eq!(discarded, expected);
    }

    /// Random descriptors, heads and indices: an answer, an error, never a panic or an endless loop.
    #[test]
    fn survives_any_chain(
        descriptors in proptest::collection::vec((any::<u64>(), any::<bool>(), any::<u32>(), 0u16..8, 0u16..20), 16),
        heads in proptest::collection::vec(0u16..20, 0..16),
        jump in proptest::option::of(any::<u16>()),
        queue in 0usize..5,
    ) {
        let mut bench = Bench::full();
        let Some(mock) = bench.queues.get_mut(queue) else { return Ok(()) };
        for (index, (addr, near, len, flags, next)) in (0u16..).zip(descriptors) {
            // Half of the addresses and lengths are such that something comes of them.
            let (addr, len) = if near { (addr % (2 * MEM_SIZE), len % 0x2000) } else { (addr, len) };
            mock.raw_descriptor(index, addr, len, flags, next);
        }
        heads.into_iter().for_each(|head| mock.offer(head));
        if let Some(jump) = jump {
            mock.set_available(jump);
        }
        for event in [DeviceEvent::Queue(queue), DeviceEvent::Source { token: 0, events: EventSet::IN }] {
            let _ = bench.balloon.process(event);
        }
        prop_assert!(bench.mem.num_regions() == 1);
    }

    #[test]
    fn any_statistics_parse(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let statistics = Statistics::parse(&bytes);
        if bytes.len() < 10 {
            prop_assert_eq!(statistics, Statistics::default());
        }
    }
}
