use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use caisson_vmm_api::devices::{Bucket, RateLimits};
use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::{
    Persist, StateMismatch,
    memory::GuestMem,
    mock::{Buffer, CountingInterrupt, MockQueue},
};

const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::IoUring];
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x9000;
const MEMORY: usize = 1 << 20;
const QUEUE: u16 = 32;

/// A device with its driver.
struct Bench {
    mem: GuestMem,
    mock: MockQueue,
    interrupt: Arc<CountingInterrupt>,
    block: Block,
}

impl Bench {
    fn new(config: BlockConfig, files: Vec<OwnedFd>) -> Self {
        Self::with(Block::new(config, files, || {}).unwrap())
    }

    fn with(block: Block) -> Self {
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let mock = MockQueue::new(&mem, 0, QUEUE);
        let interrupt = CountingInterrupt::new();
        let mut bench = Self { mem, mock, interrupt, block };
        bench.activate(bench.block.features() & !(1 << VIRTIO_RING_F_EVENT_IDX));
        bench
    }

    fn activate(&mut self, features: u64) {
        let queues = vec![self.mock.device_side()];
        self.activate_with(queues, features).unwrap();
    }

    fn activate_with(&mut self, queues: Vec<Queue>, features: u64) -> Result<(), ActivateError> {
        let interrupt = self.interrupt.clone();
        self.block.activate(Activation::new(self.mem.clone(), queues, features, interrupt))
    }

    /// Puts a request into the queue; its header and status are in the n-th place.
    fn offer(&mut self, n: u64, kind: u32, sector: u64, data: &[Buffer]) -> u16 {
        let (header, status) = (HEADER + 16 * n, STATUS + n);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(header)).unwrap();
        self.mem.write_obj(0xffu8, GuestAddress(status)).unwrap();
        let mut buffers = vec![Buffer::readable(header, 16)];
        buffers.extend(data);
        buffers.push(Buffer::writable(status, 1));
        self.mock.add(&buffers)
    }

    fn status(&self, n: u64) -> u8 {
        self.mem.read_obj(GuestAddress(STATUS + n)).unwrap()
    }

    /// Handles the device's events until `count` requests are used; gives up after seconds without an event.
    fn wait(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = self.mock.used();
        while used.len() < count {
            assert!(self.poll(5000), "{} of {count} requests used", used.len());
            used.extend(self.mock.used());
        }
        used
    }

    /// Handles what is ready; whether something was.
    fn poll(&mut self, timeout_ms: i32) -> bool {
        let sources = self.block.poll_sources();
        let mut fds: Vec<_> = sources
            .iter()
            .map(|source| libc::pollfd { fd: source.fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: as many valid pollfds.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, timeout_ms) };
        for (source, fd) in sources.iter().zip(fds) {
            if fd.revents != 0 {
                let event = DeviceEvent::Source { token: source.token, events: EventSet::IN };
                self.block.process(event).unwrap();
            }
        }
        ready > 0
    }

    /// One request from start to end; its status and the length in the used ring.
    fn run(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let head = self.offer(0, kind, sector, data);
        self.block.process(DeviceEvent::Queue(0)).unwrap();
        let used = self.wait(1);
        assert_eq!((used.len(), used[0].0), (1, head));
        (self.status(0), used[0].1)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.run(kind, 0, &[Buffer::readable(DATA, len)]).0
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let answer = self.run(VIRTIO_BLK_T_IN, sector, &[Buffer::writable(DATA, len)]);
        assert_eq!(answer, (0, len + 1));
        let mut bytes = vec![0; len as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        bytes
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 251) % 251).unwrap()).collect()
}

