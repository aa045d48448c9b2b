//! Getting a kernel into guest memory, with everything that it expects to find there.
//!
//! | module | writes |
//! |---|---|
//! | [`command_line`] | the kernel command line, from parts |
//! | [`kernel`] | the kernel image (64-bit ELF, PVH, bzImage) and the initramfs |
//! | [`params`] | Linux boot parameters or the PVH start info, with the memory map |
//! | [`mp_table`] | the MP table: processors, I/O APIC, interrupt routes |

pub mod command_line;
pub mod kernel;
pub mod mp_table;
pub mod params;

use std::fs::File;

use caisson_virtio::memory::GuestRam;
use caisson_vmm_api::config::Protocol;
pub use command_line::{CommandLine, CommandLineError};
pub use kernel::{Entry, KernelError};
pub use mp_table::MpTableError;
pub use params::ParamsError;

/// What to boot.
pub struct BootSource<'a> {
    /// The kernel image.
    pub kernel: &'a File,
    /// The initial RAM disk.
    pub initramfs: Option<&'a File>,
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// Its command line.
    pub command_line: &'a CommandLine,
    /// How many processors the guest is told of, the one that boots included.
    pub processors: u8,
}

/// Why a kernel could not be made ready to run.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel or the initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// The boot parameters.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// The MP table.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
}

/// Loads everything and says where the first processor starts.
///
/// # Errors
/// When an image is not what it should be, or something does not fit; see [`BootError`].
pub fn load(ram: &GuestRam, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let kernel = kernel::load_kernel(ram, source.kernel, source.protocol)?;
    let initramfs = source.initramfs.map(|file| kernel::load_initramfs(ram, file, kernel.end)).transpose()?;
    source.command_line.write(ram.mem())?;
    params::write(ram, &kernel, initramfs, source.command_line)?;
    mp_table::write(ram.mem(), source.processors)?;
    Ok(kernel.entry)
}
