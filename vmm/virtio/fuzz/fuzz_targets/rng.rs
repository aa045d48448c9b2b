//! The entropy device.
#![no_main]

use caisson_virtio::devices::rng::{HostEntropy, Rng};
use caisson_vmm_api::devices::RngConfig;
use caisson_virtio_fuzz::{Session, memory, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|session: Session| {
    let device = Rng::new(RngConfig::default(), HostEntropy).expect("a device");
    play(&session, &memory(), Box::new(device), &mut |_, _| {});
});