fn file(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

fn writable(path: &Path) -> OwnedFd {
    OpenOptions::new().read(true).write(true).open(path).unwrap().into()
}

fn readable(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn config(engine: IoEngine) -> BlockConfig {
    BlockConfig { id: "disk".into(), engine, ..BlockConfig::default() }
}

fn read_only(engine: IoEngine) -> BlockConfig {
    BlockConfig { read_only: true, ..config(engine) }
}

fn disk(engine: IoEngine, sectors: usize) -> (NamedTempFile, Bench) {
    let file = file(&pattern(sectors * 512));
    let bench = Bench::new(config(engine), vec![writable(file.path())]);
    (file, bench)
}

#[test]
fn reads_and_writes_scattered_buffers() {
    for engine in ENGINES {
        let (file, mut bench) = disk(engine, 64);
        assert_eq!(bench.read(3, 1024), pattern(64 * 512)[3 * 512..5 * 512]);
        let data = [Buffer::readable(DATA, 100), Buffer::readable(DATA + 0x1000, 1436)];
        bench.mem.write_slice(&[1; 100], GuestAddress(DATA)).unwrap();
        bench.mem.write_slice(&[2; 1436], GuestAddress(DATA + 0x1000)).unwrap();
        assert_eq!(bench.run(VIRTIO_BLK_T_OUT, 61, &data), (0, 1));
        let mut written = [0; 1536];
        file.as_file().read_exact_at(&mut written, 61 * 512).unwrap();
        assert_eq!((&written[..100], &written[100..]), (&[1; 100][..], &[2; 1436][..]));
        assert_eq!(bench.run(VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
        assert!(bench.interrupt.take_queue() >= 3);
        let metrics = &bench.block.metrics;
        assert_eq!((metrics.reads.get(), metrics.written_bytes.get(), metrics.flushes.get()), (1, 1536, 1));
    }
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    for engine in ENGINES {
        let (_file, mut bench) = disk(engine, 8);
        for (sector, len) in
            [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 100)]
        {
            for (kind, data) in [
                (VIRTIO_BLK_T_IN, Buffer::writable(DATA, len)),
                (VIRTIO_BLK_T_OUT, Buffer::readable(DATA, len)),
            ] {
                assert_eq!(bench.run(kind, sector, &[data]).0, 1, "{kind} {sector} {len}");
            }
        }
        assert_eq!(bench.run(VIRTIO_BLK_T_IN, 8, &[]), (0, 1), "no bytes at the very end");
        assert_eq!(bench.run(0x77, 0, &[]).0, 2);
        assert_eq!(bench.block.metrics.refused.get(), 13);
    }
}

#[test]
fn a_file_that_shrank_fails_the_read() {
    for engine in ENGINES {
        let (file, mut bench) = disk(engine, 8);
        file.as_file().set_len(1024).unwrap();
        assert_eq!(bench.run(VIRTIO_BLK_T_IN, 0, &[Buffer::writable(DATA, 2048)]).0, 1);
        assert!(bench.block.refresh_capacity().unwrap());
        assert_eq!((bench.block.capacity_sectors(), bench.interrupt.take_config()), (2, 1));
        let mut capacity = [0; 8];
        bench.block.read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2);
    }
}

#[test]
fn tells_its_id() {
    let (_file, mut bench) = disk(IoEngine::Sync, 1);
    assert_eq!(bench.run(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::writable(DATA, 20)]), (0, 21));
    let id: [u8; 16] = bench.mem.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"disk\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discard_and_write_zeroes_free_space_and_read_as_zeros() {
    for engine in ENGINES {
        let (file, mut bench) = disk(engine, 512);
        file.as_file().sync_all().unwrap();
        let before = file.as_file().metadata().unwrap().blocks();
        assert_eq!(bench.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 128, 0), (256, 64, 0)]), 0);
        let after = file.as_file().metadata().unwrap().blocks();
        assert_eq!(before - after, 192, "{engine:?}");
        assert_eq!(bench.read(256, 512), [0; 512]);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(129, 3, 0), (200, 8, 1)]), 0);
        for sector in [129, 131, 200, 207] {
            assert_eq!(bench.read(sector, 512), [0; 512], "{sector}");
        }
        for sector in [128, 132, 199, 208] {
            assert_ne!(bench.read(sector, 512), [0; 512], "{sector}");
        }
        // A flag that only write-zeroes has, an unknown flag, too far, too long, too many, no range at all.
        assert_eq!(bench.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), 2);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)]), 2);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_DISCARD, &[(511, 2, 0)]), 1);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, u32::MAX, 0)]), 1);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0); 17]), 1);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_DISCARD, &[]), 1);
        assert_eq!(file.as_file().metadata().unwrap().len(), 512 * 512);
    }
}

