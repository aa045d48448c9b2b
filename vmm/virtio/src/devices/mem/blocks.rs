use std::io;

/// What the machine does when blocks come and go.
///
/// Ranges are whole blocks inside the device's region, and never plugged twice or unplugged unless plugged.
pub trait Blocks: Send + Sync {
    /// Makes `len` bytes from the guest physical address `addr` memory of the guest.
    ///
    /// # Errors
    /// When the host cannot; the range is then as it was.
    fn plug(&self, addr: u64, len: u64) -> io::Result<()>;

    /// Gives them back to the host, and takes from the guest's address space what it can.
    ///
    /// # Errors
    /// When the host cannot; the range is then still plugged, though it may read as zeros.
    fn unplug(&self, addr: u64, len: u64) -> io::Result<()>;
}
