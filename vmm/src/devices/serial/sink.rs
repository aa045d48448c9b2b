use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    sync::Arc,
    time::Instant,
};

use caisson_virtio::metrics::Counter;
use serde::Serialize;

/// Counters of the console's output.
#[derive(Debug, Default, Serialize)]
pub struct ConsoleMetrics {
    /// Bytes written to the log.
    pub bytes_written: Counter,
    /// Bytes dropped because the guest wrote faster than allowed, or nobody read.
    pub bytes_dropped: Counter,
}

/// Where console output goes: never faster than the limit, and never waiting for whoever reads it.
///
/// A guest can print without end; what it prints must neither fill the node's log nor stop its own
/// processors. The same goes for the lines that it causes in the log of this process, which therefore takes
/// this way as well.
pub struct ConsoleSink<W = File> {
    out: Option<W>,
    /// What is missing a part, in the note that says so.
    name: &'static str,
    /// Bytes per second, and as many at once.
    rate: u64,
    tokens: u64,
    refilled: Instant,
    /// Bytes dropped since the last that got through.
    gap: u64,
    metrics: Arc<ConsoleMetrics>,
}

/// What a pipe that has room at all takes without waiting (pipe(7), PIPE_BUF).
const PIECE: usize = 4096;

impl ConsoleSink {
    /// A sink that writes to `out`, or nowhere, at most `rate` bytes per second (with a burst of as many).
    #[must_use]
    pub fn new(out: Option<File>, rate: u64) -> Self {
        Self::named("console", out, rate)
    }
}

impl<W: Write + AsRawFd> ConsoleSink<W> {
    /// The same for something else than a console, by its name.
    #[must_use]
    pub fn named(name: &'static str, out: Option<W>, rate: u64) -> Self {
        Self { out, name, rate, tokens: rate, refilled: Instant::now(), gap: 0, metrics: Arc::default() }
    }

    /// Its counters.
    #[must_use]
    pub fn metrics(&self) -> Arc<ConsoleMetrics> {
        self.metrics.clone()
    }

    fn admit(&mut self, bytes: u64) -> bool {
        if self.tokens < bytes {
            let now = Instant::now();
            let elapsed = now.duration_since(self.refilled).as_micros();
            let earned = elapsed.saturating_mul(u128::from(self.rate)) / 1_000_000;
            if earned > 0 {
                self.tokens =
                    self.rate.min(self.tokens.saturating_add(u64::try_from(earned).unwrap_or(u64::MAX)));
                self.refilled = now;
            }
        }
        let admitted = self.tokens >= bytes;
        if admitted {
            self.tokens -= bytes;
        }
        admitted
    }

    fn put(&mut self, data: &[u8]) -> bool {
        let Some(out) = &mut self.out else { return true };
        data.chunks(PIECE).all(|piece| writable(out) && out.write_all(piece).is_ok())
    }
}

/// Whether a write would not block. For a pipe this says that there is room for a page.
fn writable(file: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid entry, as many as the count says; a timeout of zero does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & libc::POLLOUT != 0 }
}

impl<W: Write + AsRawFd> Write for ConsoleSink<W> {
    /// Takes everything; what cannot be written is counted.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let len = data.len() as u64;
        if !self.admit(len) {
            self.gap += len;
            self.metrics.bytes_dropped.add(len);
            return Ok(data.len());
        }
        if self.gap > 0 {
            let note = format!("\n[{}: {} bytes dropped]\n", self.name, std::mem::take(&mut self.gap));
            self.put(note.as_bytes());
        }
        if self.put(data) {
            self.metrics.bytes_written.add(len);
        } else {
            self.gap += len;
            self.metrics.bytes_dropped.add(len);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn drops_what_exceeds_the_rate_and_says_so() {
        let mut file = tempfile::tempfile().unwrap();
        let mut sink = ConsoleSink::new(Some(file.try_clone().unwrap()), 100);
        for _ in 0..30 {
            sink.write_all(b"0123456789").unwrap();
        }
        let metrics = sink.metrics();
        assert!(metrics.bytes_dropped.get() >= 150, "{metrics:?}");
        assert_eq!(metrics.bytes_dropped.get() + metrics.bytes_written.get(), 300);
        std::thread::sleep(std::time::Duration::from_millis(150));
        sink.write_all(b"later").unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.contains("bytes dropped]\nlater"), "{text}");
    }

    #[test]
    fn never_waits_for_a_reader() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut sink = ConsoleSink::new(Some(File::from(std::os::fd::OwnedFd::from(writer))), u64::MAX);
        for _ in 0..100 {
            sink.write_all(&[b'x'; 4096]).unwrap();
        }
        assert!(sink.metrics().bytes_dropped.get() > 0);
        // Not even for one that is longer than what there is room for.
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut sink = ConsoleSink::named("log", Some(writer), u64::MAX);
        sink.write_all(&vec![b'x'; 1 << 20]).unwrap();
        assert!(sink.metrics().bytes_dropped.get() > 0);
    }
}
