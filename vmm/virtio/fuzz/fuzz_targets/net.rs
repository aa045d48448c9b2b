//! The network card, on a pair of datagram sockets in the place of a tap device.
#![no_main]

use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixDatagram,
    },
};

use caisson_virtio::{devices::net::{HEADER, Net, NetBackend, Offloads}, buffers::GuestBuffers};
use caisson_vmm_api::devices::NetConfig;
use caisson_virtio_fuzz::{Session, memory, play};
use libfuzzer_sys::fuzz_target;

struct Socket(UnixDatagram);

impl NetBackend for Socket {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn supported(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, buffers: &GuestBuffers) -> io::Result<usize> {
        let mut frame = vec![0; 70_000];
        let length = self.0.recv(&mut frame)?;
        Ok(buffers.copy_from(0, &frame[..length]))
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &GuestBuffers) -> io::Result<()> {
        let mut bytes = vec![0; frame.len()];
        frame.copy_to(0, &mut bytes);
        self.0.send(&[&header[..], &bytes].concat()).map(|_| ())
    }
}

fuzz_target!(|session: Session| {
    let (ours, theirs) = UnixDatagram::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("a flag");
    theirs.set_nonblocking(true).expect("a flag");
    let config: NetConfig = serde_json::from_str(r#"{"mac": "02:00:00:00:00:01"}"#).expect("a configuration");
    let device = Net::with_backend(config, Socket(ours)).expect("a device");
    let mut act = |what: u8, bytes: &[u8]| {
        if what % 2 == 0 {
            let _ = theirs.send(&[&[0; HEADER][..], bytes].concat());
        } else {
            let _ = theirs.recv(&mut [0; 2000]);
        }
    };
    play(&session, &memory(), Box::new(device), &mut act);
});
