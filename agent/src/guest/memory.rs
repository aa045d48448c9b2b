//! The guest's memory as a whole.

use super::{GuestError, write};

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
const COMPACT_MEMORY: &str = "/proc/sys/vm/compact_memory";
/// Page cache, and caches of names and inodes (Documentation/admin-guide/sysctl/vm.rst).
const ALL_CACHES: u8 = 3;

/// Frees what the kernel only keeps because it may be asked for again, and moves what stays together.
///
/// # Errors
/// [`GuestError::File`] when the kernel refuses.
pub fn release_caches() -> Result<(), GuestError> {
    // What is dirty is not dropped.
    nix::unistd::sync();
    write(DROP_CACHES, ALL_CACHES)?;
    // A kernel without compaction has no such file, and has freed the memory all the same.
    match write(COMPACT_MEMORY, 1) {
        Err(GuestError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
