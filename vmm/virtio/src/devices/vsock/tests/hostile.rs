//! Guests that break the rules.

use std::io::Read;

use caisson_vmm_api::devices::VsockConfig;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::{
    super::{
        HostEnd, MAX_CONNECTIONS, Vsock, VsockError,
        packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM},
    },
    driver::{CID, Guest, header, pattern},
};
use crate::{
    DeviceError, DeviceEvent, VirtioDevice,
    mock::{Buffer, MockQueue},
};

#[test]
fn a_guest_that_ignores_its_credit_loses_the_connection() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.accept(7);
    let chunk = pattern(60_000, 0);
    for _ in 0..40 {
        guest.send_data(7, port, &chunk);
    }
    assert!(guest.arrived.iter().any(|(header, _)| header.op() == Some(Op::Rst)));
    assert_eq!(guest.metrics().violations.get(), 1);
    let mut taken = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            n => taken += n,
        }
    }
    assert!(taken < 40 * chunk.len());
}

#[test]
fn another_source_is_dropped_and_another_destination_refused() {
    let mut guest = Guest::new();
    let service = guest.serve(80);
    let (_stream, port) = guest.accept(7);
    guest.send(Header { src_cid: u64::from(CID) + 1, ..header(Op::Request, 9, 80) }, &[]);
    guest.send(Header { src_cid: u64::from(CID) | 1 << 32, ..header(Op::Request, 9, 80) }, &[]);
    guest.send(Header { src_cid: HOST_CID, ..header(Op::Rst, 7, port) }, &[]);
    guest.expect_nothing();
    assert_eq!(guest.metrics().dropped.get(), 3);
    guest.send(Header { dst_cid: 77, ..header(Op::Request, 9, 80) }, &[]);
    assert_eq!(guest.expect(Op::Rst).src_cid, 77);
    guest.send(Header { kind: 2, ..header(Op::Request, 9, 80) }, &[]);
    assert_eq!(guest.expect(Op::Rst).kind, 2);
    service.set_nonblocking(true).unwrap();
    assert!(service.accept().is_err());
}

