//! The agent's own log and the kernel's, both kept for the `Logs` stream.
//!
//! The agent's lines also go to standard error, which is the console when the agent is PID 1.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use caisson_protocol::limits::LOG_RING;
use caisson_protocol::v1::LogLine;
use caisson_protocol::v1::log_line::Source;
use tokio::io::unix::AsyncFd;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::clock;
use crate::ring::Ring;

/// Bytes of a line that are kept.
const MAX_LINE: usize = 1024;
/// A record of /dev/kmsg is never larger (the kernel's CONSOLE_EXT_LOG_MAX).
const MAX_RECORD: usize = 8192;

/// The kept lines.
pub type Lines = Ring<LogLine>;

/// Starts logging of the whole process, at most once. Lines above `level` are dropped.
pub fn start(level: Level) -> Arc<Lines> {
    let lines = Arc::new(Ring::new(LOG_RING));
    let writer = Writer { lines: lines.clone() };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time()
        .with_writer(writer)
        .finish();
    // A second start happens in tests only; the first subscriber stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
    lines
}

/// Copies the kernel's log until its device fails.
///
/// # Errors
/// When /dev/kmsg can not be read.
pub async fn follow_kernel(lines: Arc<Lines>) -> io::Result<()> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open("/dev/kmsg")?;
    // SAFETY: the file owns its descriptor, which stays open and the same as long as the registration.
    let file = unsafe { AsyncFd::register(file) }?;
    let mut record = vec![0; MAX_RECORD];
    loop {
        let mut ready = file.readable().await?;
        let read = ready.try_io(|file| file.get_ref().read(&mut record));
        match read {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(size)) => {
                let bytes = record.get(..size).unwrap_or_default();
                if let Some((severity, text)) = parse_record(&String::from_utf8_lossy(bytes)) {
                    push(&lines, Source::Kernel, severity, text);
                }
            }
            // EPIPE: records were overwritten before they were read; the next read goes on with the oldest.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// Severity and text of a record ("6,339,5140900,-;text\n KEY=value\n", see the kernel's ABI/testing/dev-kmsg).
/// Records that came from user space are left out: the agent's own are kept already.
fn parse_record(record: &str) -> Option<(u32, &str)> {
    let (prefix, text) = record.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    let from_kernel = priority >> 3 == 0;
    from_kernel.then(|| (priority & 7, text.lines().next().unwrap_or_default()))
}

fn push(lines: &Lines, source: Source, severity: u32, text: &str) {
    let mut end = text.len().min(MAX_LINE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default().to_owned();
    lines.push(|sequence| LogLine {
        sequence,
        time_ns: clock::realtime_ns(),
        source: source.into(),
        severity,
        text,
    });
}

struct Writer {
    lines: Arc<Lines>,
}

struct LineWriter<'a> {
    lines: &'a Lines,
    severity: u32,
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter { lines: &self.lines, severity: 6 }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> LineWriter<'a> {
        let severity = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        LineWriter { lines: &self.lines, severity }
    }
}

impl Write for LineWriter<'_> {
    // The formatter hands over whole events.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A console that is gone is no reason to fail.
        let _ = io::stderr().write_all(bytes);
        let text = String::from_utf8_lossy(bytes);
        push(self.lines, Source::Agent, self.severity, text.trim_end());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kernel_records_are_told_from_user_space() {
        assert_eq!(
            parse_record("6,339,5140900,-;NET: Registered\n SUBSYSTEM=x\n"),
            Some((6, "NET: Registered"))
        );
        assert_eq!(parse_record("12,1,2,-;from user space\n"), None);
        assert_eq!(parse_record("no record"), None);
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let lines = Ring::new(2);
        push(&lines, Source::Agent, 6, &"é".repeat(MAX_LINE));
        let kept = lines.read(1).unwrap();
        assert_eq!(kept[0].text.len(), MAX_LINE);
        push(&lines, Source::Agent, 6, &format!("x{}", "é".repeat(MAX_LINE)));
        assert_eq!(lines.read(2).unwrap()[0].text.len(), MAX_LINE - 1);
    }

    proptest! {
        #[test]
        fn records_never_panic(record in ".*") {
            let _ = parse_record(&record);
        }
    }
}
