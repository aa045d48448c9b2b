//! The entropy device.
#![no_main]

use caisson_vmm::devices::rng::{HostEntropy, Rng};
use caisson_vmm_api::devices::RngConfig;
use caisson_vmm_fuzz::{Session, memory, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|session: Session| {
    let device = Rng::new(RngConfig::default(), HostEntropy).expect("a device");
    play(&session, &memory(), Box::new(device), &mut |_, _| {});
});
