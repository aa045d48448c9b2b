//! What a process holds, from `/proc/PID/smaps` (proc_pid_smaps(5)).

use std::fs;

use anyhow::{Context, Result};

/// A VMM's memory, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Anonymous memory of the process itself.
    pub(super) private: u64,
    /// Guest memory that is there.
    pub(super) guest: u64,
}

#[derive(Default)]
struct Mapping {
    start: u64,
    end: u64,
    rss: u64,
    anonymous: u64,
}

/// Reads a process's memory. The guest's is the largest mapping and all that touch it without a gap: parts of
/// it may be mapped from files.
pub(super) fn of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    Ok(parse(&fs::read_to_string(&path).with_context(|| format!("reading {path}"))?))
}

fn parse(smaps: &str) -> Memory {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let hex = |text| u64::from_str_radix(text, 16).unwrap_or_default();
            mappings.push(Mapping { start: hex(start), end: hex(end), ..Mapping::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            let kib = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
            match first {
                "Rss:" => mapping.rss = kib,
                "Anonymous:" => mapping.anonymous = kib,
                _ => {}
            }
        }
    }
    let Some(largest) = (0..mappings.len()).max_by_key(|&i| mappings[i].end - mappings[i].start) else {
        return Memory::default();
    };
    let (mut first, mut last) = (largest, largest);
    while first > 0 && mappings[first - 1].end == mappings[first].start {
        first -= 1;
    }
    while last + 1 < mappings.len() && mappings[last].end == mappings[last + 1].start {
        last += 1;
    }
    let mut memory = Memory::default();
    for (index, mapping) in mappings.iter().enumerate() {
        if (first..=last).contains(&index) {
            memory.guest += mapping.rss;
        } else {
            memory.private += mapping.anonymous;
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_apart() {
        let smaps = "1000-2000 rw-p 0 00:00 0 [heap]\nRss: 4 kB\nAnonymous: 4 kB\n\
                     10000-11000 r--p 0 00:00 0 vmlinux\nRss: 4 kB\nAnonymous: 0 kB\n\
                     11000-90000 rw-p 0 00:00 0\nRss: 400 kB\nAnonymous: 400 kB\n\
                     a0000-a1000 rw-p 0 00:00 0\nRss: 8 kB\nAnonymous: 8 kB\n";
        assert_eq!(parse(smaps), Memory { private: 12, guest: 404 });
    }
}
