//! Onlining of processors and memory.

use std::fs;
use std::path::Path;

use super::{GuestError, read, write};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";

/// Processors that are there, and those of them that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processors {
    /// Present in the machine.
    pub present: u32,
    /// Scheduled by the kernel.
    pub online: u32,
}

/// Hot-pluggable memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes in online blocks.
    pub online: u64,
    /// Bytes of a block.
    pub block_size: u64,
}

/// # Errors
/// When sysfs is not there.
pub fn processors() -> Result<Processors, GuestError> {
    let present = parse_list(&read(Path::new(CPUS).join("present"))?)?;
    let online = parse_list(&read(Path::new(CPUS).join("online"))?)?;
    Ok(Processors { present: count(&present), online: count(&online) })
}

/// Makes the lowest `wanted` present processors run, and no others. Processor 0 always does.
///
/// # Errors
/// When fewer are present, or one does not start; those before it stay online.
pub fn set_online(wanted: u32) -> Result<Processors, GuestError> {
    let present = parse_list(&read(Path::new(CPUS).join("present"))?)?;
    if wanted == 0 || wanted > count(&present) {
        return Err(GuestError::Invalid(format!("count: {wanted} is not 1 to {}", count(&present))));
    }
    let online = parse_list(&read(Path::new(CPUS).join("online"))?)?;
    for (position, &cpu) in present.iter().enumerate() {
        let want = position < usize::try_from(wanted).unwrap_or(usize::MAX);
        if cpu != 0 && want != online.contains(&cpu) {
            write(Path::new(CPUS).join(format!("cpu{cpu}/online")), u8::from(want))?;
        }
    }
    processors()
}

/// Bytes of a memory block, `None` when the kernel can not plug memory.
pub fn memory_block_size() -> Option<u64> {
    let text = read(Path::new(MEMORY).join("block_size_bytes")).ok()?;
    u64::from_str_radix(&text, 16).ok()
}

/// Brings every offline memory block online, as movable memory, so that it can be unplugged again.
///
/// # Errors
/// When the kernel can not plug memory, or a block does not come online.
pub fn online_memory() -> Result<Memory, GuestError> {
    let block_size = memory_block_size().ok_or(GuestError::Unsupported("memory hotplug"))?;
    let mut blocks = 0u64;
    for entry in fs::read_dir(MEMORY).map_err(GuestError::file("list", MEMORY))? {
        let entry = entry.map_err(GuestError::file("list", MEMORY))?;
        let state = entry.path().join("state");
        if !entry.file_name().as_encoded_bytes().starts_with(b"memory") || !state.exists() {
            continue;
        }
        if read(&state)? == "offline" {
            write(&state, "online_movable")?;
        }
        blocks = blocks.saturating_add(1);
    }
    Ok(Memory { online: blocks.saturating_mul(block_size), block_size })
}

fn count(list: &[u32]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

/// A kernel list of ranges, "0-3,5".
fn parse_list(text: &str) -> Result<Vec<u32>, GuestError> {
    let malformed = || GuestError::Invalid(format!("{text:?} is not a list of processors"));
    let mut list = Vec::new();
    for range in text.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: u32 = first.parse().map_err(|_| malformed())?;
        let last: u32 = last.parse().map_err(|_| malformed())?;
        // NR_CPUS is 8,192 at most.
        if last < first || last > 8192 {
            return Err(malformed());
        }
        list.extend(first..=last);
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kernel_lists() {
        assert_eq!(parse_list("0-3,5").unwrap(), [0, 1, 2, 3, 5]);
        assert_eq!(parse_list("0").unwrap(), [0]);
        assert_eq!(parse_list("").unwrap(), [] as [u32; 0]);
        for bad in ["3-1", "x", "0-", "0-4294967295"] {
            assert!(parse_list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn this_machine_has_processors() {
        let processors = processors().unwrap();
        assert!(processors.online >= 1 && processors.online <= processors.present);
        assert!(matches!(set_online(0), Err(GuestError::Invalid(_))));
        assert!(matches!(set_online(processors.present + 1), Err(GuestError::Invalid(_))));
    }

    proptest! {
        #[test]
        fn lists_never_panic(text in "[0-9,-]{0,40}") {
            let _ = parse_list(&text);
        }
    }
}
