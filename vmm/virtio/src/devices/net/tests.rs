use std::{
    fs::File,
    os::{fd::RawFd, unix::net::UnixDatagram},
};

use caisson_vmm_api::devices::{Bucket, MacAddress, MacError, NetConfig, RateLimits};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    backend::{read_frame, write_frame},
    config::MIN_FRAME,
    header::check_sent,
    *,
};
use crate::{
    buffers::GuestBuffers,
    memory::GuestMem,
    mock::{Buffer, CountingInterrupt, MockQueue},
};

/// The receive queue.
const RX: usize = 0;
/// The transmit queue.
const TX: usize = 1;
const DATA: u64 = 0x4_0000;
const MEMORY: usize = 4 << 20;
const QUEUE: u16 = 32;

/// A socket in place of the tap: frames with headers, as datagrams.
struct Socket {
    socket: UnixDatagram,
    offloads: Option<Offloads>,
}

impl NetBackend for Socket {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn supported(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offloads = Some(offloads);
        Ok(())
    }

    fn receive(&mut self, buffers: &GuestBuffers) -> io::Result<usize> {
        read_frame(self.fd(), buffers)
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &GuestBuffers) -> io::Result<()> {
        write_frame(self.fd(), header, frame)
    }
}

/// A device with its driver and the host's end of its cable.
struct Bench {
    mem: GuestMem,
    rx: MockQueue,
    tx: MockQueue,
    interrupt: Arc<CountingInterrupt>,
    net: Net<Socket>,
    host: UnixDatagram,
}

fn config() -> NetConfig {
    NetConfig {
        mac: "02:00:00:00:00:01".parse().unwrap(),
        mtu: None,
        receive_limits: RateLimits::default(),
        send_limits: RateLimits::default(),
    }
}

impl Bench {
    fn new(config: NetConfig) -> Self {
        let (host, socket) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let net = Net::with_backend(config, Socket { socket, offloads: None }).unwrap();
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let (rx, tx) = (MockQueue::new(&mem, 0, QUEUE), MockQueue::new(&mem, 0x1000, QUEUE));
        Self { mem, rx, tx, interrupt: CountingInterrupt::new(), net, host }
    }

    /// Active with all features but EVENT_IDX.
    fn active(config: NetConfig) -> Self {
        let mut bench = Self::new(config);
        bench.activate(bench.net.features() & !(1 << VIRTIO_RING_F_EVENT_IDX));
        bench
    }

    fn activate(&mut self, features: u64) {
        let queues = vec![self.rx.device_side(), self.tx.device_side()];
        let interrupt = self.interrupt.clone();
        self.net.activate(Activation::new(self.mem.clone(), queues, features, interrupt)).unwrap();
        self.again();
    }

    fn again(&mut self) {
        self.net.process(DeviceEvent::Source { token: TOKEN_AGAIN, events: EventSet::IN }).unwrap();
    }

    fn tap(&mut self, events: EventSet) {
        self.net.process(DeviceEvent::Source { token: TOKEN_TAP, events }).unwrap();
    }

    /// Lets the host send a frame and the device hear of it.
    fn arrive(&mut self, frame: &[u8]) {
        self.host.send(&[&[0; HEADER], frame].concat()).unwrap();
        self.tap(EventSet::IN);
    }

    /// Sends a frame behind a header in one buffer.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        self.mem.write_slice(&[&header, frame].concat(), GuestAddress(DATA)).unwrap();
        let len = u32::try_from(HEADER + frame.len()).unwrap();
        self.tx.add(&[Buffer::readable(DATA, len)]);
        self.net.process(DeviceEvent::Queue(TX)).unwrap();
    }

    /// What the host has received: header and frame.
    fn sent(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut bytes = vec![0; HEADER + MAX_FRAME];
        let n = self.host.recv(&mut bytes).ok()?;
        bytes.truncate(n);
        let frame = bytes.split_off(HEADER);
        Some((bytes, frame))
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 251) % 251).unwrap()).collect()
}

/// A header: flags, segmentation, header length, segment size, checksum start and offset.
fn header(flags: u8, gso: u8, fields: [u16; 4]) -> [u8; HEADER] {
    let mut bytes = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7];
    for (to, from) in bytes[2..10].chunks_mut(2).zip(fields) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    bytes
}

