//! The shared directory, by its workers, on a directory of its own that is removed at the end of the process.
//!
//! [`Step::Host`](caisson_vmm_fuzz::Step::Host) has a file made in it, so that there is something to be found.
#![no_main]

use std::{fs::File, os::fd::OwnedFd, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc};

use caisson_vmm::devices::fs::{Fs, FsConfig, Workers};
use caisson_vmm_fuzz::{Session, limit_file_size, memory, play};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

fn open(path: &Path) -> OwnedFd {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    File::options().read(true).custom_flags(flags).open(path).expect("a directory").into()
}

thread_local! {
    static WORKERS: Arc<Workers> = {
        limit_file_size();
        Workers::start(1, open(Path::new("/proc/self/fd"))).expect("a worker")
    };
}

fuzz_target!(|session: Session| {
    // In memory: a driver may ask for everything to be brought to the disk.
    let dir = TempDir::new_in("/dev/shm").expect("a directory");
    let config = FsConfig { tag: "fuzzed".into(), max_descriptors: 32, ..FsConfig::default() };
    let device = Fs::new(config, open(dir.path()), WORKERS.with(Arc::clone)).expect("a device");
    play(&session, &memory(), Box::new(device), &mut |what, bytes| {
        // A full disk is no finding.
        let _ = std::fs::write(dir.path().join(what.to_string()), bytes);
    });
});
