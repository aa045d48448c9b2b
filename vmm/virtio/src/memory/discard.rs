//! How pages of guest memory go back to the host.
//!
//! Of a huge page, a part can go back too: a guest that comes to rest after its boot has little free memory that is
//! free 2 MiB at a time. Such a huge page is split first, since the kernel would otherwise keep all of it until it is
//! short of memory, and its place has small pages until the guest gives all of it back: the kernel (khugepaged) would
//! fill the hole again.

use std::{
    collections::BTreeSet,
    io,
    sync::{Mutex, PoisonError},
};

use caisson_vmm_api::config::{Backing, HugePages};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::{Discard, GuestRam, layout::PAGE_SIZE};

/// The size of a huge page.
const HUGE: usize = 2 << 20;

/// The places of huge pages that have small pages for now, by their number in this process's address space. There are
/// as many at most as there is guest memory for.
#[derive(Default)]
pub(super) struct Split(Mutex<BTreeSet<usize>>);

/// Addresses in this process, within one mapping.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    fn cut(self, other: Span) -> Span {
        Span { start: self.start.max(other.start), end: self.end.min(other.end) }
    }

    fn covers(self, other: Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// # Safety
    /// The span must be of a mapping of guest memory, which is only ever accessed as volatile bytes: to these, the
    /// advice may do no more than turning them zero.
    unsafe fn advise(self, advice: libc::c_int) -> io::Result<()> {
        let start = std::ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: as this function's.
        let done = unsafe { libc::madvise(start, self.end - self.start, advice) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl GuestRam {
    /// Frees pages of one region.
    fn discard_in(&self, region: &GuestRegionMmap<()>, start: u64, len: u64) -> io::Result<()> {
        let host = region
            .get_host_address(MemoryRegionAddress(start - region.start_addr().0))
            .map_err(|_| io::ErrorKind::InvalidInput)?
            .cast::<libc::c_void>();
        let bytes = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        if self.shows_file(start, len) {
            return self.replace(host, start, bytes);
        }
        let span = Span { start: host.expose_provenance(), end: host.expose_provenance() + bytes };
        let advice = match self.config().backing {
            Backing::Anonymous => {
                if self.config().huge_pages == HugePages::Transparent {
                    let mapping = region.as_ptr().expose_provenance();
                    let size = usize::try_from(region.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
                    self.prepare_huge_pages(Span { start: mapping, end: mapping + size }, span);
                }
                libc::MADV_DONTNEED
            }
            Backing::Memfd => libc::MADV_REMOVE,
        };
        // SAFETY: the range lies inside this region's mapping, which lives as long as `self`.
        match unsafe { span.advise(advice) } {
            // Part of a reserved huge page cannot be freed, but it can be cleared.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.clear(start, bytes),
            done => done,
        }
    }

    /// Splits the huge pages of which only a part is in `span`, and lets those become huge again that are in it whole.
    /// All of it is advice: where the kernel does not follow, there is merely more memory in use, or slower memory.
    fn prepare_huge_pages(&self, mapping: Span, span: Span) {
        let mut split = self.split.0.lock().unwrap_or_else(PoisonError::into_inner);
        for number in span.start / HUGE..span.end.div_ceil(HUGE) {
            let place = Span { start: number * HUGE, end: (number + 1) * HUGE }.cut(mapping);
            if span.covers(place) {
                if split.remove(&number) {
                    // SAFETY: a part of this memory's own mapping; nothing about its content changes.
                    let _ = unsafe { place.advise(libc::MADV_HUGEPAGE) };
                }
            } else if split.insert(number) {
                // SAFETY: as above. Freeing lazily splits a huge page for good, and all that it is about is to be
                // zero afterwards in any case.
                unsafe {
                    let _ = place.advise(libc::MADV_NOHUGEPAGE);
                    let _ = place.cut(span).advise(libc::MADV_FREE);
                }
            }
        }
    }

    /// Puts fresh anonymous memory in the place of pages that show a file's bytes.
    fn replace(&self, host: *mut libc::c_void, start: u64, len: usize) -> io::Result<()> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the range lies inside one of this memory's own mappings, so nothing else is replaced, and
        // the new mapping grants the same access.
        let mapped = unsafe { libc::mmap(host, len, prot, flags, -1, 0) };
        if mapped != libc::MAP_FAILED {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // The process's count of mappings is bounded; a guest that frees every other page reaches it.
        if error.raw_os_error() == Some(libc::ENOMEM) { self.clear(start, len) } else { Err(error) }
    }

    fn clear(&self, start: u64, len: usize) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len {
            let n = ZEROS.len().min(len - done);
            self.mem()
                .write_slice(ZEROS.get(..n).unwrap_or(&ZEROS), GuestAddress(start + done as u64))
                .map_err(io::Error::other)?;
            done += n;
        }
        Ok(())
    }
}

impl Discard for GuestRam {
    fn discard(&self, addr: GuestAddress, len: u64) -> io::Result<()> {
        let aligned = addr.0.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let Some(end) = addr.0.checked_add(len).filter(|_| aligned) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut start = addr.0;
        while start < end {
            let region = self.mem().find_region(GuestAddress(start)).ok_or(io::ErrorKind::InvalidInput)?;
            let here = (region.last_addr().0 - start + 1).min(end - start);
            self.discard_in(region, start, here)?;
            start += here;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;
    use crate::memory::RamConfig;

    const MIB: u64 = 1 << 20;

    fn config(backing: Backing) -> RamConfig {
        RamConfig { size: 4 << 20, hotplug: 0, backing, huge_pages: HugePages::Off }
    }

    fn ram(backing: Backing) -> GuestRam {
        GuestRam::new(config(backing)).unwrap()
    }

    fn byte(ram: &GuestRam, addr: u64) -> u8 {
        ram.mem().read_obj(GuestAddress(addr)).unwrap()
    }

    #[test]
    fn discarded_memory_reads_zero() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram = ram(backing);
            ram.mem().write_slice(&[7; 12288], GuestAddress(0x1000)).unwrap();
            ram.discard(GuestAddress(0x2000), 4096).unwrap();
            assert_eq!(
                (byte(&ram, 0x1fff), byte(&ram, 0x2000), byte(&ram, 0x2fff), byte(&ram, 0x3000)),
                (7, 0, 0, 7)
            );
        }
    }

    #[test]
    fn discarding_mapped_file_pages_leaves_zeros_not_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; 4 << 20]).unwrap();
        let ram = GuestRam::from_file(config(Backing::Anonymous), file).unwrap();
        assert_eq!((byte(&ram, 0x10_0000), byte(&ram, 0x10_1fff)), (9, 9));
        ram.discard(GuestAddress(0x10_0000), 4096).unwrap();
        assert_eq!((byte(&ram, 0x10_0000), byte(&ram, 0x10_1000)), (0, 9));
    }

    #[test]
    fn transparent_huge_pages_are_discarded_in_part() {
        let config = RamConfig { huge_pages: HugePages::Transparent, ..config(Backing::Anonymous) };
        let ram = GuestRam::new(config).unwrap();
        ram.mem().write_slice(&[7; 3 << 20], GuestAddress(0)).unwrap();
        ram.discard(GuestAddress(0x20_0000), 4096).unwrap();
        assert_eq!((byte(&ram, 0x1f_ffff), byte(&ram, 0x20_0000), byte(&ram, 0x20_1000)), (7, 0, 7));
    }

    /// What smaps says of all mappings in the memory, in KiB, and whether one of them is not to have huge pages.
    fn mapped(ram: &GuestRam) -> (u64, u64, bool) {
        let (start, mut inside, mut small) = (ram.boot_slots()[0].host, false, false);
        let (mut rss, mut huge) = (0, 0);
        for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let mut words = line.split_whitespace();
            let (first, second) = (words.next().unwrap(), words.next().unwrap_or_default());
            if let Some((from, _)) = first.split_once('-') {
                let from = u64::from_str_radix(from, 16).unwrap();
                inside = (start..start + ram.config().size).contains(&from);
            }
            match first {
                "Rss:" if inside => rss += second.parse::<u64>().unwrap(),
                "AnonHugePages:" if inside => huge += second.parse::<u64>().unwrap(),
                "VmFlags:" if inside => small |= words.any(|flag| flag == "nh"),
                _ => {}
            }
        }
        (rss, huge, small)
    }

    #[test]
    fn the_place_of_a_split_huge_page_is_small_until_all_of_it_is_given_back() {
        let config =
            RamConfig { size: 8 * MIB, huge_pages: HugePages::Transparent, ..config(Backing::Anonymous) };
        let ram = GuestRam::new(config).unwrap();
        ram.mem().write_slice(&vec![7; 8 << 20], GuestAddress(0)).unwrap();
        let (rss, huge, small) = mapped(&ram);
        assert_eq!((rss, small), (8192, false));
        let there_were_any = huge > 0;
        ram.discard(GuestAddress(3 * MIB), MIB / 2).unwrap();
        ram.discard(GuestAddress(3 * MIB + MIB / 2), 4096).unwrap();
        let (rss, huge, small) = mapped(&ram);
        assert_eq!(rss, 8192 - 512 - 4);
        assert!(huge <= 6144, "{huge} KiB in huge pages");
        assert!(small || !there_were_any);
        // What is written there again is one page, not the whole hole.
        ram.mem().write_slice(&[7], GuestAddress(3 * MIB)).unwrap();
        assert_eq!(mapped(&ram).0, 8192 - 512);
        ram.discard(GuestAddress(0), 8 * MIB).unwrap();
        assert_eq!(mapped(&ram), (0, 0, false));
    }

    #[test]
    fn refuses_to_discard_what_is_not_its_own() {
        let ram = ram(Backing::Anonymous);
        for (addr, len) in
            [(1, 4096), (0, 100), (4 << 20, 4096), ((4 << 20) - 4096, 8192), (u64::MAX - 4095, 4096)]
        {
            let error = ram.discard(GuestAddress(addr), len).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{addr:#x}+{len:#x}");
        }
    }
}
