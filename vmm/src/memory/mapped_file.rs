//! Loading image files into guest memory without copying them.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, bitmap::BitmapSlice};

use super::{GuestRam, layout::PAGE_SIZE};

/// A file whose content appears in guest memory by being mapped there, privately, page by page.
///
/// To a loader it is an ordinary reader. A read into guest memory maps every whole page for which file position
/// and address agree, and copies what is left over at the edges. Thirteen megabytes of kernel then cost one
/// system call, and machines that boot the same file share its pages until they write to them.
pub struct MappedFile<'a> {
    file: &'a File,
    /// Where mappings are noted; `None` when the memory cannot take any and everything is copied.
    ram: Option<&'a GuestRam>,
    position: u64,
    len: u64,
}

impl<'a> MappedFile<'a> {
    pub(super) fn new(file: &'a File, ram: Option<&'a GuestRam>) -> io::Result<Self> {
        let metadata = file.metadata()?;
        // Only a regular file has pages of its own to map.
        let ram = ram.filter(|_| metadata.is_file());
        Ok(Self { file, ram, position: 0, len: metadata.len() })
    }

    /// The file's length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes before `host` reaches a page boundary, and how many whole pages' bytes follow, of `len`.
    /// Nothing when position and address do not agree within a page.
    fn mappable(&self, host: u64, len: u64) -> Option<(u64, u64)> {
        if host % PAGE_SIZE != self.position % PAGE_SIZE {
            return None;
        }
        let head = host.wrapping_neg() % PAGE_SIZE;
        let pages = len.checked_sub(head)? / PAGE_SIZE * PAGE_SIZE;
        (pages > 0).then_some((head, pages))
    }

    /// Maps `len` bytes at the current position over guest memory at `host`.
    fn map(&mut self, ram: &GuestRam, host: *mut u8, len: u64) -> io::Result<()> {
        let bytes = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let offset = libc::off_t::try_from(self.position).map_err(|_| io::ErrorKind::InvalidInput)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the caller got `host` and `len` from a slice of guest memory, so the mapping that is replaced is
        // part of it and nothing else; guest memory is accessed as volatile bytes only, and through no reference.
        let mapped = unsafe { libc::mmap(host.cast(), bytes, prot, flags, self.file.as_raw_fd(), offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        ram.note_file_part(host as u64, len);
        self.position += len;
        Ok(())
    }

    /// Copies to `slice` until it is full or the file ends.
    fn copy<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>) -> Result<usize, VolatileMemoryError> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(self.position)).map_err(VolatileMemoryError::IOError)?;
        let mut done = 0;
        while done < slice.len() {
            let n = file.read_volatile(&mut slice.offset(done)?)?;
            if n == 0 {
                break;
            }
            done += n;
            self.position += n as u64;
        }
        Ok(done)
    }
}

impl ReadVolatile for MappedFile<'_> {
    /// Fills all of `slice` unless the file ends: loaders take less for the end.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        slice: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let guard = slice.ptr_guard_mut();
        // Never beyond the end: a page there would fault in the guest's face.
        let wanted = (slice.len() as u64).min(self.len.saturating_sub(self.position));
        let mappable = self.ram.zip(self.mappable(guard.as_ptr() as u64, wanted));
        let Some((ram, (head, pages))) = mappable else { return self.copy(slice) };
        let (Ok(head), Ok(bytes)) = (usize::try_from(head), usize::try_from(pages)) else {
            return self.copy(slice);
        };
        if self.copy(&slice.subslice(0, head)?)? < head {
            return Err(VolatileMemoryError::IOError(io::ErrorKind::UnexpectedEof.into()));
        }
        let target = slice.subslice(head, bytes)?;
        self.map(ram, target.ptr_guard_mut().as_ptr(), pages).map_err(VolatileMemoryError::IOError)?;
        Ok(head + bytes + self.copy(&slice.offset(head + bytes)?)?)
    }
}

impl Read for MappedFile<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Seek for MappedFile<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::{Backing, HugePages, RamConfig};
    use super::*;

    proptest! {
        /// Whatever the alignment, guest memory ends up holding the file's bytes and nothing around them changes.
        #[test]
        fn reads_what_the_file_holds(
            len in 1usize..20_000, offset in 0usize..9000, addr in 0u64..9000, aligned: bool,
        ) {
            let config = RamConfig {
                size: 1 << 20, hotplug: 0, backing: Backing::Anonymous, huge_pages: HugePages::Off,
            };
            let ram = GuestRam::new(config).unwrap();
            let addr = if aligned { 0x4000 + offset as u64 % PAGE_SIZE } else { 0x4000 + addr };
            let content: Vec<u8> = (1..=251).cycle().take(len + 9000).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&content).unwrap();

            let mut source = ram.map_file(&file).unwrap();
            source.seek(SeekFrom::Start(offset as u64)).unwrap();
            ram.mem().read_exact_volatile_from(GuestAddress(addr), &mut source, len).unwrap();

            let mut got = vec![0; len + 2];
            ram.mem().read_slice(&mut got, GuestAddress(addr - 1)).unwrap();
            prop_assert_eq!(&got[1..=len], &content[offset..offset + len]);
            prop_assert_eq!((got[0], got[len + 1]), (0, 0));
        }
    }

    #[test]
    fn ends_where_the_file_ends() {
        let config =
            RamConfig { size: 1 << 20, hotplug: 0, backing: Backing::Anonymous, huge_pages: HugePages::Off };
        let ram = GuestRam::new(config).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        let mut source = ram.map_file(&file).unwrap();
        assert!(ram.mem().read_exact_volatile_from(GuestAddress(0), &mut source, 5001).is_err());
    }
}
