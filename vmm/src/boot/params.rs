//! What the kernel is told about the machine: Linux's boot parameters, or PVH's start info.

use caisson_virtio::memory::{GuestRam, Range, layout};
use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator, pvh::PvhBootConfigurator},
    loader::{
        bootparam::{boot_e820_entry, boot_params},
        elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::GuestAddress;

use super::{CommandLine, kernel::Entry, kernel::LoadedKernel};
use crate::layout::{
    COMMAND_LINE, CONVENTIONAL_END, HIGH_MEMORY, MP_TABLE, MP_TABLE_MAX, PVH_MEMMAP, PVH_MODULES,
    PVH_START_INFO, ZERO_PAGE,
};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `boot_flag` and `header` of the Linux setup header.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel alignment that relocatable x86-64 kernels are built for by default.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
/// The highest boot protocol that [`boot_params`] describes.
const PROTOCOL_VERSION: u16 = 0x20f;

/// `magic` of the PVH start info (Xen's `arch-x86/hvm/start_info.h`).
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const START_INFO_VERSION: u32 = 1;

/// The parameters could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ParamsError {
    /// Guest memory is too small for them.
    #[error("writing the boot parameters")]
    Write(#[source] linux_loader::configurator::Error),
    /// The initramfs lies where the boot protocol cannot say it.
    #[error("the initramfs does not lie in the first 4 GiB")]
    InitramfsAddress,
}

/// A stretch of the memory map.
struct MapEntry {
    start: u64,
    len: u64,
    kind: u32,
}

/// Writes what the kernel's entry point expects to find.
///
/// # Errors
/// When guest memory is too small for it.
pub fn write(
    ram: &GuestRam,
    kernel: &LoadedKernel,
    initramfs: Option<Range>,
    command_line: &CommandLine,
) -> Result<(), ParamsError> {
    let map = memory_map(ram.config().size);
    match kernel.entry {
        Entry::Linux(_) => write_linux(ram, kernel, initramfs, &map, command_line),
        Entry::Pvh(_) => write_pvh(ram, initramfs, &map),
    }
}

/// Boot memory only: hotpluggable memory announces itself through virtio-mem.
fn memory_map(size: u64) -> Vec<MapEntry> {
    let ram = |start: u64, end: u64| MapEntry { start, len: end.saturating_sub(start), kind: E820_RAM };
    let mut map =
        vec![ram(0, CONVENTIONAL_END), MapEntry { start: MP_TABLE, len: MP_TABLE_MAX, kind: E820_RESERVED }];
    for (start, len) in layout::boot_regions(size) {
        map.push(ram(start.max(HIGH_MEMORY), start + len));
    }
    map
}

fn write_linux(
    ram: &GuestRam,
    kernel: &LoadedKernel,
    initramfs: Option<Range>,
    map: &[MapEntry],
    command_line: &CommandLine,
) -> Result<(), ParamsError> {
    let mut params = boot_params::default();
    if let Some(header) = kernel.setup_header {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.version = PROTOCOL_VERSION;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low32(COMMAND_LINE)?;
    params.hdr.cmdline_size = u32::try_from(command_line.len()).unwrap_or(u32::MAX);
    if let Some(initramfs) = initramfs {
        params.hdr.ramdisk_image = low32(initramfs.start)?;
        params.hdr.ramdisk_size = low32(initramfs.len)?;
    }
    let mut count = 0;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.len, type_: entry.kind };
        count += 1;
    }
    params.e820_entries = count;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(ZERO_PAGE)),
        ram.mem().as_ref(),
    )
    .map_err(ParamsError::Write)
}

fn write_pvh(ram: &GuestRam, initramfs: Option<Range>, map: &[MapEntry]) -> Result<(), ParamsError> {
    let entries: Vec<_> = map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initramfs
        .iter()
        .map(|range| hvm_modlist_entry { paddr: range.start, size: range.len, ..Default::default() })
        .collect();
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: u32::try_from(entries.len()).unwrap_or_default(),
        modlist_paddr: if modules.is_empty() { 0 } else { PVH_MODULES },
        nr_modules: u32::try_from(modules.len()).unwrap_or_default(),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(PVH_START_INFO));
    params.set_sections(&entries, GuestAddress(PVH_MEMMAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.mem().as_ref()).map_err(ParamsError::Write)
}

fn low32(value: u64) -> Result<u32, ParamsError> {
    u32::try_from(value).map_err(|_| ParamsError::InitramfsAddress)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_has_no_overlaps_and_nothing_in_the_hole() {
        for size in [64 << 20, 3 << 30, 5 << 30] {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
            let ram: u64 = map.iter().filter(|entry| entry.kind == E820_RAM).map(|entry| entry.len).sum();
            assert_eq!(ram, size - (HIGH_MEMORY - CONVENTIONAL_END));
            assert!(
                map.iter().all(
                    |entry| entry.start + entry.len <= layout::LOW_END || entry.start >= layout::ABOVE_4G
                )
            );
        }
    }
}
