//! The end of the machine.

use std::arch::asm;

use nix::sys::reboot::{RebootMode, reboot};
use tracing::error;

/// The VMM's port: a byte that is written here ends the machine and says why. A machine without ACPI has no other
/// way to tell power-off from a halt.
const EXIT_PORT: u16 = 0x600;
const POWER_OFF: u8 = 1;
const REBOOT: u8 = 2;

/// Ends the machine: by the VMM's port, then as any Linux does. Returns only when neither works.
pub fn power_off(restart: bool) {
    nix::unistd::sync();
    write_port(if restart { REBOOT } else { POWER_OFF });
    let mode = if restart { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF };
    let Err(errno) = reboot(mode);
    error!(%errno, "the machine does not end");
}

fn write_port(value: u8) {
    // SAFETY: allows this thread to use one port that belongs to nothing but the VMM's exit device.
    let allowed = unsafe { libc::ioperm(EXIT_PORT.into(), 1, 1) } == 0;
    if allowed {
        // SAFETY: the port was made accessible just now; writing it changes no memory.
        unsafe {
            asm!("out dx, al", in("dx") EXIT_PORT, in("al") value, options(nomem, nostack, preserves_flags))
        };
    }
}