#[test]
fn packets_out_of_turn_end_the_connection() {
    for op in [0, Op::Request as u16, Op::Response as u16, 8, u16::MAX] {
        let mut guest = Guest::new();
        let (mut stream, port) = guest.accept(7);
        guest.send(Header { op, ..header(Op::Rw, 7, port) }, &[]);
        guest.expect(Op::Rst);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_packet_shorter_than_it_says_ends_the_connection() {
    let mut guest = Guest::new();
    let (_stream, port) = guest.accept(7);
    guest.send(Header { len: 100, ..header(Op::Rw, 7, port) }, &[0; 99]);
    guest.expect(Op::Rst);
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::new();
    let service = guest.serve(80);
    let mut streams = Vec::new();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        streams.push(guest.dial(&service, port, 80));
    }
    guest.send(header(Op::Request, 5000, 80), &[]);
    guest.expect(Op::Rst);
    let _waiting = guest.client(7);
    guest.expect_nothing();
    // Whoever waited is served when there is room again.
    drop(streams.pop());
    guest.expect(Op::Shutdown);
    guest.send(header(Op::Rst, u32::try_from(MAX_CONNECTIONS).unwrap() - 1, 80), &[]);
    guest.expect(Op::Request);
}

#[test]
fn resets_are_bounded_and_none_is_lost() {
    let mut guest = Guest::bare();
    for _ in 0..30 {
        for port in 0..10 {
            guest.put(header(Op::Rw, port, 1), &[]);
        }
        guest.run();
    }
    let taken = guest.metrics().tx_packets.get();
    guest.run();
    assert_eq!((taken, guest.metrics().tx_packets.get()), (256, 256), "the rest stays in the queue");
    for slot in 0..64 {
        guest.offer_rx(slot);
    }
    for _ in 0..300 {
        guest.expect(Op::Rst);
    }
}

#[test]
fn broken_rings_end_the_device() {
    let mut guest = Guest::new();
    guest.tx.set_available(1000);
    assert!(matches!(guest.try_run(), Err(DeviceError::AvailableIndex { queue: 1, .. })));

    let mut guest = Guest::new();
    guest.tx.add(&[Buffer::readable(0x1000, 43)]);
    assert!(matches!(guest.try_run(), Err(DeviceError::Driver { queue: 1, .. })));

    for length in [0, 43, 44] {
        let mut other = Guest::bare();
        other.rx.add(&[Buffer::writable(0x10_0000, length)]);
        let client = other.client(7);
        let outcome =
            other.device.process(DeviceEvent::Source { token: 0, events: vmm_sys_util::epoll::EventSet::IN });
        // A bare header has room for a request, but not for data.
        assert_eq!(outcome.is_ok(), length == 44, "{length}");
        drop(client);
    }
}

#[test]
fn reserved_addresses_are_refused() {
    for guest_cid in [0, 1, 2, u32::MAX] {
        let made = Vsock::new(VsockConfig { guest_cid }, HostEnd::default());
        assert!(matches!(made.err(), Some(VsockError::ReservedCid(cid)) if cid == guest_cid));
    }
}

#[test]
fn the_configuration_is_the_address_and_nothing_else() {
    let guest = Guest::bare();
    let mut all = [0xff; 16];
    guest.device.read_config(0, &mut all);
    assert_eq!(all[..8], u64::from(CID).to_le_bytes());
    for offset in [8, 9, u64::MAX] {
        let mut data = [0; 4];
        guest.device.read_config(offset, &mut data);
        assert_eq!(data, [0; 4]);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Packet { header: Header, len: usize },
    Chain(Vec<(u64, u32, bool)>),
    Raw { queue: bool, index: u16, addr: u64, len: u32, flags: u16, next: u16 },
    Client(u32),
    Write(usize, usize),
    Read(usize),
    Drop(usize),
    Rx,
    Event,
}

fn packets() -> impl Strategy<Value = Step> {
    let port = || prop_oneof![Just(80u32), Just(1 << 30), Just((1 << 30) + 1), 0u32..4];
    let cid = || prop_oneof![8 => Just(u64::from(CID)), 1 => any::<u64>()];
    let host = || prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()];
    let sizes = || prop_oneof![4 => 0u32..3000, 1 => any::<u32>()];
    (cid(), host(), port(), port(), 0u16..9, 0u32..5, sizes(), sizes(), 0usize..3000).prop_map(
        |(src_cid, dst_cid, src_port, dst_port, op, flags, len, credit, real)| Step::Packet {
            header: Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind: TYPE_STREAM,
                op,
                flags,
                buf_alloc: credit,
                fwd_cnt: credit / 2,
            },
            len: if len < 3000 { usize::try_from(len).unwrap() } else { real },
        },
    )
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => packets(),
        1 => proptest::collection::vec((0u64..17 << 20, 0u32..70_000, any::<bool>()), 1..4).prop_map(Step::Chain),
        1 => (any::<bool>(), 0u16..128, any::<u64>(), any::<u32>(), 0u16..8, any::<u16>())
            .prop_map(|(queue, index, addr, len, flags, next)| Step::Raw { queue, index, addr, len, flags, next }),
        2 => (0u32..4).prop_map(Step::Client),
        2 => (0usize..8, 0usize..20_000).prop_map(|(which, len)| Step::Write(which, len)),
        2 => (0usize..8).prop_map(Step::Read),
        1 => (0usize..8).prop_map(Step::Drop),
        2 => Just(Step::Rx),
        1 => Just(Step::Event),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a guest and clients do: no panic, no endless loop, and at worst the device ends with an
    /// error.
    #[test]
    fn anything_goes(steps in proptest::collection::vec(steps(), 1..120)) {
        let mut guest = Guest::new();
        let service = guest.serve(80);
        service.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        let mut offered = 0;
        for step in steps {
            match step {
                Step::Packet { header, len } => guest.put(header, &pattern(len, 0)),
                Step::Chain(parts) => {
                    let parts: Vec<_> =
                        parts.iter().map(|&(addr, len, writable)| Buffer { addr, len, writable }).collect();
                    guest.tx.add(&parts);
                }
                Step::Raw { queue, index, addr, len, flags, next } => {
                    let queue: &mut MockQueue = if queue { &mut guest.tx } else { &mut guest.events };
                    queue.raw_descriptor(index, addr, len, flags, next);
                    queue.offer(index);
                }
                Step::Client(port) => streams.push(guest.client(port)),
                Step::Write(which, len) => {
                    if let Some(stream) = streams.get_mut(which) {
                        stream.set_nonblocking(true).unwrap();
                        let _ = std::io::Write::write(stream, &pattern(len, 0));
                    }
                }
                Step::Read(which) => {
                    if let Some(stream) = streams.get_mut(which) {
                        stream.set_nonblocking(true).unwrap();
                        let _ = stream.read(&mut [0; 10_000]);
                    }
                }
                Step::Drop(which) if which < streams.len() => drop(streams.swap_remove(which)),
                Step::Drop(_) => {}
                Step::Rx => {
                    offered += 1;
                    guest.mem.write_slice(&[0; HEADER_LEN], GuestAddress(0x80_0000)).unwrap();
                    if offered < 10 {
                        guest.offer_rx(64 + offered);
                    }
                }
                Step::Event => guest.offer_event(),
            }
            if guest.device.process(DeviceEvent::Queue(1)).is_err() || guest.try_run().is_err() {
                guest.device.reset();
                break;
            }
            while let Ok((stream, _)) = service.accept() {
                streams.push(stream);
            }
            guest.arrived.clear();
            let (connections, bytes) = guest.device.holdings();
            prop_assert!(connections <= MAX_CONNECTIONS && bytes <= 24 << 20);
        }
    }
}
