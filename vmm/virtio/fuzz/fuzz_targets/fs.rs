//! The shared directory, by its workers, on a directory of its own that is removed at the end of the process.
//!
//! [`Step::Host`](caisson_virtio_fuzz::Step::Host) has a file made in it, so that there is something to be found.
#![no_main]

use caisson_vmm_api::devices::FsConfig;
use caisson_virtio_fuzz::{Session, memory, play, share};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

fuzz_target!(|session: Session| {
    // In memory: a driver may ask for everything to be brought to the disk.
    let dir = TempDir::new_in("/dev/shm").expect("a directory");
    let config = FsConfig { tag: "fuzzed".into(), max_descriptors: 32, ..FsConfig::default() };
    let device = share(config, dir.path());
    play(&session, &memory(), Box::new(device), &mut |what, bytes| {
        // A full disk is no finding.
        let _ = std::fs::write(dir.path().join(what.to_string()), bytes);
    });
});
