//! The socket device: queues, muxer and host's sockets together.
#![no_main]

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

use caisson_virtio::devices::vsock::{DialReceiver, HostEnd, PassingDialer, Vsock};
use caisson_vmm_api::devices::VsockConfig;
use caisson_virtio_fuzz::{Session, memory, play};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static DIR: tempfile::TempDir = tempfile::tempdir().expect("a directory");
}

fuzz_target!(|session: Session| {
    let path = DIR.with(|dir| dir.path().join("vsock"));
    let _ = std::fs::remove_file(&path);
    let (receiver, dial) = DialReceiver::pair().expect("a socket pair");
    let host = HostEnd {
        listener: Some(UnixListener::bind(&path).expect("binding")),
        dialer: Some(Box::new(PassingDialer::new(dial, [80, 81]))),
    };
    let device = Vsock::new(VsockConfig { guest_cid: 3 }, host).expect("a device");
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut dialled = 0;
    let mut act = |what: u8, bytes: &[u8]| match what % 6 {
        0 if streams.len() < 32 => {
            let mut stream = UnixStream::connect(&path).expect("connecting");
            stream.set_nonblocking(true).expect("a flag");
            let _ = stream.write_all(format!("CONNECT {}\n", bytes.len()).as_bytes());
            streams.push(stream);
        }
        1 if streams.len() < 32 => {
            let mut stream = UnixStream::connect(&path).expect("connecting");
            stream.set_nonblocking(true).expect("a flag");
            let _ = stream.write(bytes);
            streams.push(stream);
        }
        2 => {
            if let Some(stream) = streams.get_mut(usize::from(what / 6) % 8) {
                let _ = stream.write(bytes);
            }
        }
        3 => {
            if let Some(stream) = streams.get_mut(usize::from(what / 6) % 8) {
                let _ = stream.read(&mut vec![0; bytes.len() * 64]);
            }
        }
        4 if !streams.is_empty() => drop(streams.swap_remove(usize::from(what / 6) % streams.len())),
        5 => {
            // Only what the guest has dialled for sure; the call would wait otherwise.
            let fd = std::os::fd::AsRawFd::as_raw_fd(&receiver);
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, valid over the call.
            if dialled < 32 && unsafe { libc::poll(&raw mut poll, 1, 0) } == 1 {
                dialled += 1;
                if let Ok(Some((_, stream))) = receiver.accept() {
                    stream.set_nonblocking(true).expect("a flag");
                    streams.push(stream);
                }
            }
        }
        _ => {}
    };
    play(&session, &memory(), Box::new(device), &mut act);
});
