//! The clocks that the protocol speaks in.

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

const NANOS: i64 = 1_000_000_000;

/// CLOCK_REALTIME in nanoseconds since 1970.
pub fn realtime_ns() -> i64 {
    read(ClockId::CLOCK_REALTIME)
}

/// CLOCK_BOOTTIME in microseconds.
pub fn boottime_us() -> u64 {
    u64::try_from(read(ClockId::CLOCK_BOOTTIME) / 1000).unwrap_or(0)
}

/// Sets CLOCK_REALTIME.
///
/// # Errors
/// Without CAP_SYS_TIME, or when the value is before the machine's start.
pub fn set_realtime_ns(nanoseconds: i64) -> nix::Result<()> {
    let time = TimeSpec::new(nanoseconds.div_euclid(NANOS), nanoseconds.rem_euclid(NANOS));
    clock_settime(ClockId::CLOCK_REALTIME, time)
}

fn read(clock: ClockId) -> i64 {
    // Both clocks exist on every Linux since 2.6.39.
    let Ok(time) = clock_gettime(clock) else { return 0 };
    time.tv_sec().saturating_mul(NANOS).saturating_add(time.tv_nsec())
}