#[test]
fn zeros_are_written_where_the_file_cannot_make_them() {
    // memfd has no FALLOC_FL_ZERO_RANGE.
    for engine in ENGINES {
        let memfd = nix::sys::memfd::memfd_create(c"disk", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let file = File::from(memfd);
        file.write_all_at(&[5; 64 << 10], 0).unwrap();
        let mut bench = Bench::new(config(engine), vec![file.into()]);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 100, 0)]), 0);
        assert_eq!(bench.read(0, 512), [5; 512]);
        assert_eq!(bench.read(1, 100 * 512), [0; 100 * 512]);
        assert_eq!(bench.read(101, 512), [5; 512]);
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    for engine in ENGINES {
        let file = file(&pattern(4096));
        let mut bench = Bench::new(read_only(engine), vec![readable(file.path())]);
        assert_ne!(bench.block.features() & (1 << VIRTIO_BLK_F_RO), 0);
        assert_eq!(bench.run(VIRTIO_BLK_T_OUT, 0, &[Buffer::readable(DATA, 512)]).0, 1);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), 1);
        assert_eq!(bench.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), 1);
        assert_eq!(bench.run(VIRTIO_BLK_T_FLUSH, 0, &[]).0, 0);
        assert_eq!(std::fs::read(file.path()).unwrap(), pattern(4096));
    }
}

#[test]
fn unfit_files_are_refused() {
    let good = file(&[0; 4096]);
    let odd = file(&[0; 1000]);
    let refuse = |config: BlockConfig, files| match Block::new(config, files, || {}) {
        Err(BlockError::Disk(error)) => error,
        other => panic!("{other:?}"),
    };
    let rw = || config(IoEngine::Sync);
    let ro = || read_only(IoEngine::Sync);
    let append = OpenOptions::new().read(true).append(true).open(good.path()).unwrap();
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(good.path()).unwrap();
    let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(good.path()).unwrap();
    assert!(matches!(refuse(ro(), vec![]), DiskError::FileCount(0)));
    assert!(matches!(refuse(ro(), vec![writable(good.path())]), DiskError::OpenForWriting(0)));
    let second = vec![readable(good.path()), writable(good.path())];
    assert!(matches!(refuse(ro(), second), DiskError::OpenForWriting(1)));
    assert!(matches!(refuse(rw(), vec![readable(good.path())]), DiskError::NotWritable(0)));
    let two = vec![writable(good.path()), writable(good.path())];
    assert!(matches!(refuse(rw(), two), DiskError::WritableConcat));
    assert!(matches!(refuse(rw(), vec![append.into()]), DiskError::OpenFlags(0)));
    assert!(matches!(refuse(ro(), vec![direct.into()]), DiskError::OpenFlags(0)));
    assert!(matches!(refuse(ro(), vec![path.into()]), DiskError::OpenFlags(0)));
    assert!(matches!(refuse(ro(), vec![File::open("/dev/null").unwrap().into()]), DiskError::FileType(0)));
    assert!(matches!(refuse(ro(), vec![File::open("/").unwrap().into()]), DiskError::FileType(0)));
    assert!(matches!(refuse(rw(), vec![writable(odd.path())]), DiskError::Unaligned(1000)));
    for id in ["twenty-one bytes long", "with space", "new\nline"] {
        let config = BlockConfig { id: id.into(), ..rw() };
        assert!(matches!(Block::new(config, vec![writable(good.path())], || {}), Err(BlockError::Id)));
    }
}

#[test]
fn a_concat_disk_pads_each_file_to_a_sector() {
    for engine in ENGINES {
        let contents = [pattern(700), vec![], vec![9; 512], vec![8; 1], vec![7; 1024]];
        let files: Vec<_> = contents.iter().map(|content| file(content)).collect();
        let mut expected = Vec::new();
        for content in &contents {
            expected.extend(content);
            expected.resize(expected.len().next_multiple_of(512), 0);
        }
        let fds = files.iter().map(|file| readable(file.path())).collect();
        let mut bench = Bench::new(read_only(engine), fds);
        let sectors = expected.len() / 512;
        assert_eq!(bench.block.capacity_sectors(), sectors as u64);
        for first in 0..sectors {
            for last in first + 1..=sectors {
                bench.mem.write_slice(&[0xaa; 8192], GuestAddress(DATA)).unwrap();
                let len = u32::try_from((last - first) * 512).unwrap();
                assert_eq!(bench.read(first as u64, len), expected[first * 512..last * 512]);
            }
        }
    }
}

#[test]
fn hopeless_chains_end_the_device() {
    let header = Buffer::readable(HEADER, 16);
    let chains: [&[Buffer]; 4] = [
        &[header],
        &[Buffer::readable(HEADER, 15), Buffer::writable(STATUS, 1)],
        &[Buffer::writable(STATUS, 1)],
        &[header, Buffer::writable(u64::MAX, 1)],
    ];
    for chain in chains {
        let (_file, mut bench) = disk(IoEngine::Sync, 8);
        bench.mock.add(chain);
        let error = bench.block.process(DeviceEvent::Queue(0)).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { queue: 0, .. }), "{error}");
        assert!(bench.mock.used().is_empty());
        bench.block.reset();
        bench.mock = MockQueue::new(&bench.mem, 0, QUEUE);
        bench.activate(0);
        assert_eq!(bench.read(1, 512), pattern(4096)[512..1024]);
    }
}