#[test]
fn sends_frames_with_a_clean_header() {
    let mut bench = Bench::active(config());
    bench.send(header(2, 0, [9, 9, 9, 9]), &pattern(1514));
    assert_eq!(bench.sent(), Some((vec![0; 12], pattern(1514))), "nothing in this header means anything");
    bench.send(header(3, 1, [54, 1460, 34, 16]), &pattern(60_000));
    let mut expected = header(1, 1, [54, 1460, 34, 16]);
    expected[10..].fill(0);
    assert_eq!(bench.sent(), Some((expected.to_vec(), pattern(60_000))));
    assert_eq!(bench.tx.used().len(), 2);
    assert_eq!(bench.interrupt.take_queue(), 2);
    assert_eq!((bench.net.metrics.tx_frames.get(), bench.net.metrics.tx_bytes.get()), (2, 61_514));
}

#[test]
fn a_frame_may_be_scattered_and_its_header_split() {
    let mut bench = Bench::active(config());
    let frame = pattern(600);
    bench.mem.write_slice(&[0; 5], GuestAddress(DATA)).unwrap();
    bench.mem.write_slice(&[&[0; 7], &frame[..300]].concat(), GuestAddress(DATA + 0x1000)).unwrap();
    bench.mem.write_slice(&frame[300..], GuestAddress(DATA + 0x2000)).unwrap();
    bench.tx.add_indirect(
        0x8000,
        &[
            Buffer::readable(DATA, 5),
            Buffer::readable(DATA + 0x1000, 307),
            Buffer::readable(DATA + 0x2000, 300),
        ],
    );
    bench.net.process(DeviceEvent::Queue(TX)).unwrap();
    assert_eq!(bench.sent().unwrap().1, frame);
}

#[test]
fn senseless_frames_are_dropped_and_their_buffers_returned() {
    let mut bench = Bench::active(config());
    let frame = pattern(200);
    let headers = [
        header(0, 1, [54, 1460, 34, 16]),  // segmentation without checksum
        header(1, 1, [54, 0, 34, 16]),     // segments of nothing
        header(1, 1, [201, 1460, 34, 16]), // headers longer than the frame
        header(1, 0, [0, 0, 190, 9]),      // checksum outside the frame
        header(1, 0, [0, 0, 0xffff, 0xffff]),
        header(1, 3, [54, 1460, 34, 16]),    // UFO is not offered
        header(1, 0x80, [54, 1460, 34, 16]), // ECN of nothing
        header(1, 0x85, [54, 1460, 34, 16]), // ECN of UDP
        header(1, 77, [54, 1460, 34, 16]),
    ];
    for header in headers {
        bench.send(header, &frame);
        assert_eq!(bench.sent(), None, "{header:?}");
    }
    bench.send([0; 12], &frame[..MIN_FRAME - 1]);
    bench.tx.add(&[Buffer::readable(DATA, 3)]);
    bench.tx.add(&[Buffer::readable(DATA, 70_000)]);
    bench.net.process(DeviceEvent::Queue(TX)).unwrap();
    assert_eq!(bench.sent(), None);
    assert_eq!(bench.tx.used().len(), headers.len() + 3);
    assert_eq!(bench.net.metrics.tx_malformed.get(), headers.len() as u64 + 3);
}

#[test]
fn offloads_are_what_was_negotiated() {
    let mut bench = Bench::new(config());
    let bit = |bit: u32| 1u64 << bit;
    bench.activate(bit(VIRTIO_NET_F_MRG_RXBUF) | bit(0) | bit(1) | bit(7) | bit(12) | bit(54));
    // UDP segmentation goes for both versions of IP or for none.
    assert_eq!(bench.net.backend.offloads, Some(Offloads::CSUM | Offloads::TSO4));
    bench.send(header(1, 1, [54, 1460, 34, 16]), &pattern(4000));
    assert_eq!(bench.sent(), None, "TSO4 towards the host was not accepted");
    bench.send(header(1, 4, [74, 1440, 54, 16]), &pattern(4000));
    assert!(bench.sent().is_some(), "TSO6 was");
    bench.net.reset();
    (bench.rx, bench.tx) = (MockQueue::new(&bench.mem, 0, QUEUE), MockQueue::new(&bench.mem, 0x1000, QUEUE));
    bench.activate(bit(7) | bit(8) | bit(11));
    assert_eq!(bench.net.backend.offloads, Some(Offloads::empty()), "nothing without checksums");
}

