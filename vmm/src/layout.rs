//! Where things are in the guest's physical address space, save for memory itself
//! ([`caisson_virtio::memory::layout`]).
//!
//! ```text
//! 0x0000_0500  boot GDT
//! 0x0000_6000  PVH start info, module list, memory map
//! 0x0000_7000  Linux boot parameters ("zero page")
//! 0x0000_9000  boot page tables
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of conventional memory
//! 0x000f_0000  MP table
//! 0x0010_0000  kernel image and everything else, up to 3 GiB
//! 0xc000_0000  hole: virtio-mmio slots, I/O APIC, local APICs, KVM's own pages
//! 0x1_0000_0000  memory beyond 3 GiB, then hotpluggable memory
//! ```

/// Boot-time global descriptor table.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info structure; its module list and memory map follow it.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list (one entry: the initramfs).
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x6100;
/// Linux `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level boot page table; the next levels follow it page by page.
pub const BOOT_PML4: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line that is accepted, its terminating NUL included: what a 64-bit Linux on x86 takes
/// (`COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory (below it, e820 says RAM).
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// MP floating pointer structure and configuration table: in the BIOS area, which kernels scan for it.
pub const MP_TABLE: u64 = 0xf_0000;
/// Room for the MP table.
pub const MP_TABLE_MAX: u64 = 0x1_0000;
/// Where high memory, and so the kernel, may start.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First virtio-mmio slot.
pub const MMIO_SLOTS: u64 = 0xd000_0000;
/// Size of one virtio-mmio slot: the registers and the start of the device's configuration space.
pub const MMIO_SLOT_SIZE: u64 = 0x1000;
/// KVM's page for real-mode emulation on processors that need it: three pages below the BIOS reset vector.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Physical address of the local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// Physical address of the I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