#[test]
fn a_reset_leaves_nothing_in_flight() {
    for engine in ENGINES {
        let (file, mut bench) = disk(engine, 4096);
        bench.block.reset();
        let idle = Arc::strong_count(&bench.mem);
        bench.mock = MockQueue::new(&bench.mem, 0, QUEUE);
        bench.activate(0);
        bench.mem.write_slice(&[3; 64 << 10], GuestAddress(DATA)).unwrap();
        for n in 0..8 {
            bench.offer(n, VIRTIO_BLK_T_OUT, n * 128, &[Buffer::readable(DATA, 64 << 10)]);
        }
        bench.block.process(DeviceEvent::Queue(0)).unwrap();
        bench.block.reset();
        assert_eq!(Arc::strong_count(&bench.mem), idle, "{engine:?}");
        // What had been begun is done, and the rest is given up.
        let content = std::fs::read(file.path()).unwrap();
        for (now, before) in content.chunks(64 << 10).zip(pattern(4096 * 512).chunks(64 << 10)) {
            assert!(now == [3; 64 << 10] || now == before, "{engine:?}");
        }
        // Completions of before do not reach the queues of after.
        bench.mock = MockQueue::new(&bench.mem, 0, QUEUE);
        bench.activate(0);
        while bench.poll(0) {}
        assert!(bench.mock.used().is_empty());
        assert_eq!(bench.read(0, 512), content[..512]);
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert!(std::fs::read(file.path()).unwrap() == content, "nothing goes on behind the driver's back");
    }
}

/// The same memory over and over makes a request longer than what is read or written at a time.
#[test]
fn long_requests_are_done_in_pieces() {
    const PART: usize = 0xe_0000;
    for engine in ENGINES {
        let (file, mut bench) = disk(engine, 8 * PART / 512);
        bench.mem.write_slice(&[5; PART], GuestAddress(DATA)).unwrap();
        let part = Buffer::readable(DATA, u32::try_from(PART).unwrap());
        assert_eq!(bench.run(VIRTIO_BLK_T_OUT, 1, &[part; 7]), (0, 1));
        let expected = [&pattern(512)[..], &[5; 7 * PART][..], &pattern(8 * PART)[512 + 7 * PART..]].concat();
        assert!(std::fs::read(file.path()).unwrap() == expected, "{engine:?}");
        let part = Buffer::writable(DATA, u32::try_from(PART).unwrap());
        let answer = bench.run(VIRTIO_BLK_T_IN, 0, &[part; 8]);
        assert_eq!(answer, (0, u32::try_from(8 * PART + 1).unwrap()));
        let mut last = vec![0; PART];
        bench.mem.read_slice(&mut last, GuestAddress(DATA)).unwrap();
        assert!(last == expected[7 * PART..], "{engine:?}");
    }
}

#[test]
fn a_snapshot_has_everything_answered() {
    for engine in ENGINES {
        // Without an accepted flush, writes go all the way, in two steps for zeros.
        let (file, mut bench) = disk(engine, 64);
        bench.block.reset();
        bench.mock = MockQueue::new(&bench.mem, 0, QUEUE);
        bench.activate(0);
        bench.mem.write_slice(&[[0; 8], [8, 0, 0, 0, 0, 0, 0, 0]].concat(), GuestAddress(DATA)).unwrap();
        bench.offer(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[Buffer::readable(DATA, 16)]);
        bench.offer(1, VIRTIO_BLK_T_OUT, 10, &[Buffer::readable(DATA + 0x1000, 512)]);
        bench.block.process(DeviceEvent::Queue(0)).unwrap();
        let queues = bench.block.quiesce().unwrap();
        assert_eq!(bench.mock.used().len(), 2);
        assert_eq!((bench.status(0), bench.status(1)), (0, 0));
        assert_eq!(std::fs::read(file.path()).unwrap()[..4096], [0; 4096]);

        let bytes = postcard::to_allocvec(&bench.block.state()).unwrap();
        let state: BlockState = postcard::from_bytes(&bytes).unwrap();
        let resources = || BlockResources {
            config: state.config.clone(),
            files: vec![writable(file.path())],
            setup: || {},
        };
        // A request whose notification came before the snapshot is found without another.
        bench.offer(2, VIRTIO_BLK_T_FLUSH, 0, &[]);
        let queues = queues.iter().map(|&queue| queue.try_into().unwrap()).collect();
        bench.block = Block::restore(&state, resources()).unwrap();
        bench.activate_with(queues, 0).unwrap();
        assert_eq!(bench.wait(1).len(), 1);

        file.as_file().set_len(512).unwrap();
        let error = Block::restore(&state, resources()).unwrap_err();
        let expected = BlockError::CapacityChanged { saved: 64, now: 1 };
        assert_eq!(error.to_string(), expected.to_string());
    }
}

