//! QEMU's monitor, for the one thing it is needed for: where a machine is that says nothing any more.

use std::{
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::proc;

/// How long QEMU may take to print an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection to QEMU's human monitor.
#[derive(Debug)]
pub(crate) struct Monitor(UnixStream);

impl Monitor {
    /// Gives a QEMU that is about to start a monitor. The second socket is QEMU's and must stay open until then.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn of(qemu: &mut Command) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
        ours.set_read_timeout(Some(PATIENCE)).context("limiting reads from the monitor")?;
        ours.set_write_timeout(Some(PATIENCE)).context("limiting writes to the monitor")?;
        qemu.arg("-chardev").arg(format!("socket,id=monitor,fd={}", theirs.as_raw_fd()));
        qemu.args(["-monitor", "chardev:monitor"]);
        proc::inherit(qemu, theirs.as_raw_fd());
        Ok((Self(ours), theirs))
    }

    /// The processor's registers at two moments, and which interrupts are pending. What QEMU does not answer is missing.
    pub(crate) fn where_it_is(&mut self) -> String {
        ["info registers", "info registers", "info lapic"].map(|question| self.ask(question)).join("\n")
    }

    fn ask(&mut self, command: &str) -> String {
        let mut answer = Vec::new();
        if writeln!(self.0, "{command}").is_ok() {
            // Ends with the timeout: the monitor does not say when it has said all.
            let _ = self.0.read_to_end(&mut answer);
        }
        let text = String::from_utf8_lossy(&answer);
        // The prompt echoes what is typed, a letter at a time, with escape sequences between; nobody hangs in the
        // registers of floating point.
        let noise = |line: &&str| {
            let registers = ["FPR", "FCW", "XMM", "YMM"];
            !line.contains('\u{1b}') && !registers.iter().any(|name| line.starts_with(name))
        };
        text.lines().filter(noise).collect::<Vec<_>>().join("\n")
    }
}
