//! Data goes through, in full and in order, whoever is slow.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use super::{
    super::packet::{Header, Op},
    driver::{CID, Guest, header, line, pattern},
};
use crate::VirtioDevice;

#[test]
fn the_host_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let mut client = guest.client(1024);
    let request = guest.expect(Op::Request);
    assert_eq!((request.src_cid, request.dst_cid, request.dst_port), (2, CID.into(), 1024));
    assert!(request.buf_alloc > 0);
    // What follows the line is data, whether or not the client waits for the answer.
    client.write_all(b"early").unwrap();
    guest.expect_nothing();
    guest.send(header(Op::Response, 1024, request.src_port), &[]);
    assert_eq!(line(&mut client), format!("OK {}\n", request.src_port));
    assert_eq!(guest.packet().1, b"early");
    guest.send_data(1024, request.src_port, b"hello");
    let mut word = [0; 5];
    client.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
    assert!(guest.interrupt.take_queue() > 0);
}

#[test]
fn the_guest_reaches_a_port_of_the_host() {
    let mut guest = Guest::new();
    let service = guest.serve(80);
    let mut stream = guest.dial(&service, 9, 80);
    guest.send_data(9, 80, b"ping");
    let mut word = [0; 4];
    stream.read_exact(&mut word).unwrap();
    stream.write_all(b"pong").unwrap();
    let (reply, data) = guest.packet();
    assert_eq!((reply.src_port, reply.dst_port, &data[..]), (80, 9, &b"pong"[..]));
}

#[test]
fn a_port_that_nobody_serves_is_reset() {
    let mut guest = Guest::new();
    guest.send(header(Op::Request, 9, 81), &[]);
    let reset = guest.expect(Op::Rst);
    assert_eq!((reset.src_port, reset.dst_port), (81, 9));
    assert_eq!(guest.metrics().refused.get(), 1);

    let mut client = guest.client(7);
    let request = guest.expect(Op::Request);
    guest.send(header(Op::Rst, 7, request.src_port), &[]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut guest = Guest::new();
    let mut client = UnixStream::connect(guest.path()).unwrap();
    for piece in ["CON", "NECT 10", "24", "\n"] {
        guest.expect_nothing();
        client.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(guest.expect(Op::Request).dst_port, 1024);
}

/// Pushes `total` bytes each way through one connection while honouring credit; returns when all has arrived.
fn echo(guest: &mut Guest, stream: UnixStream, ports: (u32, u32), total: usize) {
    let sent = pattern(total, 3);
    let expected = sent.clone();
    let mut reader = stream.try_clone().unwrap();
    let host = std::thread::spawn(move || {
        let mut got = Vec::new();
        let mut buffer = vec![0; 100_000];
        while got.len() < total {
            let n = reader.read(&mut buffer).unwrap();
            assert!(n > 0, "the stream ended");
            got.extend_from_slice(&buffer[..n]);
            (&stream).write_all(&buffer[..n]).unwrap();
        }
        assert!(got == expected);
    });
    let (mut done, mut back) = (0, Vec::new());
    let (mut alloc, mut forwarded) = (u32::try_from(total.min(16 << 10)).unwrap(), 0);
    let mut ours = 0;
    while back.len() < total {
        let credit = alloc - u32::try_from(done).unwrap().wrapping_sub(forwarded);
        let chunk = usize::try_from(credit).unwrap().min(total - done).min(60_000);
        let header = header(Op::Rw, ports.0, ports.1);
        let mine = Header { fwd_cnt: ours, buf_alloc: 200_000, ..header };
        if chunk > 0 {
            guest.send(Header { len: u32::try_from(chunk).unwrap(), ..mine }, &sent[done..done + chunk]);
            done += chunk;
        } else {
            guest.send(Header { op: Op::CreditUpdate as u16, ..mine }, &[]);
        }
        while let Some((header, data)) = guest.arrived.pop_front() {
            assert_ne!(header.op(), Some(Op::Rst));
            (alloc, forwarded) = (header.buf_alloc, header.fwd_cnt);
            ours += header.len;
            back.extend(data);
        }
    }
    host.join().unwrap();
    assert!(back == sent);
}

#[test]
fn much_data_goes_both_ways_in_order() {
    let mut guest = Guest::new();
    let (stream, host_port) = guest.accept(7);
    let start = std::time::Instant::now();
    echo(&mut guest, stream, (7, host_port), 8 << 20);
    eprintln!("8 MiB each way in {:?}", start.elapsed());
    let metrics = guest.metrics();
    assert_eq!((metrics.rx_bytes.get(), metrics.tx_bytes.get()), (8 << 20, 8 << 20));
}

#[test]
fn a_slow_reader_stops_only_itself() {
    let mut guest = Guest::new();
    let service = guest.serve(80);
    let mut slow = guest.dial(&service, 1, 80);
    let mut quick = guest.dial(&service, 2, 80);
    // Fill what the guest has credit for; the socket takes a part of it.
    let chunk = pattern(50_000, 1);
    let mut total = 0;
    for _ in 0..5 {
        guest.send_data(1, 80, &chunk);
        total += chunk.len();
    }
    for round in 0..100u8 {
        guest.send_data(2, 80, &[round]);
        let mut byte = [0];
        quick.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], round);
    }
    let mut all = vec![0; total];
    slow.set_nonblocking(true).unwrap();
    let mut got = 0;
    while got < total {
        match slow.read(&mut all[got..]) {
            Ok(n) => got += n,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => guest.run(),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(all.chunks(chunk.len()).all(|part| part == chunk));
    // The guest hears of the room that there is again.
    let last = guest.arrived.iter().rfind(|(header, _)| header.dst_port == 1).unwrap().0;
    assert!(last.fwd_cnt > 100_000);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    let (mut greedy, _) = guest.accept(1);
    let (mut modest, _) = guest.accept(2);
    greedy.write_all(&pattern(100_000, 0)).unwrap();
    modest.write_all(&pattern(10_000, 0)).unwrap();
    guest.run();
    let order: Vec<u32> = guest.arrived.iter().map(|(header, _)| header.dst_port).collect();
    let last_modest = order.iter().rposition(|port| *port == 2).unwrap();
    assert!(last_modest < 8, "{order:?}");
}

#[test]
fn nothing_is_lost_without_receive_buffers() {
    let mut guest = Guest::bare();
    let mut clients: Vec<_> = (0..10).map(|port| guest.client(port)).collect();
    guest.run();
    assert!(guest.metrics().rx_starved.get() > 0);
    for slot in 0..3 {
        guest.offer_rx(slot);
    }
    for _ in 0..10 {
        let request = guest.expect(Op::Request);
        guest.send(header(Op::Response, request.dst_port, request.src_port), &[]);
    }
    for client in &mut clients {
        assert!(line(client).starts_with("OK "));
    }
}

#[test]
fn a_pause_changes_nothing() {
    let mut guest = Guest::new();
    let (mut stream, host_port) = guest.accept(7);
    for round in 0..5u8 {
        stream.write_all(&[round]).unwrap();
        let before = guest.device.quiesce().unwrap();
        assert_eq!(guest.device.quiesce().unwrap(), before);
        assert_eq!(guest.packet().1, [round]);
        guest.send_data(7, host_port, &[round]);
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], round);
    }
}

