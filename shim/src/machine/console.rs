//! What comes out of a machine as lines of text: the guest's console and the VMM's own log.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;

/// Lines that are kept for an error's message.
const KEPT: usize = 12;
/// Bytes of a line; what is longer is cut into several.
const MAX_LINE: u64 = 512;
/// What the machine said last may still be on its way when its end is seen.
const SETTLE: Duration = Duration::from_millis(100);

/// The last lines of a machine.
#[derive(Clone, Debug, Default)]
pub(super) struct Console {
    lines: Arc<Mutex<VecDeque<String>>>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Speaker {
    Guest,
    Vmm,
}

impl Console {
    /// The writing end of a pipe, each line of which is kept and logged. It is read until all writers are gone.
    pub(super) fn writer(&self, speaker: Speaker) -> io::Result<OwnedFd> {
        let (reader, writer) = io::pipe()?;
        let reader = OwnedFd::from(reader);
        rustix::io::ioctl_fionbio(&reader, true)?;
        let reader = pipe::Receiver::from_owned_fd(reader)?;
        tokio::spawn(self.clone().read(reader, speaker));
        Ok(writer.into())
    }

    async fn read(self, reader: pipe::Receiver, speaker: Speaker) {
        let mut reader = BufReader::with_capacity(1024, reader);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
                Ok(1..) => {}
                _ => return,
            }
            // The guest chooses these bytes: nothing that a terminal would obey gets through.
            let text: String = String::from_utf8_lossy(&line).chars().filter(|c| !c.is_control()).collect();
            match speaker {
                Speaker::Guest => tracing::debug!(console = text),
                Speaker::Vmm => tracing::info!(vmm = text),
            }
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.len() >= KEPT {
                lines.pop_front();
            }
            lines.push_back(text);
        }
    }

    /// The last lines.
    pub(super) async fn tail(&self) -> String {
        tokio::time::sleep(SETTLE).await;
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join(" | ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn the_last_lines_are_kept_without_what_a_terminal_would_obey() {
        let console = Console::default();
        let mut writer = std::fs::File::from(console.writer(Speaker::Guest).unwrap());
        for number in 0..100 {
            writeln!(writer, "line {number}\x1b[2J\r").unwrap();
        }
        writer.write_all(&[b'x'; 2000]).unwrap();
        drop(writer);
        let tail = console.tail().await;
        assert!(tail.contains("line 99[2J | x"), "{tail}");
        assert!(!tail.contains("line 80") && !tail.contains('\x1b'), "{tail}");
    }
}
