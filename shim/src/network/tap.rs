//! Tap devices (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

/// The longest name of an interface (IFNAMSIZ without its null byte).
pub(super) const MAX_NAME: usize = 15;

/// Makes a tap device in the network namespace of the calling thread: one queue, no packet information, a virtio-net
/// header before each frame. It is gone with the last copy of its descriptor.
pub(super) fn make(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq is plain data, of which all zeros is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() > MAX_NAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // The field is signed, and IFF_TUN_EXCL its highest bit.
    let [low, high, ..] = flags.to_le_bytes();
    request.ifr_ifru.ifru_flags = libc::c_short::from_le_bytes([low, high]);
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
