//! Copying one way.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FileType;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedWriteHalf, pipe};
use tokio::sync::Notify;

use super::ConnectError;

/// Bytes that are under way in one stream. As much as a pipe holds by default would be 64 KiB; half of it is copied as
/// fast.
const CHUNK: usize = 32 << 10;

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    Fifo(pipe::Sender),
    File(File),
    Nowhere,
}

/// Where input comes from.
#[derive(Debug)]
pub(super) struct Source(pipe::Receiver);

/// What the end of the input means to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The end of its input.
    Close,
    /// Nothing: a terminal has no end.
    Detach,
}

fn open_error(path: &Path) -> impl FnOnce(io::Error) -> ConnectError {
    let path = path.to_owned();
    move |source| ConnectError::Open { path, source }
}

impl Sink {
    /// Opens a fifo or a file, by its path or its `file://` URI.
    pub(super) fn open(name: &str) -> Result<Sink, ConnectError> {
        if name.is_empty() {
            return Ok(Sink::Nowhere);
        }
        let (path, to_be_made) = match name.split_once("://") {
            Some(("file", path)) => (Path::new(path), true),
            Some(_) => return Err(ConnectError::Scheme(name.to_owned())),
            None => (Path::new(name), false),
        };
        match rustix::fs::stat(path) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Fifo => {
                let sender = pipe::OpenOptions::new().read_write(true).open_sender(path);
                return sender.map(Sink::Fifo).map_err(open_error(path));
            }
            Err(errno) if !(to_be_made && errno == rustix::io::Errno::NOENT) => {
                return Err(open_error(path)(errno.into()));
            }
            _ => {}
        }
        let file = std::fs::File::options().append(true).create(to_be_made).open(path);
        file.map(|file| Sink::File(File::from_std(file))).map_err(open_error(path))
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Fifo(fifo) => fifo.write_all(bytes).await,
            Sink::File(file) => {
                file.write_all(bytes).await?;
                file.flush().await
            }
            Sink::Nowhere => Ok(()),
        }
    }
}

impl Source {
    /// Opens a fifo. Where its end means nothing, it has none: its writer may go and come back.
    pub(super) fn open(path: &str, end: End) -> Result<Source, ConnectError> {
        let path = Path::new(path);
        let receiver = pipe::OpenOptions::new().read_write(end == End::Detach).open_receiver(path);
        receiver.map(Source).map_err(open_error(path))
    }
}

/// Copies until the guest ends the stream. An output that can't be written is read all the same: the process must not
/// be held up by it. `waits` is true while there is something that nobody takes.
pub(super) async fn output(mut from: impl AsyncRead + Unpin, mut to: Sink, waits: Arc<AtomicBool>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) => return,
            Ok(length) => {
                let bytes = chunk.get(..length).unwrap_or_default();
                waits.store(true, Ordering::Relaxed);
                if let Err(error) = to.write(bytes).await {
                    tracing::warn!(%error, "output is lost: it can't be written");
                    to = Sink::Nowhere;
                }
                waits.store(false, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::debug!(%error, "the guest broke an output off");
                return;
            }
        }
    }
}

/// Copies until the fifo's writer is gone, or `close` is called.
pub(super) async fn input(from: Source, mut to: OwnedWriteHalf, close: Arc<Notify>, end: End) {
    if let Err(error) = copy_in(&from.0, &mut to, &close).await {
        // A process that has ended, or closed its input, is no error.
        tracing::debug!(%error, "input has ended");
    }
    match end {
        End::Close => {
            // The process may be gone.
            let _ = to.shutdown().await;
        }
        End::Detach => to.forget(),
    }
}

async fn copy_in(from: &pipe::Receiver, to: &mut OwnedWriteHalf, close: &Notify) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        tokio::select! {
            ready = from.readable() => ready?,
            () = close.notified() => return drain(from, to, &mut chunk).await,
        }
        match from.try_read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(chunk.get(..length).unwrap_or_default()).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// What is in the fifo now. Asked of the kernel itself: the runtime may not know of the last bytes yet.
async fn drain(from: &pipe::Receiver, to: &mut OwnedWriteHalf, chunk: &mut [u8]) -> io::Result<()> {
    loop {
        match rustix::io::read(from, &mut *chunk) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Ok(length) => to.write_all(chunk.get(..length).unwrap_or_default()).await?,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::net::UnixStream;

    fn fifo(directory: &Path, name: &str) -> std::path::PathBuf {
        let path = directory.join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        path
    }

    #[tokio::test]
    async fn output_survives_a_reader_that_comes_late_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "out");
        let (guest, shim) = UnixStream::pair().unwrap();
        let task = tokio::spawn(output(shim, Sink::open(path.to_str().unwrap()).unwrap(), Arc::default()));
        let mut guest = guest;
        guest.write_all(b"before").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let mut got = [0; 6];
        reader.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"before");
        drop(reader);
        guest.write_all(b"after").await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        drop(guest);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"after");
        task.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_in_the_fifo_goes_through_before_the_input_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "in");
        let (mut guest, shim) = UnixStream::pair().unwrap();
        let close = Arc::new(Notify::new());
        let source = Source::open(path.to_str().unwrap(), End::Close).unwrap();
        let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
        writer.write_all(&[7; 60_000]).await.unwrap();
        close.notify_one();
        let (_from, to) = shim.into_split();
        let task = tokio::spawn(input(source, to, close, End::Close));
        let mut got = Vec::new();
        guest.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, [7; 60_000]);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_writer_that_goes_ends_the_input() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "in");
        let (mut guest, shim) = UnixStream::pair().unwrap();
        let source = Source::open(path.to_str().unwrap(), End::Close).unwrap();
        let (_from, to) = shim.into_split();
        let task = tokio::spawn(input(source, to, Arc::new(Notify::new()), End::Close));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!task.is_finished(), "a writer that has not come yet is no end");
        let mut writer = pipe::OpenOptions::new().open_sender(&path).unwrap();
        writer.write_all(b"all").await.unwrap();
        drop(writer);
        let mut got = Vec::new();
        guest.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"all");
    }

    #[tokio::test]
    async fn files_are_appended_to_and_other_schemes_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for _ in 0..2 {
            let (mut guest, shim) = UnixStream::pair().unwrap();
            let task = tokio::spawn(output(
                shim,
                Sink::open(&format!("file://{}", path.display())).unwrap(),
                Arc::default(),
            ));
            guest.write_all(b"x").await.unwrap();
            drop(guest);
            task.await.unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"xx");
        assert!(matches!(Sink::open("binary:///bin/logger"), Err(ConnectError::Scheme(_))));
        assert!(matches!(Sink::open("/nonexistent/fifo"), Err(ConnectError::Open { .. })));
    }
}
