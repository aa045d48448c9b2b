//! Network interfaces of this machine that guests are tied to.

use std::{os::fd::OwnedFd, process::Command};

use anyhow::{Context, Result, ensure};
use caisson_virtio::devices::net::Tap;

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

/// A tap device that is gone with its descriptor.
///
/// # Errors
/// When there is one of this name, or no `/dev/net/tun`.
pub fn tap(name: &str) -> Result<OwnedFd> {
    Tap::make(name.as_ref()).context("making a tap device")
}
