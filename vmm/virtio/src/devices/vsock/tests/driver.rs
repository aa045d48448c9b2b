//! The guest's side of the device.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use caisson_vmm_api::devices::VsockConfig;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::{
    HostEnd, PathDialer, Timeouts, Vsock,
    packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM},
};
use crate::{
    Activation, DeviceError, DeviceEvent, VirtioDevice,
    devices::vsock::VsockMetrics,
    memory::GuestMem,
    mock::{Buffer, CountingInterrupt, MockQueue},
};
use vmm_sys_util::epoll::EventSet;

pub(super) const CID: u32 = 5;
const RINGS: [u64; 3] = [0x1000, 0x4000, 0x7000];
const RX_AT: u64 = 0x10_0000;
const TX_AT: u64 = 0x30_0000;
const EVENT_AT: u64 = 0x9000;
const RX_BUFFER: u32 = 4096;
const TX_SLOT: u64 = 0x2_0000;
/// Receive buffers that are kept offered.
const RX_COUNT: u16 = 64;
const QUEUE_SIZE: u16 = 128;

/// Deadlines that a test can wait for.
pub(super) const TIMEOUTS: Timeouts = Timeouts {
    handshake: Duration::from_millis(50),
    connect: Duration::from_millis(50),
    close: Duration::from_millis(50),
    transport_reset: Duration::from_millis(50),
    accept: Duration::from_millis(10),
};

/// A guest with one vsock device, and the directory of the host's sockets.
pub(super) struct Guest {
    pub(super) device: Vsock,
    pub(super) mem: GuestMem,
    pub(super) rx: MockQueue,
    pub(super) tx: MockQueue,
    pub(super) events: MockQueue,
    pub(super) interrupt: Arc<CountingInterrupt>,
    pub(super) dir: Arc<tempfile::TempDir>,
    pub(super) arrived: VecDeque<(Header, Vec<u8>)>,
    rx_heads: BTreeMap<u16, u64>,
    tx_next: u64,
}

pub(super) fn header(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

pub(super) fn memory() -> GuestMem {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap())
}

