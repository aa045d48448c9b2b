//! Network interfaces of this machine that guests are tied to.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::libc;

/// Runs `ip` with these words.
///
/// # Errors
/// When it fails.
pub fn ip(words: &str) -> Result<()> {
    let status = Command::new("ip").args(words.split(' ')).status().context("running ip")?;
    ensure!(status.success(), "ip {words} failed");
    Ok(())
}

/// A tap device that stays when nobody is attached to it, and goes with this.
#[derive(Debug)]
pub struct NamedTap {
    name: String,
}

impl NamedTap {
    /// Makes one with this address, such as `10.92.1.1/24`, and brings it up.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn new(name: &str, address: &str) -> Result<Self> {
        ip(&format!("tuntap add dev {name} mode tap vnet_hdr"))?;
        let tap = Self { name: name.to_owned() };
        ip(&format!("addr add {address} dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        Ok(tap)
    }
}

impl Drop for NamedTap {
    fn drop(&mut self) {
        // What is left of it is found by whoever looks for leaks.
        let _ = ip(&format!("link del {}", self.name));
    }
}

/// TUNSETIFF of linux/if_tun.h, whose number names another type than what it takes.
#[allow(missing_docs, reason = "nix's macro leaves no place for them")]
mod ioctl {
    use nix::libc;

    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// A tap device that is gone with its descriptor.
///
/// # Errors
/// When there is one of this name, or no `/dev/net/tun`.
pub fn tap(name: &str) -> Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("opening /dev/net/tun")?;
    // SAFETY: an ifreq is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    // SAFETY: the kernel reads one ifreq.
    unsafe { ioctl::set_interface(file.as_raw_fd(), &request) }.context("making a tap device")?;
    Ok(file.into())
}
