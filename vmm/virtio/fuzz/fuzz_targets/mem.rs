//! The memory device. Blocks are plugged once, unplugged once, and lie in the region.
#![no_main]

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
};

use caisson_virtio::devices::mem::{Blocks, MemoryConfig, MemoryDevice};
use caisson_virtio_fuzz::{Session, memory, play};
use libfuzzer_sys::fuzz_target;

const START: u64 = 1 << 30;
const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 2 << 20;

#[derive(Default)]
struct Plugged(Mutex<BTreeSet<u64>>);

fn blocks(addr: u64, len: u64) -> impl Iterator<Item = u64> {
    assert!(addr >= START && addr % BLOCK == 0 && len % BLOCK == 0 && len > 0);
    assert!(addr + len <= START + SIZE);
    (0..len / BLOCK).map(move |i| addr + i * BLOCK)
}

impl Blocks for Plugged {
    fn plug(&self, addr: u64, len: u64) -> io::Result<()> {
        let mut plugged = self.0.lock().expect("a lock");
        blocks(addr, len).for_each(|block| assert!(plugged.insert(block), "plugged twice"));
        Ok(())
    }

    fn unplug(&self, addr: u64, len: u64) -> io::Result<()> {
        let mut plugged = self.0.lock().expect("a lock");
        blocks(addr, len).for_each(|block| assert!(plugged.remove(&block), "unplugged twice"));
        Ok(())
    }
}

fuzz_target!(|session: Session| {
    let config = MemoryConfig { start: START, size: SIZE, block_size: BLOCK, requested_size: SIZE / 2 };
    let device = MemoryDevice::new(config, Arc::<Plugged>::default()).expect("a device");
    play(&session, &memory(), Box::new(device), &mut |_, _| {});
});
