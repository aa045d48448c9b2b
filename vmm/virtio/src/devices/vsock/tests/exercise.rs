//! All that the device does, for the test of the system call filter that the event loop has in a jail.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, Ordering},
};

use super::{
    super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND},
    driver::{Guest, header},
};
use crate::ThreadSetup;

/// Has connections opened, used and closed on a thread that begins with `setup`. A filter that lacks one of its calls
/// ends the process.
///
/// # Panics
/// When something does not arrive as it should.
pub fn exercise_device(setup: ThreadSetup) {
    let mut guest = Guest::new();
    let path = guest.path();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            setup();
            // Nobody can be dialled by a path here, which is no more than a refused connection.
            guest.send(header(Op::Request, 9, 80), &[]);
            guest.expect(Op::Rst);
            while !done.load(Ordering::Relaxed) {
                guest.run();
                while let Some((packet, data)) = guest.arrived.pop_front() {
                    let reply = header(Op::Rw, packet.dst_port, packet.src_port);
                    match packet.op() {
                        Some(Op::Request) => guest.send(Header { op: Op::Response as u16, ..reply }, &[]),
                        Some(Op::Rw) => guest.send_data(packet.dst_port, packet.src_port, &data),
                        Some(Op::Shutdown) => {
                            let half =
                                if packet.flags == SHUTDOWN_BOTH { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                            guest.send(Header { op: Op::Shutdown as u16, flags: half, ..reply }, &[]);
                        }
                        _ => {}
                    }
                }
            }
        });
        for round in 0..10u32 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"CONNECT 7\n").unwrap();
            let line = super::driver::line(&mut client);
            assert!(line.starts_with("OK "));
            client.write_all(&round.to_le_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut back = Vec::new();
            client.read_to_end(&mut back).unwrap();
            assert_eq!(back, round.to_le_bytes());
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn connections_are_opened_used_and_closed() {
    exercise_device(|| {});
}