#[test]
fn a_received_frame_takes_as_many_buffers_as_it_needs() {
    let mut bench = Bench::active(config());
    let size = 4096;
    let place = |n: u16| DATA + u64::from(n) * 0x2000;
    let heads: Vec<_> = (0..QUEUE - 1).map(|n| bench.rx.add(&[Buffer::writable(place(n), size)])).collect();
    bench.net.process(DeviceEvent::Queue(RX)).unwrap();
    for (first, len, buffers) in [(0, 60, 1), (1, 4084, 1), (2, 4085, 2), (4, 60_000, 15)] {
        let frame = pattern(len);
        bench.arrive(&frame);
        let used = bench.rx.used();
        let used_heads: Vec<_> = used.iter().map(|entry| entry.0).collect();
        assert_eq!(used_heads, heads[first..first + buffers]);
        let header = bench.bytes(place(u16::try_from(first).unwrap()), HEADER);
        assert_eq!(u16::from_le_bytes([header[10], header[11]]) as usize, buffers);
        let mut got = Vec::new();
        for (n, (_, len)) in (first..).zip(&used) {
            got.extend(bench.bytes(place(u16::try_from(n).unwrap()), *len as usize));
        }
        assert_eq!(got[HEADER..], frame);
        assert_eq!(bench.interrupt.take_queue(), 1);
    }
}

#[test]
fn a_starved_card_waits_for_buffers_and_not_for_the_tap() {
    let mut bench = Bench::active(config());
    bench.arrive(&pattern(100));
    assert_eq!(bench.net.metrics.rx_starved.get(), 2, "at activation, and with the frame");
    // The tap stays readable, but is watched for edges.
    let tap = bench.net.poll_sources()[0];
    assert!(tap.events.contains(EventSet::EDGE_TRIGGERED));
    for n in 0..18 {
        bench.rx.add(&[Buffer::writable(DATA + n * 0x1000, 4096)]);
    }
    bench.net.process(DeviceEvent::Queue(RX)).unwrap();
    assert_eq!(bench.rx.used().len(), 1);
    assert_eq!(bench.bytes(DATA + 12, 100), pattern(100));
}

#[test]
fn a_small_ring_of_small_buffers_works_as_far_as_it_goes() {
    let mut bench = Bench::active(config());
    for n in 0..u64::from(QUEUE) {
        bench.rx.add(&[Buffer::writable(DATA + n * 0x1000, 1526)]);
    }
    bench.net.process(DeviceEvent::Queue(RX)).unwrap();
    bench.arrive(&pattern(3000));
    assert_eq!(bench.rx.used().len(), 2);
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_chain() {
    let mut bench = Bench::new(config());
    bench.activate(0);
    for n in 0..2 {
        bench
            .rx
            .add(&[Buffer::writable(DATA + n * 0x2000, 12), Buffer::writable(DATA + n * 0x2000 + 12, 1514)]);
    }
    bench.net.process(DeviceEvent::Queue(RX)).unwrap();
    bench.arrive(&pattern(1514));
    bench.arrive(&pattern(60));
    let lens: Vec<_> = bench.rx.used().iter().map(|entry| entry.1).collect();
    assert_eq!(lens, [1526, 72]);
    assert_eq!(bench.bytes(DATA + 12, 1514), pattern(1514));
    assert_eq!(bench.bytes(DATA + 10, 2), [1, 0], "num_buffers is 1");
}

#[test]
fn a_full_tap_is_tried_again_when_it_has_room() {
    let mut bench = Bench::active(config());
    let mut offered = 0;
    while bench.net.active.as_ref().unwrap().writable {
        bench.send([0; 12], &pattern(9000));
        offered += 1;
        assert!(offered < 10_000);
        bench.tx.used();
    }
    assert!(bench.tx.used().is_empty(), "what does not fit stays with the device");
    let mut received = 0;
    while bench.sent().is_some() {
        received += 1;
    }
    assert_eq!(received, offered - 1);
    bench.tap(EventSet::OUT);
    assert_eq!((bench.sent().unwrap().1, bench.tx.used().len()), (pattern(9000), 1));
}

#[test]
fn limits_hold_frames_back_in_both_directions() {
    let limits =
        RateLimits { bytes: None, operations: Some(Bucket { size: 1, refill_ms: 30, initial_burst: 0 }) };
    let mut bench = Bench::active(NetConfig { receive_limits: limits, send_limits: limits, ..config() });
    for n in 0..18 {
        bench.rx.add(&[Buffer::writable(DATA + n * 0x1000, 4096)]);
    }
    for _ in 0..2 {
        bench.arrive(&pattern(100));
        bench.send([0; 12], &pattern(50));
    }
    assert_eq!((bench.rx.used().len(), bench.tx.used().len()), (1, 1));
    for token in [TOKEN_RX_TIMER, TOKEN_TX_TIMER] {
        let fd = bench.net.poll_sources().iter().find(|source| source.token == token).unwrap().fd;
        let mut poll = [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }];
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(poll.as_mut_ptr(), 1, 5000) }, 1);
        bench.net.process(DeviceEvent::Source { token, events: EventSet::IN }).unwrap();
    }
    assert_eq!((bench.rx.used().len(), bench.tx.used().len()), (1, 1));
    assert_eq!((bench.net.metrics.rx_throttled.get(), bench.net.metrics.tx_throttled.get()), (1, 1));
}