impl Guest {
    /// An active device without offered receive buffers.
    pub(super) fn bare() -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let host = host_end(&dir);
        let device = Vsock::with_timeouts(VsockConfig { guest_cid: CID }, host, TIMEOUTS).unwrap();
        let mem = memory();
        let [rx, tx, events] = RINGS.map(|base| MockQueue::new(&mem, base, QUEUE_SIZE));
        let interrupt = CountingInterrupt::new();
        let mut guest = Self {
            device,
            mem,
            rx,
            tx,
            events,
            interrupt,
            dir,
            arrived: VecDeque::new(),
            rx_heads: BTreeMap::new(),
            tx_next: 0,
        };
        let queues = [&guest.rx, &guest.tx, &guest.events].map(MockQueue::device_side).into();
        guest.activate(queues);
        guest
    }

    /// An active device with receive buffers.
    pub(super) fn new() -> Self {
        let mut guest = Self::bare();
        for slot in 0..RX_COUNT {
            guest.offer_rx(slot.into());
        }
        guest
    }

    pub(super) fn activate(&mut self, queues: Vec<virtio_queue::Queue>) {
        self.activate_as(false, queues);
    }

    fn activate_as(&mut self, restored: bool, queues: Vec<virtio_queue::Queue>) {
        let features = self.device.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        let interrupt = self.interrupt.clone();
        let activation = Activation::new(self.mem.clone(), queues, features, interrupt);
        self.device.activate(Activation { restored, ..activation }).unwrap();
    }

    /// The same guest on a restored device.
    #[cfg(test)]
    pub(super) fn restore(mut self, cid: u32) -> Self {
        use crate::{Persist, devices::vsock::VsockResources};
        let queues = self.device.quiesce().unwrap();
        let state = self.device.state();
        std::fs::remove_file(self.path()).unwrap();
        let config = VsockConfig { guest_cid: cid };
        let resources = VsockResources { config, host: host_end(&self.dir) };
        self.device = Vsock::restore(&state, resources).unwrap();
        let queues = queues.iter().map(|queue| (*queue).try_into().unwrap()).collect();
        self.activate_as(true, queues);
        self
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// A host service that the guest can dial.
    pub(super) fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("vsock_{port}"))).unwrap()
    }

    pub(super) fn offer_rx(&mut self, slot: u64) {
        let addr = RX_AT + slot * u64::from(RX_BUFFER);
        let head = self.rx.add(&[Buffer::writable(addr, RX_BUFFER)]);
        self.rx_heads.insert(head, addr);
    }

    pub(super) fn offer_event(&mut self) {
        self.events.add(&[Buffer::writable(EVENT_AT, 8)]);
    }

    /// Lets the device work until nothing happens any more.
    pub(super) fn run(&mut self) {
        self.try_run().unwrap();
    }

    pub(super) fn try_run(&mut self) -> Result<(), DeviceError> {
        for _ in 0..4 {
            self.device.process(DeviceEvent::Source { token: 0, events: EventSet::IN })?;
            self.collect();
        }
        Ok(())
    }

    /// Takes in what the device has sent, offering the buffers again.
    fn collect(&mut self) {
        for (head, len) in self.rx.used() {
            let addr = self.rx_heads.remove(&head).unwrap();
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
            let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
            let data = bytes.split_off(HEADER_LEN);
            assert_eq!(data.len(), usize::try_from(header.len).unwrap());
            self.arrived.push_back((header, data));
            self.offer_rx((addr - RX_AT) / u64::from(RX_BUFFER));
        }
        self.tx.used();
    }

    /// Runs until a packet arrives.
    pub(super) fn packet(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.arrived.pop_front() {
                return packet;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "no packet arrived");
            self.run();
        }
    }

    /// Runs until a packet arrives, which must be this one. Credit may come at any time before.
    pub(super) fn expect(&mut self, op: Op) -> Header {
        let mut header = self.packet().0;
        while header.op() == Some(Op::CreditUpdate) {
            header = self.packet().0;
        }
        assert_eq!(header.op(), Some(op), "{header:?}");
        header
    }

    /// Nothing more arrives, but perhaps credit.
    pub(super) fn expect_nothing(&mut self) {
        self.run();
        self.arrived.retain(|(header, _)| header.op() != Some(Op::CreditUpdate));
        assert_eq!(self.arrived, []);
    }

    /// Sends a packet, header and data each in a buffer of its own.
    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        self.put(header, data);
        self.run();
    }

    /// Offers a packet to the device, which is not run.
    pub(super) fn put(&mut self, header: Header, data: &[u8]) {
        let addr = TX_AT + (self.tx_next % 64) * TX_SLOT;
        self.tx_next += 1;
        self.mem.write_slice(&header.encode(), GuestAddress(addr)).unwrap();
        self.mem.write_slice(data, GuestAddress(addr + 64)).unwrap();
        let head = Buffer::readable(addr, u32::try_from(HEADER_LEN).unwrap());
        // Two pieces of data, as Linux has for user memory that is not in one piece.
        let half = u32::try_from(data.len() / 2).unwrap();
        let rest = u32::try_from(data.len()).unwrap() - half;
        let parts =
            [head, Buffer::readable(addr + 64, half), Buffer::readable(addr + 64 + u64::from(half), rest)];
        self.tx.add(if data.is_empty() { &parts[..1] } else { &parts });
    }

    pub(super) fn send_data(&mut self, guest_port: u32, host_port: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.send(Header { len, ..header(Op::Rw, guest_port, host_port) }, data);
    }

    /// Opens a connection from the guest to a host service.
    pub(super) fn dial(&mut self, service: &UnixListener, guest_port: u32, host_port: u32) -> UnixStream {
        self.send(header(Op::Request, guest_port, host_port), &[]);
        self.expect(Op::Response);
        let stream = service.accept().unwrap().0;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// A host's client that asks for a port of the guest.
    pub(super) fn client(&self, guest_port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(format!("CONNECT {guest_port}\n").as_bytes()).unwrap();
        stream
    }

    /// Opens a connection from the host to the guest; returns the host's port, too.
    pub(super) fn accept(&mut self, guest_port: u32) -> (UnixStream, u32) {
        let mut stream = self.client(guest_port);
        let host_port = self.expect(Op::Request).src_port;
        self.send(header(Op::Response, guest_port, host_port), &[]);
        assert_eq!(line(&mut stream), format!("OK {host_port}\n"));
        (stream, host_port)
    }

    pub(super) fn metrics(&self) -> Arc<VsockMetrics> {
        self.device.metrics()
    }
}

fn host_end(dir: &tempfile::TempDir) -> HostEnd {
    let path = dir.path().join("vsock");
    HostEnd {
        listener: Some(UnixListener::bind(&path).unwrap()),
        dialer: Some(Box::new(PathDialer::new(path))),
    }
}

pub(super) fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| seed.wrapping_add(u8::try_from(i % 251).unwrap())).collect()
}
