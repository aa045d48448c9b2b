//! The disk, by its worker thread on an anonymous file.
#![no_main]

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use caisson_virtio::devices::block::Block;
use caisson_vmm_api::devices::BlockConfig;
use caisson_virtio_fuzz::{Session, memory, play};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static FILE: OwnedFd = {
        // SAFETY: a name that ends in NUL, and a descriptor that the kernel made for us alone.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
        std::fs::File::from(file.try_clone().expect("a descriptor")).set_len(1 << 20).expect("a size");
        file
    };
}

fuzz_target!(|session: Session| {
    let file = FILE.with(|file| file.as_fd().try_clone_to_owned()).expect("a descriptor");
    let config = BlockConfig { id: "fuzzed".into(), queues: 2, ..BlockConfig::default() };
    let device = Block::new(config, vec![file], || {}).expect("a device");
    play(&session, &memory(), Box::new(device), &mut |_, _| {});
});