#[test]
fn the_rate_limiter_puts_requests_off_and_not_out_of_order() {
    let file = file(&pattern(4096));
    let operations = Some(Bucket { size: 1, refill_ms: 200, initial_burst: 0 });
    let rate_limits = RateLimits { bytes: None, operations };
    let config = BlockConfig { rate_limits, ..config(IoEngine::Sync) };
    let mut bench = Bench::new(config, vec![writable(file.path())]);
    let heads: Vec<_> = (0..4).map(|n| bench.offer(n, VIRTIO_BLK_T_FLUSH, 0, &[])).collect();
    let start = std::time::Instant::now();
    bench.block.process(DeviceEvent::Queue(0)).unwrap();
    let used: Vec<_> = bench.wait(4).into_iter().map(|(head, _)| head).collect();
    assert_eq!(used, heads);
    assert!(start.elapsed().as_millis() >= 600);
    assert_eq!(bench.block.metrics.throttled.get(), 3);
}

#[test]
fn interrupts_follow_the_used_event() {
    let (_file, mut bench) = disk(IoEngine::Sync, 8);
    bench.block.reset();
    bench.mock = MockQueue::new(&bench.mem, 0, QUEUE);
    bench.activate(1 << VIRTIO_RING_F_EVENT_IDX);
    bench.mock.set_used_event(2);
    for expected in [0, 0, 1, 0] {
        bench.interrupt.take_queue();
        bench.run(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::writable(DATA, 20)]);
        assert_eq!(bench.interrupt.take_queue(), expected);
    }
}

#[test]
fn several_queues_share_the_disk() {
    let file = file(&pattern(4096));
    let config = BlockConfig { queues: 2, ..config(IoEngine::IoUring) };
    let mut bench = Bench::with_queues(config, vec![writable(file.path())]);
    let mut queues = [0; 2];
    bench.block.read_config(34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 2);
    bench.offer(0, VIRTIO_BLK_T_FLUSH, 0, &[]);
    bench.block.process(DeviceEvent::Queue(1)).unwrap();
    assert_eq!(bench.wait(1).len(), 1);
}

impl Bench {
    /// Two queues, of which the mock drives the second.
    fn with_queues(config: BlockConfig, files: Vec<OwnedFd>) -> Self {
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let first = MockQueue::new(&mem, 0x4000, QUEUE);
        let mock = MockQueue::new(&mem, 0, QUEUE);
        let block = Block::new(config, files, || {}).unwrap();
        let mut bench = Self { mem, mock, interrupt: CountingInterrupt::new(), block };
        let queues = vec![first.device_side(), bench.mock.device_side()];
        bench.activate_with(queues, 0).unwrap();
        bench
    }
}

/// A descriptor as a hostile driver may write it: mostly near something that exists.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![Just(HEADER), Just(DATA), 0..MEMORY as u64 + 0x1000, Just(u64::MAX), any::<u64>()];
    let len = prop_oneof![Just(16), Just(1), Just(512), 0u32..4096, any::<u32>()];
    (addr, len, prop_oneof![0u16..8, any::<u16>()], prop_oneof![0..QUEUE, any::<u16>()])
}

