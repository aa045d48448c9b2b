//! The kernel image and the initramfs.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::unix::fs::FileExt,
};

use caisson_virtio::memory::{
    GuestRam, Range,
    layout::{LOW_END, PAGE_SIZE},
};
use caisson_vmm_api::config::Protocol;
use linux_loader::loader::{
    self, KernelLoader, KernelLoaderResult, PvhBootCapability, bootparam::setup_header, bzimage::BzImage,
    elf::Elf,
};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::HIGH_MEMORY;

/// How far into a bzImage's protected-mode code its 64-bit entry point is (Linux x86 boot protocol, 64-bit
/// boot).
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `XLF_KERNEL_64` in the setup header's `xloadflags`: the 64-bit entry point exists.
const XLF_KERNEL_64: u16 = 1;

/// Where and in which processor mode the kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, with the boot parameters' address in RSI.
    Linux(u64),
    /// In 32-bit protected mode without paging, with the start info's address in EBX.
    Pvh(u64),
}

/// A kernel in guest memory.
pub struct LoadedKernel {
    /// Where it starts.
    pub entry: Entry,
    /// The first address after everything that it occupies before it looks at the memory map.
    pub end: u64,
    /// What a bzImage says about itself.
    pub setup_header: Option<setup_header>,
}

/// Why an image could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error("reading the {0}")]
    Read(&'static str, #[source] io::Error),
    /// Neither format was recognised.
    #[error("the kernel is neither a 64-bit ELF image nor a bzImage")]
    Format,
    /// A loader refused the image.
    #[error("loading the kernel into {memory} MiB of memory")]
    Load {
        /// Boot memory, in MiB.
        memory: u64,
        /// Why.
        #[source]
        source: loader::Error,
    },
    /// The image lacks the entry point that was asked for.
    #[error("the kernel has no {0} entry point")]
    NoEntry(&'static str),
    /// An empty initramfs.
    #[error("the initramfs is empty")]
    EmptyInitramfs,
    /// It does not fit beside the kernel.
    #[error("an initramfs of {len} bytes does not fit into memory beside the kernel")]
    InitramfsTooLarge {
        /// Its length.
        len: u64,
    },
    /// Reading it into guest memory failed.
    #[error("loading the initramfs")]
    LoadInitramfs(#[source] vm_memory::GuestMemoryError),
}

/// Loads a kernel where it wants to be.
///
/// # Errors
/// When it is not a kernel, does not fit, or cannot be entered by `protocol`.
pub fn load_kernel(ram: &GuestRam, file: &File, protocol: Protocol) -> Result<LoadedKernel, KernelError> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => KernelError::Format,
        _ => KernelError::Read("kernel", error),
    })?;
    match (magic == *b"\x7fELF", protocol) {
        (true, _) => load_elf(ram, file, protocol),
        (false, Protocol::Linux) => load_bzimage(ram, file),
        (false, Protocol::Pvh) => Err(KernelError::NoEntry("PVH")),
    }
}

/// Copies the image into memory. Mapping its file there instead would share nothing, since a kernel rewrites
/// nearly all of its pages when it adapts itself to its processor, and would cost a fault for each of them.
fn load_with<L: KernelLoader>(ram: &GuestRam, file: &File) -> Result<KernelLoaderResult, loader::Error> {
    L::load(ram.mem().as_ref(), None, &mut &*file, Some(GuestAddress(HIGH_MEMORY)))
}

fn load_elf(ram: &GuestRam, file: &File, protocol: Protocol) -> Result<LoadedKernel, KernelError> {
    let loaded = load_with::<Elf>(ram, file).map_err(|source| load_error(ram, source))?;
    let entry = match (protocol, loaded.pvh_boot_cap) {
        (Protocol::Linux, _) => Entry::Linux(loaded.kernel_load.0),
        (Protocol::Pvh, PvhBootCapability::PvhEntryPresent(entry)) => Entry::Pvh(entry.0),
        (Protocol::Pvh, _) => return Err(KernelError::NoEntry("PVH")),
    };
    Ok(LoadedKernel { entry, end: loaded.kernel_end, setup_header: None })
}

fn load_bzimage(ram: &GuestRam, file: &File) -> Result<LoadedKernel, KernelError> {
    use loader::{Error::Bzimage, bzimage::Error};
    let loaded = load_with::<BzImage>(ram, file).map_err(|source| match source {
        Bzimage(Error::InvalidBzImage | Error::ReadBzImageHeader | Error::Underflow) => KernelError::Format,
        source => load_error(ram, source),
    })?;
    let header = loaded.setup_header.ok_or(KernelError::Format)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::NoEntry("64-bit"));
    }
    // The image unpacks itself to where it prefers to run and needs this much there.
    let unpacked = header.pref_address.saturating_add(u64::from(header.init_size));
    Ok(LoadedKernel {
        entry: Entry::Linux(loaded.kernel_load.0 + BZIMAGE_ENTRY_64),
        end: loaded.kernel_end.max(unpacked),
        setup_header: Some(header),
    })
}

fn load_error(ram: &GuestRam, source: loader::Error) -> KernelError {
    KernelError::Load { memory: ram.config().size >> 20, source }
}

/// Loads the initramfs as high as possible below the hole, and says where it is.
///
/// # Errors
/// When it cannot be read or does not fit above `kernel_end`.
pub fn load_initramfs(ram: &GuestRam, file: &File, kernel_end: u64) -> Result<Range, KernelError> {
    let mut image = file;
    let rewound = image.rewind().and_then(|()| file.metadata());
    let len = rewound.map_err(|error| KernelError::Read("initramfs", error))?.len();
    if len == 0 {
        // Reading finds out whether it is merely something without a length.
        let mut byte = [0];
        return Err(match image.read(&mut byte) {
            Err(error) => KernelError::Read("initramfs", error),
            Ok(_) => KernelError::EmptyInitramfs,
        });
    }
    let top = ram.config().size.min(LOW_END);
    let start = top.checked_sub(len).map(|start| start / PAGE_SIZE * PAGE_SIZE);
    let start = start.filter(|&start| start >= kernel_end).ok_or(KernelError::InitramfsTooLarge { len })?;
    let bytes = usize::try_from(len).map_err(|_| KernelError::InitramfsTooLarge { len })?;
    ram.mem()
        .read_exact_volatile_from(GuestAddress(start), &mut image, bytes)
        .map_err(KernelError::LoadInitramfs)?;
    Ok(Range { start, len })
}
