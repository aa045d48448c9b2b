//! The balloon. What it gives back must be whole pages of guest memory.
#![no_main]

use std::{io, sync::Arc};

use caisson_virtio::{devices::balloon::Balloon, memory::Discard};
use caisson_vmm_api::devices::BalloonConfig;
use caisson_virtio_fuzz::{MEMORY, Session, memory, play};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

struct Memory;

impl Discard for Memory {
    fn discard(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        let aligned = addr.0.is_multiple_of(4096) && len.is_multiple_of(4096);
        if aligned && addr.0.checked_add(len).is_some_and(|end| end <= MEMORY) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

fuzz_target!(|session: Session| {
    let device = Balloon::new(BalloonConfig::default(), Arc::new(Memory)).expect("a device");
    play(&session, &memory(), Box::new(device), &mut |_, _| {});
});
