//! How connections end: half by half, at once, or for want of an answer.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    time::Duration,
};

use super::{
    super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    driver::{Guest, header, pattern},
};

fn shutdown(flags: u32, host_port: u32) -> Header {
    Header { flags, ..header(Op::Shutdown, 7, host_port) }
}

#[test]
fn the_guest_ends_its_half() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.accept(7);
    guest.send_data(7, port, b"last");
    guest.send(shutdown(SHUTDOWN_SEND, port), &[]);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    stream.write_all(b"reply").unwrap();
    assert_eq!(guest.packet().1, b"reply");
    guest.send(shutdown(SHUTDOWN_BOTH, port), &[]);
    guest.expect(Op::Rst);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn the_host_ends_its_half() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.accept(7);
    stream.write_all(&pattern(5000, 0)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let got: usize = (0..2).map(|_| guest.packet().1.len()).sum();
    assert_eq!(got, 5000);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.send_data(7, port, b"still");
    let mut word = [0; 5];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"still");
    drop(stream);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    guest.send(header(Op::Rst, 7, port), &[]);
    guest.expect_nothing();
    assert_eq!(guest.metrics().closed.get(), 1);
}

#[test]
fn the_guest_is_deaf() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.accept(7);
    guest.send(shutdown(SHUTDOWN_RECEIVE, port), &[]);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send_data(7, port, b"but not mute");
    let mut text = [0; 12];
    stream.read_exact(&mut text).unwrap();
}

#[test]
fn a_host_that_closed_gets_no_more() {
    let mut guest = Guest::new();
    let (stream, port) = guest.accept(7);
    drop(stream);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    guest.send_data(7, port, b"too late");
    guest.expect_nothing();
    std::thread::sleep(Duration::from_millis(60));
    guest.expect(Op::Rst);
    assert_eq!(guest.metrics().timeouts.get(), 1);
    guest.send_data(7, port, b"much too late");
    guest.expect(Op::Rst);
}

#[test]
fn a_reset_waits_for_a_slow_reader() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.accept(7);
    let chunk = pattern(50_000, 7);
    for _ in 0..5 {
        guest.send_data(7, port, &chunk);
    }
    guest.send(shutdown(SHUTDOWN_BOTH, port), &[]);
    guest.expect_nothing();
    let mut all = Vec::new();
    let mut buffer = vec![0; 50_000];
    while all.len() < 5 * chunk.len() {
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0);
        all.extend_from_slice(&buffer[..n]);
        guest.run();
    }
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);
    assert!(all.chunks(chunk.len()).all(|part| part == chunk));
    guest.expect(Op::Rst);
}

#[test]
fn what_was_sent_arrives_after_the_guest_gave_up_waiting() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.accept(7);
    let chunk = pattern(50_000, 7);
    for _ in 0..5 {
        guest.send_data(7, port, &chunk);
    }
    guest.send(shutdown(SHUTDOWN_BOTH, port), &[]);
    guest.send(header(Op::Rst, 7, port), &[]);
    // The guest may use the port again meanwhile.
    let (_other, _) = guest.accept(7);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    while !reader.is_finished() {
        guest.run();
    }
    assert_eq!(reader.join().unwrap().len(), 5 * chunk.len());
    guest.expect_nothing();
}

#[test]
fn a_client_that_says_nothing_is_dropped() {
    let mut guest = Guest::new();
    let mut silent = std::os::unix::net::UnixStream::connect(guest.path()).unwrap();
    let mut odd = std::os::unix::net::UnixStream::connect(guest.path()).unwrap();
    odd.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    guest.run();
    // Closed with the line unread, hence reset.
    assert!(matches!(odd.read(&mut [0]), Ok(0) | Err(_)));
    std::thread::sleep(Duration::from_millis(60));
    guest.run();
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert_eq!((guest.metrics().bad_handshakes.get(), guest.metrics().timeouts.get()), (1, 1));
}

#[test]
fn a_guest_that_does_not_answer_is_not_waited_for() {
    let mut guest = Guest::new();
    let mut client = guest.client(7);
    guest.expect(Op::Request);
    std::thread::sleep(Duration::from_millis(60));
    guest.expect(Op::Rst);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_client_that_left_before_the_answer_is_reported() {
    let mut guest = Guest::new();
    let client = guest.client(7);
    let port = guest.expect(Op::Request).src_port;
    drop(client);
    guest.send(header(Op::Response, 7, port), &[]);
    guest.expect(Op::Rst);
    assert_eq!(guest.metrics().closed.get(), 1);
}

/// Resets wait for receive buffers, and a guest need not offer any.
#[test]
fn a_guest_that_takes_no_packets_has_no_resets_piled_up_for_it() {
    let mut guest = Guest::bare();
    let mut clients: Vec<_> = (0..20).map(|port| guest.client(port)).collect();
    guest.run();
    std::thread::sleep(Duration::from_millis(60));
    guest.run();
    assert_eq!(guest.metrics().timeouts.get(), 20);
    assert!(clients.iter_mut().all(|client| client.read(&mut [0]).unwrap() == 0));
    guest.offer_rx(0);
    guest.expect_nothing();
}

#[test]
fn deadlines_wake_the_event_loop() {
    use crate::VirtioDevice;
    let mut guest = Guest::new();
    let _client = guest.client(7);
    guest.expect(Op::Request);
    guest.run();
    let source = guest.device.poll_sources()[0];
    let mut poll = libc::pollfd { fd: source.fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, valid over the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 2000) };
    assert_eq!(ready, 1);
    guest.expect(Op::Rst);
}
