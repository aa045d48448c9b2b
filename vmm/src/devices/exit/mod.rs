//! The reset and exit port: how a guest without ACPI ends its machine, and says why.
//!
//! | port | access | meaning |
//! |---|---|---|
//! | [`EXIT_PORT`] | write, one byte | a [`GuestRequest`]: the machine ends |
//! | [`PHASE_PORT`] | write, one byte | the guest has reached this phase of its start; the first time is kept |
//! | 0x64 | read | 0: a keyboard controller that is always ready |
//! | 0x64 | write 0xfe | its reset line, Linux's default way to reboot |

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use caisson_vmm_api::exit::ExitReason;
use serde::{Deserialize, Serialize};

/// The port by which the guest ends the machine.
pub const EXIT_PORT: u16 = 0x600;
/// The port by which the guest marks how far its start has come.
pub const PHASE_PORT: u16 = 0x601;
/// Status and command port of the keyboard controller.
pub const KEYBOARD_PORT: u16 = 0x64;
/// Phases that are kept: 0 to 15.
pub const PHASES: usize = 16;
/// The phase that means that the guest's first process runs.
pub const PHASE_INIT: u8 = 1;

const KEYBOARD_RESET: u8 = 0xfe;

/// What a byte written to [`EXIT_PORT`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestRequest {
    /// 1: the guest has shut down.
    PowerOff,
    /// 2: the guest wants to be started afresh.
    Reboot,
    /// 3: the guest's init or kernel could not go on.
    Panic,
}

impl GuestRequest {
    /// The request that `byte` stands for.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::PowerOff),
            2 => Some(Self::Reboot),
            3 => Some(Self::Panic),
            _ => None,
        }
    }
}

/// The ports' device. It has no state that a snapshot would need.
pub struct ExitPort {
    started: Instant,
    /// Microseconds from `started` to each phase, plus one; 0 for a phase that was not reached.
    phases: [AtomicU64; PHASES],
}

impl ExitPort {
    /// A device that counts phases from `started`.
    #[must_use]
    pub fn new(started: Instant) -> Self {
        Self { started, phases: Default::default() }
    }

    /// Whether one of the device's ports is `port`.
    #[must_use]
    pub fn has(port: u16) -> bool {
        matches!(port, EXIT_PORT | PHASE_PORT | KEYBOARD_PORT)
    }

    /// A read of one of its ports.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if port == KEYBOARD_PORT {
            data.fill(0);
        }
    }

    /// A write to one of its ports.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<GuestRequest> {
        let &[byte] = data else { return None };
        match port {
            EXIT_PORT => GuestRequest::from_byte(byte),
            KEYBOARD_PORT => (byte == KEYBOARD_RESET).then_some(GuestRequest::Reboot),
            PHASE_PORT => {
                self.mark(byte);
                None
            }
            _ => None,
        }
    }

    fn mark(&self, phase: u8) {
        if let Some(cell) = self.phases.get(usize::from(phase)) {
            let micros = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX - 1);
            // A guest that marks a phase twice does not get to rewrite history.
            let _ = cell.compare_exchange(0, micros + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Microseconds from the machine's start to each phase that was reached.
    #[must_use]
    pub fn phases(&self) -> Vec<(u8, u64)> {
        (0u8..)
            .zip(&self.phases)
            .filter_map(|(phase, cell)| Some((phase, cell.load(Ordering::Relaxed).checked_sub(1)?)))
            .collect()
    }
}

impl From<GuestRequest> for ExitReason {
    fn from(request: GuestRequest) -> Self {
        match request {
            GuestRequest::PowerOff => Self::PowerOff,
            GuestRequest::Reboot => Self::Reboot,
            GuestRequest::Panic => Self::Panic,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> ExitPort {
        ExitPort::new(Instant::now())
    }

    #[test]
    fn each_way_out_is_told_apart() {
        let port = port();
        assert_eq!(port.write(EXIT_PORT, &[1]), Some(GuestRequest::PowerOff));
        assert_eq!(port.write(EXIT_PORT, &[2]), Some(GuestRequest::Reboot));
        assert_eq!(port.write(EXIT_PORT, &[3]), Some(GuestRequest::Panic));
        assert_eq!(port.write(KEYBOARD_PORT, &[0xfe]), Some(GuestRequest::Reboot));
    }

    #[test]
    fn anything_else_is_ignored() {
        let port = port();
        for (number, data) in [
            (EXIT_PORT, &[0][..]),
            (EXIT_PORT, &[1, 0]),
            (EXIT_PORT, &[]),
            (KEYBOARD_PORT, &[0x60]),
            (0x80, &[1]),
        ] {
            assert_eq!(port.write(number, data), None);
        }
        port.write(PHASE_PORT, &[255]);
        assert_eq!(port.phases(), []);
    }

    #[test]
    fn the_keyboard_controller_is_always_ready() {
        let mut byte = [0xff];
        port().read(KEYBOARD_PORT, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn the_first_time_of_a_phase_is_kept() {
        let port = port();
        port.write(PHASE_PORT, &[PHASE_INIT]);
        let first = port.phases();
        std::thread::sleep(std::time::Duration::from_millis(2));
        port.write(PHASE_PORT, &[PHASE_INIT]);
        assert_eq!(port.phases(), first);
        assert_eq!(first.len(), 1);
    }
}
