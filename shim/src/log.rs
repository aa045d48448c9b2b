//! The shim's log: lines for containerd's fifo, each with the pod's ids.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::id::Id;

/// Up to so many bytes a write goes into a fifo as a whole or not at all (pipe(7)).
const PIPE_BUF: usize = 4096;
/// The fifo in the bundle, which containerd reads.
const FIFO: &str = "log";

/// Logs to the fifo in the working directory from here on; without one, nowhere.
///
/// Nobody waits for containerd: while it does not read, the fifo holds 64 KiB, and what comes then is lost. The fifo is
/// open for reading, too, so that it stays whole while containerd restarts.
pub fn to_containerd(namespace: &Id, pod: &Id, debug: bool) {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    let Ok(fifo) = options.open(FIFO) else { return };
    let log = Log { fifo: Arc::new(fifo), ids: format!("namespace={namespace} pod={pod} ").into() };
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_writer(log)
        .finish();
    // Set once, here.
    let _ = tracing::subscriber::set_global_default(subscriber);
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the shim broke")));
}

/// An error and its causes, in one line.
pub fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

#[derive(Clone, Debug)]
struct Log {
    fifo: Arc<File>,
    ids: Arc<str>,
}

/// A line in the making.
struct Line<'a> {
    log: &'a Log,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { log: self, text: self.ids.as_bytes().to_vec() }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        // What is logged may be a guest's word, and is to be no line of its own.
        let end = self.text.trim_ascii_end().len().min(PIPE_BUF - 1);
        self.text.truncate(end);
        self.text.iter_mut().filter(|byte| **byte == b'\n').for_each(|byte| *byte = b' ');
        self.text.push(b'\n');
        // A fifo that is full loses the line, as a whole.
        let _ = (&*self.log.fifo).write(&self.text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_line_is_one_whatever_is_said_in_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = Log { fifo: Arc::new(file.reopen().unwrap()), ids: "pod=p ".into() };
        for text in ["said\npod=q forged\n".to_owned(), "x".repeat(2 * PIPE_BUF)] {
            log.make_writer().write_all(text.as_bytes()).unwrap();
        }
        let mut text = String::new();
        file.reopen().unwrap().read_to_string(&mut text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "pod=p said pod=q forged");
        assert_eq!((lines.len(), lines[1].len()), (2, PIPE_BUF - 1));
    }
}
