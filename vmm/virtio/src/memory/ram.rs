//! The machine's memory and what backs each part of it.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    sync::Arc,
};

use caisson_vmm_api::config::{Backing, HugePages, MAX_MEMORY};
use serde::{Deserialize, Serialize};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion, mmap::MmapRegionBuilder,
};

use super::{GuestMem, discard::Split, layout};

/// What memory to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamConfig {
    /// Memory present at boot, in bytes.
    pub size: u64,
    /// Address space for memory plugged later, in bytes; 0 for none.
    pub hotplug: u64,
    /// How its pages are allocated.
    pub backing: Backing,
    /// Whether they are huge.
    pub huge_pages: HugePages,
}

impl RamConfig {
    /// Checks what may come from a file: sums of sizes that pass do not overflow.
    fn check(&self) -> Result<(), RamError> {
        let possible = |size: u64| size <= MAX_MEMORY && size.is_multiple_of(layout::PAGE_SIZE);
        match [self.size, self.hotplug].into_iter().find(|size| !possible(*size)) {
            None if self.size == 0 => Err(RamError::Size(0)),
            None => Ok(()),
            Some(size) => Err(RamError::Size(size)),
        }
    }
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// A size that no machine has.
    #[error("{0} bytes of guest memory: must be whole pages, and at most 1 TiB")]
    Size(u64),
    /// The host would not map that much.
    #[error("mapping {size} bytes of guest memory")]
    Map {
        /// How much was asked for.
        size: u64,
        /// Why it failed.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The memory file could not be made or sized.
    #[error("creating the guest's memory file")]
    Memfd(#[source] io::Error),
    /// A size that the address space does not hold.
    #[error("{0} bytes of guest memory do not fit the address space")]
    TooLarge(u64),
    /// The host would not map a part of the memory file.
    #[error("mapping {len} bytes of the memory file")]
    MapFile {
        /// How long the part is.
        len: u64,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A memory file of another length.
    #[error("the memory file has {got} bytes, the memory {expected}")]
    FileLength {
        /// The memory's length.
        expected: u64,
        /// The file's.
        got: u64,
    },
    /// Setting up huge pages failed.
    #[error("asking for transparent huge pages")]
    HugePages(#[source] io::Error),
    /// The regions do not form a memory map.
    #[error("laying out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// A part of guest memory that the hypervisor is told about as one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest physical address.
    pub guest: u64,
    /// Its address in this process.
    pub host: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A contiguous range of guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Where it starts.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Range {
    fn overlaps(&self, start: u64, len: u64) -> bool {
        self.start < start.saturating_add(len) && start < self.start.saturating_add(self.len)
    }
}

/// The machine's memory, with the knowledge of what backs it.
pub struct GuestRam {
    mem: GuestMem,
    config: RamConfig,
    /// Where a file is mapped, privately: in ascending order.
    file_parts: Vec<Range>,
    /// The device and the inode of that file.
    backed_by: Option<(u64, u64)>,
    pub(super) split: Split,
}

impl GuestRam {
    /// Maps memory for a machine. No page of it is populated.
    ///
    /// # Errors
    /// When the host refuses, see [`RamError`].
    pub fn new(config: RamConfig) -> Result<Self, RamError> {
        config.check()?;
        let regions = parts(&config).into_iter().map(|(start, len)| region(start, len, &config));
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        let mem = GuestMemoryMmap::from_regions(regions).map_err(RamError::Layout)?;
        Ok(Self {
            mem: Arc::new(mem),
            config,
            file_parts: Vec::new(),
            backed_by: None,
            split: Split::default(),
        })
    }

    /// Maps memory that was saved to `file`, privately. The file must never change while the memory is in
    /// use. Where it has no data the memory is anonymous: a page of a hole would be allocated in the host's page cache
    /// before the guest gets a copy of it.
    ///
    /// # Errors
    /// When the sizes are impossible, the file has another length than the memory, or the host refuses.
    pub fn from_file(config: RamConfig, file: File) -> Result<Self, RamError> {
        config.check()?;
        let parts = parts(&config);
        let expected: u64 = parts.iter().map(|(_, len)| len).sum();
        let metadata = file.metadata().map_err(RamError::Memfd)?;
        let backed_by = Some((metadata.dev(), metadata.ino()));
        let got = metadata.len();
        if got != expected {
            return Err(RamError::FileLength { expected, got });
        }
        // What it was backed by before it was saved no longer matters.
        let config = RamConfig { backing: Backing::Anonymous, huge_pages: HugePages::Off, ..config };
        let (mut regions, mut file_parts, mut offset) = (Vec::new(), Vec::new(), 0);
        for (start, len) in parts {
            let region = region(start, len, &config)?;
            for data in data_extents(&file, offset, len).map_err(RamError::Memfd)? {
                show_file(&region, data.start - offset, &file, data)
                    .map_err(|source| RamError::MapFile { len: data.len, source })?;
                file_parts.push(Range { start: start + (data.start - offset), len: data.len });
            }
            regions.push(region);
            offset += len;
        }
        let mem = GuestMemoryMmap::from_regions(regions).map_err(RamError::Layout)?;
        Ok(Self { mem: Arc::new(mem), config, file_parts, backed_by, split: Split::default() })
    }

    pub(super) fn regions(&self) -> impl Iterator<Item = &GuestRegionMmap<()>> {
        self.mem.iter()
    }

    /// The memory as devices see it.
    #[must_use]
    pub fn mem(&self) -> &GuestMem {
        &self.mem
    }

    /// What it was made from.
    #[must_use]
    pub fn config(&self) -> &RamConfig {
        &self.config
    }

    /// The range for memory that is plugged later, if there is one.
    #[must_use]
    pub fn hotplug_range(&self) -> Option<Range> {
        let start = layout::hotplug_start(self.config.size);
        (self.config.hotplug > 0).then_some(Range { start, len: self.config.hotplug })
    }

    /// Boot memory, as the hypervisor is to be told of it.
    #[must_use]
    pub fn boot_slots(&self) -> Vec<Slot> {
        let mut slots = self.slots();
        slots.truncate(layout::boot_regions(self.config.size).len());
        slots
    }

    /// The range for memory that is plugged later, if there is one.
    #[must_use]
    pub fn hotplug_slot(&self) -> Option<Slot> {
        (self.config.hotplug > 0).then(|| self.slots().pop()).flatten()
    }

    fn slots(&self) -> Vec<Slot> {
        self.mem
            .iter()
            .map(|region| Slot {
                guest: region.start_addr().0,
                host: region.as_ptr() as u64,
                len: region.len(),
            })
            .collect()
    }

    /// Whether the memory shows this file: writing to it would change the guest's memory.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn runs_from(&self, file: &File) -> io::Result<bool> {
        let Some(backed_by) = self.backed_by else { return Ok(false) };
        let metadata = file.metadata()?;
        Ok((metadata.dev(), metadata.ino()) == backed_by)
    }

    #[cfg(test)]
    pub(super) fn file_parts(&self) -> &[Range] {
        &self.file_parts
    }

    pub(super) fn shows_file(&self, start: u64, len: u64) -> bool {
        let behind = self.file_parts.partition_point(|part| part.start.saturating_add(part.len) <= start);
        self.file_parts.get(behind).is_some_and(|part| part.overlaps(start, len))
    }
}

/// The start and length of every region.
fn parts(config: &RamConfig) -> Vec<(u64, u64)> {
    let mut parts = layout::boot_regions(config.size);
    if config.hotplug > 0 {
        parts.push((layout::hotplug_start(config.size), config.hotplug));
    }
    parts
}

fn region(start: u64, len: u64, config: &RamConfig) -> Result<GuestRegionMmap<()>, RamError> {
    let size = usize::try_from(len).map_err(|_| RamError::TooLarge(len))?;
    let mapping = map(size, config)?;
    if config.huge_pages == HugePages::Transparent {
        advise_huge(&mapping).map_err(RamError::HugePages)?;
    }
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(RamError::TooLarge(len))
}

/// Holes of a memory file that are no longer than this are mapped with the data around them: each mapping costs the host's
/// kernel time and memory.
const SHORT_HOLE: u64 = 64 << 10;

/// Where a part of a file has data: whole pages, in ascending order.
fn data_extents(file: &File, start: u64, len: u64) -> io::Result<Vec<Range>> {
    use nix::unistd::{Whence, lseek};
    let seek = |position: u64, whence| match lseek(file, position.cast_signed(), whence) {
        Ok(found) => Ok(Some(found.cast_unsigned())),
        // Nothing of the kind up to the file's end.
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(io::Error::from(errno)),
    };
    let end = start.saturating_add(len);
    let mut extents: Vec<Range> = Vec::new();
    let mut position = start;
    while position < end {
        let Some(data) = seek(position, Whence::SeekData)?.filter(|data| *data < end) else { break };
        let hole = seek(data, Whence::SeekHole)?.unwrap_or(end).min(end);
        let data = data / layout::PAGE_SIZE * layout::PAGE_SIZE;
        let until = hole.next_multiple_of(layout::PAGE_SIZE).min(end);
        match extents.last_mut() {
            Some(last) if data.saturating_sub(last.start + last.len) <= SHORT_HOLE => {
                last.len = until - last.start
            }
            _ => extents.push(Range { start: data, len: until - data }),
        }
        position = hole.max(data + layout::PAGE_SIZE);
    }
    Ok(extents)
}

/// Maps `data` of the file at an offset in a region, in place of anonymous memory.
fn show_file(region: &GuestRegionMmap<()>, offset: u64, file: &File, data: Range) -> io::Result<()> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let inside = offset.checked_add(data.len).is_some_and(|end| end <= region.len());
    let host = region.get_host_address(MemoryRegionAddress(offset)).map_err(|_| outside())?;
    let len = usize::try_from(data.len).ok().filter(|_| inside).ok_or_else(outside)?;
    let at = libc::off_t::try_from(data.start).map_err(|_| outside())?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the range lies inside this region's mapping, so nothing else is replaced, and the new mapping grants the same
    // access. The file is not written to while it is mapped, as the caller has been told.
    let mapped = unsafe { libc::mmap(host.cast(), len, prot, flags, file.as_raw_fd(), at) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks for huge pages, on a host whose kernel has them.
///
/// They need an address that is a multiple of 2 MiB, here and in the guest; Linux 6.7 and newer choose such
/// an address for a mapping of that size by themselves.
fn advise_huge(mapping: &MmapRegion<()>) -> io::Result<()> {
    // SAFETY: the range is exactly this mapping; the advice changes nothing about its content.
    let advised = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
    if advised == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // EINVAL: a kernel that was built without them.
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) }
}

fn map(size: usize, config: &RamConfig) -> Result<MmapRegion<()>, RamError> {
    let huge = config.huge_pages == HugePages::Reserved;
    let builder =
        MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).with_hugetlbfs(huge);
    let builder = match config.backing {
        Backing::Anonymous => builder.with_mmap_flags(
            libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_NORESERVE
                | if huge { libc::MAP_HUGETLB } else { 0 },
        ),
        Backing::Memfd => {
            let file = memfd(size as u64, huge).map_err(RamError::Memfd)?;
            builder
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .with_file_offset(FileOffset::new(file, 0))
        }
    };
    builder.build().map_err(|source| RamError::Map { size: size as u64, source })
}

fn memfd(size: u64, huge: bool) -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let huge = if huge { MFdFlags::MFD_HUGETLB } else { MFdFlags::empty() };
    let file = File::from(memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC | huge)?);
    file.set_len(size)?;
    Ok(file)
}
