//! Guest memory in a file: every region after the other, holes where it is zero.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
};

use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::{GuestRam, layout::PAGE_SIZE};

/// Pages looked at in one step.
const WINDOW_PAGES: u64 = 16 << 10;

impl GuestRam {
    /// How long the file of this memory is.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.regions().map(|region| region.len()).sum()
    }

    /// Writes the memory to a file, in place of whatever is in it. Nothing may write to the memory meanwhile.
    ///
    /// # Errors
    /// When the file cannot be written, or is the one that the memory [shows](Self::runs_from).
    pub fn save(&self, file: &File) -> io::Result<()> {
        if self.runs_from(file)? {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        file.set_len(0)?;
        file.set_len(self.file_len())?;
        let everything = swap_is_in_use();
        let mut base = 0;
        for region in self.regions() {
            let mut at = 0;
            while at < region.len() {
                let len = (region.len() - at).min(WINDOW_PAGES * PAGE_SIZE);
                self.save_window(region, at, len, Output { file, base, everything })?;
                at += len;
            }
            base += region.len();
        }
        Ok(())
    }

    fn save_window(
        &self,
        region: &GuestRegionMmap<()>,
        start: u64,
        len: u64,
        output: Output<'_>,
    ) -> io::Result<()> {
        let resident = resident_pages(region, start, len)?;
        let guest = region.start_addr().0 + start;
        let mut run: Option<(u64, u64)> = None;
        for (page, resident) in (0u64..).zip(resident) {
            let at = start + page * PAGE_SIZE;
            // A page that shows a file may have content without being resident.
            let candidate =
                resident || output.everything || self.shows_file(guest + page * PAGE_SIZE, PAGE_SIZE);
            if candidate && !is_zero(region, at)? {
                let (from, len) = run.get_or_insert((at, 0));
                debug_assert_eq!(*from + *len, at);
                *len += PAGE_SIZE;
            } else if let Some((from, len)) = run.take() {
                output.write(region, from, len)?;
            }
        }
        run.map_or(Ok(()), |(from, len)| output.write(region, from, len))
    }
}

/// Where the memory goes.
#[derive(Clone, Copy)]
struct Output<'a> {
    file: &'a File,
    /// Where the region starts in the file.
    base: u64,
    /// Residency says nothing: pages may be swapped out.
    everything: bool,
}

impl Output<'_> {
    fn write(self, region: &GuestRegionMmap<()>, start: u64, len: u64) -> io::Result<()> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(self.base + start))?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        region.write_all_volatile_to(MemoryRegionAddress(start), &mut file, len).map_err(io::Error::other)
    }
}