#[test]
fn interrupts_follow_the_used_event() {
    let mut bench = Bench::new(config());
    bench.activate(bench.net.features());
    for n in 0..24 {
        bench.rx.add(&[Buffer::writable(DATA + n * 0x1000, 4096)]);
    }
    bench.net.process(DeviceEvent::Queue(RX)).unwrap();
    // Interrupt when entry 3 is used: in the middle of the frame of entries 2 to 4.
    bench.rx.set_used_event(3);
    for (len, expected) in [(60, 0), (60, 0), (9000, 1), (60, 0)] {
        bench.arrive(&pattern(len));
        assert_eq!(bench.interrupt.take_queue(), expected);
    }
}

#[test]
fn hopeless_receive_buffers_end_the_device() {
    for buffer in [Buffer::writable(DATA, 12), Buffer::readable(DATA, 2000), Buffer::writable(u64::MAX, 2000)]
    {
        let mut bench = Bench::active(config());
        bench.rx.add(&[buffer]);
        let error = bench.net.process(DeviceEvent::Queue(RX)).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { queue: RX, .. }), "{error}");
    }
}

#[test]
fn a_snapshot_gives_back_what_was_not_filled() {
    let mut bench = Bench::active(config());
    for n in 0..20 {
        bench.rx.add(&[Buffer::writable(DATA + n * 0x1000, 4096)]);
    }
    bench.net.process(DeviceEvent::Queue(RX)).unwrap();
    bench.arrive(&pattern(100));
    let queues = bench.net.quiesce().unwrap();
    assert_eq!((queues[RX].next_avail, queues[RX].next_used), (1, 1));
    // The machine goes on.
    bench.arrive(&pattern(200));
    assert_eq!(bench.rx.used().len(), 2);
    // So does a copy of it.
    bench.net.reset();
    let queues = queues.iter().map(|&queue| queue.try_into().unwrap()).collect();
    let (mem, interrupt) = (bench.mem.clone(), bench.interrupt.clone());
    let features = bench.net.features();
    bench.net.activate(Activation::new(mem, queues, features, interrupt)).unwrap();
    bench.again();
    bench.arrive(&pattern(300));
    assert_eq!(bench.bytes(DATA + 0x1000 + 12, 300), pattern(300));
}

#[test]
fn tells_its_address_status_and_mtu() {
    let bench = Bench::new(NetConfig { mtu: Some(9000), ..config() });
    let mut bytes = [0xaa; 14];
    bench.net.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x28, 0x23, 0xaa, 0xaa]);
    bench.net.read_config(u64::MAX, &mut bytes);
    assert_ne!(bench.net.features() & (1 << VIRTIO_NET_F_MTU), 0);
    let small = Net::with_backend(NetConfig { mtu: Some(67), ..config() }, bench.net.backend);
    assert!(matches!(small, Err(NetError::Mtu(67))));
}

#[test]
fn addresses_are_read_strictly() {
    for text in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "2:00:00:00:00:01",
        "+2:00:00:00:00:01",
        "02-00-00-00-00-01",
    ] {
        assert_eq!(text.parse::<MacAddress>(), Err(MacError::Form), "{text}");
    }
    for text in ["01:00:00:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
        assert_eq!(text.parse::<MacAddress>(), Err(MacError::NotUnicast), "{text}");
    }
    assert_eq!("02:AB:cd:00:00:01".parse::<MacAddress>().unwrap().to_string(), "02:ab:cd:00:00:01");
}

#[test]
fn what_is_no_tap_is_refused() {
    let refused = Net::new(config(), File::open("/dev/null").unwrap().into());
    assert!(matches!(refused, Err(NetError::Tap(TapError::NotTap(_)))));
}

