//! The emulator: Debian unstable's QEMU, unpacked into the cache with its libraries, whatever the host has.
//!
//! It must be 10.2 or newer. Before, the emulation of VMRUN changes the set of pending interrupts without the lock
//! under which the timers' thread adds to it: interrupts are lost, and nested guests die of states that no processor
//! can be in, the more often the busier the host is.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::{
    apt::{PrivateApt, Suite},
    cache::Key,
    host::Host,
    proc,
};

/// Debian's package of the emulator.
const PACKAGE: &str = "qemu-system-x86";

/// What of the unpacked packages only people read.
const LEFT_OUT: [&str; 3] = ["usr/share/doc", "usr/share/man", "usr/share/locale"];

/// A QEMU in a directory of its own.
#[derive(Debug)]
pub(crate) struct Qemu(PathBuf);

impl Qemu {
    /// Fetches and unpacks it, unless the cache has it.
    ///
    /// # Errors
    /// When packages can't be fetched or unpacked, or don't work on this host.
    pub(crate) fn unpack(host: &Host) -> Result<Self> {
        let apt = PrivateApt::open(&host.cache, Suite::Sid)?;
        let key = Key::new("testbed-qemu-1").with(apt.version(PACKAGE)?).with(LEFT_OUT.join(" "));
        let root = host.cache.entry("testbed-qemu", &key, |output| {
            apt.unpack_all(PACKAGE, output)?;
            for path in LEFT_OUT {
                let path = output.join(path);
                std::fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
            }
            let version = proc::output(Self(output.to_owned()).command().arg("--version"))?;
            ensure!(version.contains("QEMU emulator"), "the unpacked QEMU says {version:?}");
            Ok(())
        })?;
        Ok(Self(root))
    }

    /// The emulator, without options. It is loaded by the C library that it was built for: the host's may be older.
    pub(crate) fn command(&self) -> Command {
        let usr = self.0.join("usr");
        let mut command = proc::dies_with_us(usr.join("lib64/ld-linux-x86-64.so.2"), Signal::SIGKILL);
        command.arg("--library-path").arg(usr.join("lib/x86_64-linux-gnu"));
        command.arg(usr.join("bin/qemu-system-x86_64"));
        for firmware in ["share/qemu", "share/seabios"] {
            command.arg("-L").arg(usr.join(firmware));
        }
        // Otherwise it goes by the name of what loads it.
        command.args(["-name", "process=qemu-system-x86"]);
        command
    }
}