/// Which pages of a range are in memory (mincore(2)).
fn resident_pages(region: &GuestRegionMmap<()>, start: u64, len: u64) -> io::Result<Vec<bool>> {
    let host =
        region.get_host_address(MemoryRegionAddress(start)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let bytes = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut vector = vec![0u8; usize::try_from(len.div_ceil(PAGE_SIZE)).unwrap_or_default()];
    // SAFETY: the range is inside the region's mapping, and the vector has a byte for each of its pages.
    let done = unsafe { libc::mincore(host.cast(), bytes, vector.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(vector.into_iter().map(|byte| byte & 1 != 0).collect())
}

/// Whether the host may have swapped pages out, which mincore(2) does not tell from pages that never were.
fn swap_is_in_use() -> bool {
    // SAFETY: all zeros is a valid value of this plain structure, and the call fills it.
    unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        libc::sysinfo(&raw mut info) != 0 || info.totalswap != 0
    }
}

fn is_zero(region: &GuestRegionMmap<()>, at: u64) -> io::Result<bool> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut page = ZEROS;
    region.read_slice(&mut page, MemoryRegionAddress(at)).map_err(io::Error::other)?;
    Ok(page == ZEROS)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{Discard, RamConfig};
    use caisson_vmm_api::{config::Backing, config::HugePages};

    fn config(backing: Backing) -> RamConfig {
        RamConfig { size: 8 << 20, hotplug: 0, backing, huge_pages: HugePages::Off }
    }

    fn byte(ram: &GuestRam, addr: u64) -> u8 {
        ram.mem().read_obj(GuestAddress(addr)).unwrap()
    }

    #[test]
    fn memory_of_holes_is_anonymous_and_that_of_data_the_files() {
        const MIB: u64 = 1 << 20;
        let split = RamConfig { hotplug: 128 * MIB, ..config(Backing::Anonymous) };
        let ram = GuestRam::new(split).unwrap();
        let window = ram.hotplug_range().unwrap().start;
        // Two pages that are mapped as one piece, as little is between them; one far off; the last; and plugged memory.
        let written = [0, 0x8000, 3 * MIB, 8 * MIB - 4096, window + MIB];
        for (byte, addr) in (1u8..).zip(written) {
            ram.mem().write_slice(&[byte; 4096], GuestAddress(addr)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        ram.save(&file).unwrap();
        let restored = GuestRam::from_file(split, file).unwrap();
        assert_eq!(restored.file_parts().len(), 4, "{:?}", restored.file_parts());
        for (byte, addr) in (1u8..).zip(written) {
            assert_eq!(
                (self::byte(&restored, addr), self::byte(&restored, addr + 4095)),
                (byte, byte),
                "{addr:#x}"
            );
            assert!(restored.shows_file(addr, 4096), "{addr:#x}");
            restored.discard(GuestAddress(addr), 4096).unwrap();
            assert_eq!(self::byte(&restored, addr), 0, "{addr:#x}");
        }
        for hole in [0x4000, MIB, 5 * MIB, window] {
            assert_eq!(byte(&restored, hole), 0, "{hole:#x}");
        }
        assert!(!restored.shows_file(MIB, MIB) && !restored.shows_file(window, MIB));
    }

    #[test]
    fn memory_comes_back_and_what_is_zero_takes_no_space() {
        use std::os::unix::fs::MetadataExt;
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram = GuestRam::new(config(backing)).unwrap();
            ram.mem().write_slice(&[5; 8192], GuestAddress(0x10_0000)).unwrap();
            ram.mem().write_slice(&[0; 8192], GuestAddress(0x20_0000)).unwrap();
            ram.mem().write_slice(&[6], GuestAddress((8 << 20) - 1)).unwrap();
            let file = tempfile::tempfile().unwrap();
            ram.save(&file).unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!(metadata.len(), 8 << 20);
            assert!(metadata.blocks() * 512 <= 64 << 10, "{}", metadata.blocks());

            let restored = GuestRam::from_file(config(backing), file).unwrap();
            assert_eq!(byte(&restored, 0x10_1fff), 5);
            assert_eq!(byte(&restored, 0x20_0000), 0);
            assert_eq!(byte(&restored, (8 << 20) - 1), 6);
        }
    }

    #[test]
    fn a_restored_memory_is_private_can_be_discarded_and_saved_again() {
        let ram = GuestRam::new(config(Backing::Anonymous)).unwrap();
        ram.mem().write_slice(&[5; 3 * 4096], GuestAddress(0)).unwrap();
        let file = tempfile::tempfile().unwrap();
        ram.save(&file).unwrap();

        let first = GuestRam::from_file(config(Backing::Anonymous), file.try_clone().unwrap()).unwrap();
        first.mem().write_slice(&[7; 4096], GuestAddress(4096)).unwrap();
        first.discard(GuestAddress(2 * 4096), 4096).unwrap();
        let again = tempfile::tempfile().unwrap();
        first.save(&again).unwrap();
        let second = GuestRam::from_file(config(Backing::Anonymous), again).unwrap();
        assert_eq!((byte(&second, 0), byte(&second, 4096), byte(&second, 8192)), (5, 7, 0));

        let untouched = GuestRam::from_file(config(Backing::Anonymous), file).unwrap();
        assert_eq!((byte(&untouched, 4096), byte(&untouched, 8192)), (5, 5));
    }

    /// It would be cut off under the guest, and under every other machine that runs from it.
    #[test]
    fn a_memory_is_not_saved_to_the_file_that_it_shows() {
        let ram = GuestRam::new(config(Backing::Anonymous)).unwrap();
        ram.mem().write_slice(&[5; 4096], GuestAddress(0)).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        ram.save(file.as_file()).unwrap();
        ram.save(file.as_file()).unwrap();
        let restored = GuestRam::from_file(config(Backing::Anonymous), file.reopen().unwrap()).unwrap();
        assert_eq!(restored.save(file.as_file()).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        assert!(restored.runs_from(file.as_file()).unwrap() && !ram.runs_from(file.as_file()).unwrap());
        assert_eq!((byte(&restored, 0), file.as_file().metadata().unwrap().len()), (5, 8 << 20));
    }

    /// Sizes come from a state file.
    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for (size, hotplug) in
            [(0, 0), (8 << 20, u64::MAX), (u64::MAX, 8 << 20), (u64::MAX - 4095, u64::MAX - 4095), (1, 0)]
        {
            let config = RamConfig { size, hotplug, ..config(Backing::Anonymous) };
            let refused = |made: Result<GuestRam, _>| matches!(made, Err(crate::memory::RamError::Size(_)));
            assert!(refused(GuestRam::from_file(config, tempfile::tempfile().unwrap())), "{config:?}");
            assert!(refused(GuestRam::new(config)), "{config:?}");
        }
    }

    #[test]
    fn a_file_of_the_wrong_length_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        assert!(GuestRam::from_file(config(Backing::Anonymous), file).is_err());
    }
}