/// A descriptor as a hostile driver may write it: mostly near something that exists.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![Just(DATA), 0..MEMORY as u64 + 0x1000, Just(u64::MAX), any::<u64>()];
    let len = prop_oneof![Just(12), Just(1526), 0u32..70_000, any::<u32>()];
    (addr, len, prop_oneof![0u16..8, any::<u16>()], prop_oneof![0..QUEUE, any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is in the rings, the device moves frames, drops them, or gives up with an error, and can be
    /// reset and used.
    #[test]
    fn hostile_chains_do_no_harm(
        features: u64,
        rx in proptest::collection::vec(descriptor(), QUEUE as usize),
        tx in proptest::collection::vec(descriptor(), QUEUE as usize),
        offers in proptest::collection::vec((any::<bool>(), prop_oneof![0..QUEUE, any::<u16>()]), 1..48),
        available in proptest::option::of(any::<u16>()),
    ) {
        let mut bench = Bench::new(config());
        let offered = bench.net.features();
        bench.activate(offered & features);
        for (queue, table) in [(&bench.rx, &rx), (&bench.tx, &tx)] {
            for (index, &(addr, len, flags, next)) in (0..).zip(table) {
                queue.raw_descriptor(index, addr, len, flags, next);
            }
        }
        let mut healthy = true;
        for (n, (to_rx, head)) in offers.into_iter().enumerate() {
            if to_rx { bench.rx.offer(head) } else { bench.tx.offer(head) }
            if let Some(index) = available && n == 20 {
                bench.rx.set_available(index);
            }
            let _ = bench.host.send(&[0x55; 300]);
            let event = DeviceEvent::Source { token: TOKEN_TAP, events: EventSet::IN | EventSet::OUT };
            healthy &= healthy && bench.net.process(event).is_ok();
            while bench.sent().is_some() {}
        }
        bench.net.reset();
        (bench.rx, bench.tx) = (MockQueue::new(&bench.mem, 0, QUEUE), MockQueue::new(&bench.mem, 0x1000, QUEUE));
        bench.activate(offered & !(1 << VIRTIO_RING_F_EVENT_IDX));
        bench.send([0; 12], &pattern(100));
        prop_assert_eq!(bench.sent().unwrap().1, pattern(100));
    }

    /// Frames of any length come through buffers of any size in order and intact.
    #[test]
    fn frames_arrive_whole(
        sizes in proptest::collection::vec(13u32..9000, QUEUE as usize - 1),
        lens in proptest::collection::vec(14usize..9000, 1..20),
    ) {
        let mut bench = Bench::active(config());
        let place = |n: usize| DATA + n as u64 * 0x4000;
        let heads: Vec<_> = sizes.iter().enumerate().map(|(n, &size)| bench.rx.add(&[Buffer::writable(place(n), size)])).collect();
        bench.net.process(DeviceEvent::Queue(RX)).unwrap();
        let mut next = 0;
        for len in lens {
            bench.arrive(&pattern(len));
            let used = bench.rx.used();
            if used.is_empty() {
                break;
            }
            let mut got = Vec::new();
            for (n, &(head, len)) in used.iter().enumerate() {
                prop_assert_eq!(head, heads[next + n]);
                prop_assert!(len <= sizes[next + n]);
                got.extend(bench.bytes(place(next + n), len as usize));
            }
            prop_assert_eq!(usize::from(u16::from_le_bytes([got[10], got[11]])), used.len());
            prop_assert_eq!(&got[HEADER..], &pattern(len)[..]);
            next += used.len();
        }
    }

    /// A header that passes points into the frame and asks for nothing that was not negotiated.
    #[test]
    fn checked_headers_are_safe(mut bytes: [u8; HEADER], gso in 0u8..8, len in 0usize..70_000, allowed in 0u32..0x80) {
        bytes[1] = if bytes[1] < 200 { gso } else { bytes[1] };
        let allowed = Offloads::from_bits_truncate(allowed);
        if let Ok(checked) = check_sent(bytes, len, allowed) {
            prop_assert!((MIN_FRAME..=MAX_FRAME).contains(&len));
            let field = |at: usize| usize::from(u16::from_le_bytes([checked[at], checked[at + 1]]));
            prop_assert_eq!(checked[0] & !1, 0);
            prop_assert!(checked[0] == 0 || allowed.contains(Offloads::CSUM) && field(6) + field(8) + 2 <= len);
            prop_assert!(checked[1] == 0 || checked[0] == 1 && field(4) > 0 && field(2) <= len);
            prop_assert!(checked[1] & 0x7f != 1 || allowed.contains(Offloads::TSO4));
            prop_assert!(checked[1] & 0x7f != 4 || allowed.contains(Offloads::TSO6));
            prop_assert_eq!(field(10), 0);
        }
    }
}