#[test]
fn a_restored_guest_forgets_before_it_hears() {
    let mut guest = Guest::new();
    guest.offer_event();
    let (mut old, _) = guest.accept(7);
    let mut guest = guest.restore(CID + 1);
    assert_eq!(old.read(&mut [0]).unwrap(), 0, "the connection stayed behind");
    let mut client = guest.client(7);
    guest.expect_nothing();
    assert_eq!(guest.events.used(), [(0, 4)]);
    let mut cid = [0; 8];
    guest.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID + 1));
    // The driver gives the buffer back once it has reset its connections.
    guest.offer_event();
    let request = guest.expect(Op::Request);
    assert_eq!(request.dst_cid, u64::from(CID + 1));
    let response = header(Op::Response, 7, request.src_port);
    guest.send(Header { src_cid: u64::from(CID + 1), ..response }, &[]);
    assert!(line(&mut client).starts_with("OK "));
}

#[test]
fn a_driver_without_event_buffers_does_not_hold_connections_for_ever() {
    let mut guest = Guest::new().restore(CID);
    let _client = guest.client(7);
    guest.expect_nothing();
    std::thread::sleep(Duration::from_millis(60));
    guest.expect(Op::Request);
}

#[test]
fn a_reset_device_starts_over() {
    let mut guest = Guest::new();
    let (mut old, _) = guest.accept(7);
    guest.device.reset();
    assert_eq!(old.read(&mut [0]).unwrap(), 0);
    let dir = guest.dir.clone();
    let client = guest.client(9);
    let mut again = Guest::bare();
    // The same device, new queues: whoever came meanwhile is served.
    std::mem::swap(&mut again.device, &mut guest.device);
    let queues = [&again.rx, &again.tx, &again.events].map(crate::mock::MockQueue::device_side).into();
    again.activate(queues);
    for slot in 0..4 {
        again.offer_rx(slot);
    }
    assert_eq!(again.expect(Op::Request).dst_port, 9);
    drop((client, dir));
}