#[derive(Clone, Debug)]
enum Step {
    Read { sector: u64, sectors: u32 },
    Write { sector: u64, sectors: u32, fill: u8 },
    Discard { sector: u64, sectors: u32 },
    Zero { sector: u64, sectors: u32, unmap: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let at = (0u64..70, 0u32..12);
    prop_oneof![
        at.clone().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        (at.clone(), 1u8..).prop_map(|((sector, sectors), fill)| Step::Write { sector, sectors, fill }),
        at.clone().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        (at, any::<bool>()).prop_map(|((sector, sectors), unmap)| Step::Zero { sector, sectors, unmap }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is in the rings, the device answers, or gives up with an error, and can be reset and used.
    #[test]
    fn hostile_chains_do_no_harm(
        uring: bool,
        header in proptest::collection::vec(prop_oneof![0u8..16, any::<u8>()], 16),
        table in proptest::collection::vec(descriptor(), QUEUE as usize),
        offers in proptest::collection::vec(prop_oneof![0..QUEUE, any::<u16>()], 1..48),
        available in proptest::option::of(any::<u16>()),
    ) {
        let (file, mut bench) = disk(ENGINES[usize::from(uring)], 64);
        bench.mem.write_slice(&header, GuestAddress(HEADER)).unwrap();
        for (index, &(addr, len, flags, next)) in (0..).zip(&table) {
            bench.mock.raw_descriptor(index, addr, len, flags, next);
        }
        let mut healthy = true;
        for (n, offer) in offers.iter().enumerate() {
            bench.mock.offer(*offer);
            if let Some(index) = available && n == 20 {
                bench.mock.set_available(index);
            }
            healthy &= healthy && bench.block.process(DeviceEvent::Queue(0)).is_ok();
        }
        bench.block.reset();
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), 64 * 512);
        bench.mock = MockQueue::new(&bench.mem, 0, QUEUE);
        bench.activate(0);
        bench.read(63, 512);
    }

    /// The disk is a sequence of bytes.
    #[test]
    fn the_disk_behaves_as_its_model(uring: bool, steps in proptest::collection::vec(step(), 1..20)) {
        let (file, mut bench) = disk(ENGINES[usize::from(uring)], 64);
        let mut model = pattern(64 * 512);
        for step in steps {
            let (sector, sectors) = match step {
                Step::Read { sector, sectors } | Step::Write { sector, sectors, .. }
                | Step::Discard { sector, sectors } | Step::Zero { sector, sectors, .. } => (sector, sectors),
            };
            let bytes = usize::try_from(sector).unwrap() * 512..(usize::try_from(sector).unwrap() + sectors as usize) * 512;
            let expected = u8::from(bytes.end > model.len());
            let status = match step {
                Step::Read { .. } if expected == 0 => {
                    prop_assert_eq!(&bench.read(sector, sectors * 512), &model[bytes]);
                    continue;
                }
                Step::Read { .. } => bench.run(VIRTIO_BLK_T_IN, sector, &[Buffer::writable(DATA, sectors * 512)]).0,
                Step::Write { fill, .. } => {
                    bench.mem.write_slice(&vec![fill; sectors as usize * 512], GuestAddress(DATA)).unwrap();
                    if expected == 0 {
                        model[bytes].fill(fill);
                    }
                    bench.run(VIRTIO_BLK_T_OUT, sector, &[Buffer::readable(DATA, sectors * 512)]).0
                }
                Step::Discard { .. } | Step::Zero { .. } => {
                    if expected == 0 {
                        model[bytes].fill(0);
                    }
                    let (kind, flags) = match step {
                        Step::Zero { unmap, .. } => (VIRTIO_BLK_T_WRITE_ZEROES, u32::from(unmap)),
                        _ => (VIRTIO_BLK_T_DISCARD, 0),
                    };
                    bench.ranges(kind, &[(sector, sectors, flags)])
                }
            };
            prop_assert_eq!(status, expected);
        }
        prop_assert_eq!(std::fs::read(file.path()).unwrap(), model);
    }
}

#[test]
fn restore_refuses_what_the_guest_has_seen_otherwise() {
    let (_file, bench) = disk(IoEngine::Sync, 8);
    let saved = bench.block.state();
    let with = |config| BlockResources { config, files: Vec::new(), setup: || {} };
    let rate_limits =
        RateLimits { bytes: Some(Bucket { size: 1, refill_ms: 1, initial_burst: 0 }), operations: None };
    let unseen = BlockConfig { engine: IoEngine::IoUring, rate_limits, ..saved.config.clone() };
    Block::check(&saved, &with(unseen)).unwrap();
    for (changed, option) in [
        (BlockConfig { id: "other".into(), ..saved.config.clone() }, "block.id"),
        (BlockConfig { read_only: true, ..saved.config.clone() }, "block.read_only"),
        (BlockConfig { queues: 2, ..saved.config.clone() }, "block.queues"),
    ] {
        assert_eq!(Block::check(&saved, &with(changed)), Err(StateMismatch(option)));
    }
}
