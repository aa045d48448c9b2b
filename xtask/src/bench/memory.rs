//! What a process holds, from `/proc/PID/smaps` (proc_pid_smaps(5)).

use anyhow::{Context, Result};
use procfs::process::{MemoryMap, Process};

/// A VMM's memory, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Anonymous memory of the process itself.
    pub(super) private: u64,
    /// Guest memory that is there.
    pub(super) guest: u64,
}

/// Reads a process's memory.
pub(super) fn of(pid: u32) -> Result<Memory> {
    let maps = Process::new(pid.cast_signed()).and_then(|process| process.smaps());
    Ok(add_up(&maps.with_context(|| format!("reading the mappings of process {pid}"))?.0))
}

/// The guest's memory is the largest mapping and all that touch it without a gap: parts of it may be mapped from files.
fn add_up(mappings: &[MemoryMap]) -> Memory {
    let size = |mapping: &MemoryMap| mapping.address.1 - mapping.address.0;
    let runs: Vec<_> = mappings.chunk_by(|a, b| a.address.1 == b.address.0).collect();
    let guest = runs.iter().enumerate().max_by_key(|(_, run)| run.iter().map(size).max());
    let guest = guest.map(|(index, _)| index);
    let mut memory = Memory::default();
    for (index, run) in runs.iter().enumerate() {
        let sum = |field| run.iter().filter_map(|of| of.extension.map.get(field)).sum::<u64>() / 1024;
        if Some(index) == guest {
            memory.guest = sum("Rss");
        } else {
            memory.private += sum("Anonymous");
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use procfs::{FromRead, process::MemoryMaps};

    use super::*;

    #[test]
    fn guest_memory_is_told_apart() {
        let smaps = "1000-2000 rw-p 0 00:00 0 [heap]\nRss: 4 kB\nAnonymous: 4 kB\n\
                     10000-11000 r--p 0 00:00 0 vmlinux\nRss: 4 kB\nAnonymous: 0 kB\n\
                     11000-90000 rw-p 0 00:00 0 \nRss: 400 kB\nAnonymous: 400 kB\n\
                     a0000-a1000 rw-p 0 00:00 0 \nRss: 8 kB\nAnonymous: 8 kB\n";
        let maps = MemoryMaps::from_read(smaps.as_bytes()).unwrap();
        assert_eq!(add_up(&maps.0), Memory { private: 12, guest: 404 });
    }
}
