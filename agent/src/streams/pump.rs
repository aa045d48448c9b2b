//! The pumps: one task for each stream.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::sync::{Notify, watch};

use super::{Fd, Port};
use crate::connection::Connection;

/// Bytes buffered for a stream while a connection is attached.
const BUFFER: usize = 64 << 10;

/// How long a connection inside the pod waits for the host's.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(30);

/// Tells output pumps that their process has ended, and learns from them when its last byte was handed over.
#[derive(Clone, Debug)]
pub struct Exit {
    ended: watch::Sender<bool>,
    // Every pump holds a sender, and counts itself when its output was handed over. One that is given up does not.
    drained: watch::Receiver<usize>,
    outputs: usize,
}

/// An output pump's part in an [`Exit`].
#[derive(Debug)]
pub struct Finish {
    ended: watch::Receiver<bool>,
    drained: Option<watch::Sender<usize>>,
}

impl Exit {
    /// For a process with `outputs` output streams.
    pub fn new(outputs: usize) -> (Exit, Vec<Finish>) {
        let ended = watch::Sender::new(false);
        let (sender, drained) = watch::channel(0);
        let finishes = (0..outputs)
            .map(|_| Finish { ended: ended.subscribe(), drained: Some(sender.clone()) })
            .collect();
        (Exit { ended, drained, outputs }, finishes)
    }

    /// The process has ended. Returns when what it wrote has been handed over, or given up; whether all of it was
    /// handed over.
    pub async fn drained(&mut self) -> bool {
        self.ended.send_replace(true);
        while self.drained.changed().await.is_ok() {}
        *self.drained.borrow() == self.outputs
    }
}

impl Finish {
    fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Everything that was written before the process ended is handed over.
    fn done(&mut self) {
        if let Some(drained) = self.drained.take() {
            drained.send_modify(|count| *count = count.saturating_add(1));
        }
    }

    async fn ends(&mut self) {
        if self.has_ended() || self.ended.wait_for(|&ended| ended).await.is_err() {
            // Nothing more to learn.
            std::future::pending::<()>().await;
        }
    }
}

/// Output: `source` to the host, until the source ends. Bytes that no connection took yet wait.
pub async fn drain(mut port: Port, source: Arc<Fd>, mut finish: Finish) {
    let mut pending = Vec::new();
    loop {
        let mut connection = port.connection().await;
        if let Ok(()) = drain_into(&mut connection, &source, &mut pending, &mut finish).await {
            finish.done();
            let _ = connection.shutdown().await;
            wait_for_close(connection).await;
            return;
        }
        port.detached();
    }
}

/// Returns at the source's end; fails when the connection does, with the bytes that it did not take in `pending`.
async fn drain_into<W>(
    connection: &mut W,
    source: &Fd,
    pending: &mut Vec<u8>,
    finish: &mut Finish,
) -> io::Result<()>
where
    W: AsyncRead + AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    loop {
        while !pending.is_empty() {
            let size = connection.write(pending).await?;
            if size == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            pending.drain(..size);
        }
        let read = match source.try_read(&mut buffer) {
            Ok(read) => read,
            // A source that fails has no more bytes to give.
            Err(_) => return Ok(()),
        };
        let size = match read {
            Some(size) => size,
            None => {
                if finish.has_ended() {
                    finish.done();
                }
                connection.flush().await?;
                tokio::select! {
                    size = source.read(&mut buffer) => size.unwrap_or(0),
                    () = finish.ends() => continue,
                    () = closed(connection) => return Err(io::ErrorKind::BrokenPipe.into()),
                }
            }
        };
        if size == 0 {
            return connection.flush().await;
        }
        pending.extend_from_slice(buffer.get(..size).unwrap_or_default());
    }
}

/// Returns when the host closes a connection on which it has nothing to say.
async fn closed<R: AsyncRead + Unpin>(connection: &mut R) {
    let mut byte = [0; 64];
    while let Ok(1..) = connection.read(&mut byte).await {}
}

/// Lets the host close first, so that nothing which it did not read yet is cut off.
async fn wait_for_close(mut connection: Connection) {
    let _ = tokio::time::timeout(caisson_protocol::limits::DRAIN_TIMEOUT, closed(&mut connection)).await;
}

/// Input: the host to `sink`, until a half-close or until `close` is notified.
pub async fn feed(mut port: Port, sink: Fd, close: Arc<Notify>) {
    loop {
        let mut connection = tokio::select! {
            connection = port.connection() => connection,
            () = close.notified() => return,
        };
        let mut buffer = vec![0; BUFFER];
        let mut closing = false;
        loop {
            let read = tokio::select! {
                biased;
                read = connection.read(&mut buffer) => read,
                // What has arrived is written first: the read above is polled before this.
                () = close.notified(), if !closing => {
                    closing = true;
                    continue;
                }
                () = std::future::ready(()), if closing => return,
            };
            match read {
                Ok(0) => return,
                Ok(size) => {
                    // Nobody reads: the process closed its stdin.
                    if sink.write_all(buffer.get(..size).unwrap_or_default()).await.is_err() {
                        return;
                    }
                }
                Err(_) => break,
            }
        }
        port.detached();
        if closing {
            return;
        }
    }
}

/// A terminal, both ways, until its other side closes.
pub async fn terminal(mut port: Port, master: Arc<Fd>, mut finish: Finish) {
    let mut pending = Vec::new();
    let attached = port.attached.clone();
    let mut next = None;
    loop {
        let connection = match next.take() {
            Some(connection) => connection,
            None => port.connection().await,
        };
        let (mut from_host, mut to_host) = tokio::io::split(connection);
        let mut output = OneWay(&mut to_host);
        let input = async {
            let mut buffer = vec![0; BUFFER];
            loop {
                match from_host.read(&mut buffer).await {
                    // A half-close, after which output goes on, or the connection's end, which only shows when there
                    // is output: whoever connects anew decides.
                    Ok(0) => {
                        attached.store(false, Ordering::Release);
                        std::future::pending().await
                    }
                    Ok(size) => {
                        if master.write_all(buffer.get(..size).unwrap_or_default()).await.is_err() {
                            std::future::pending().await
                        }
                    }
                    Err(error) => return error,
                }
            }
        };
        let ended = tokio::select! {
            result = drain_into(&mut output, &master, &mut pending, &mut finish) => result.is_ok(),
            _error = input => false,
            connection = port.connection() => {
                next = Some(connection);
                continue;
            }
        };
        if ended {
            finish.done();
            let _ = to_host.shutdown().await;
            wait_for_close(from_host.unsplit(to_host)).await;
            return;
        }
        port.detached();
    }
}

/// The writing half of a terminal's connection; its reading half is someone else's.
struct OneWay<'a, W>(&'a mut W);

impl<W: Unpin> AsyncRead for OneWay<'_, W> {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Pending
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for OneWay<'_, W> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}

/// A socket, both ways, once; half-closes are passed on.
pub async fn forward<S: AsyncRead + AsyncWrite + Unpin>(mut port: Port, mut socket: S) {
    let Ok(mut connection) = tokio::time::timeout(ATTACH_TIMEOUT, port.connection()).await else { return };
    let _ = copy_bidirectional(&mut connection, &mut socket).await;
}

#[cfg(test)]
mod tests {
    use caisson_protocol::stream::attach;
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;
    use tokio::io::duplex;

    use super::*;
    use crate::streams::Registry;

    async fn connect(registry: &Registry, id: u64) -> tokio::io::DuplexStream {
        let (mut host, agent) = duplex(16 << 10);
        let (result, ()) = tokio::join!(attach(&mut host, id), registry.attach(Connection::new(agent)));
        result.unwrap();
        host
    }

    fn pipe() -> (Fd, Fd) {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        (Fd::new(read).unwrap(), Fd::new(write).unwrap())
    }

    #[tokio::test]
    async fn all_output_arrives_before_the_exit_is_told() {
        let registry = Registry::default();
        let port = registry.open();
        let id = port.id();
        let (source, sink) = pipe();
        let (mut exit, mut finishes) = Exit::new(1);
        tokio::spawn(drain(port, Arc::new(source), finishes.pop().unwrap()));
        sink.write_all(&[7; 60_000]).await.unwrap();
        // The sink stays open: a child of the process holds it.
        let mut host = connect(&registry, id).await;
        let reader = async {
            let mut bytes = vec![0; 60_000];
            host.read_exact(&mut bytes).await.unwrap();
            bytes
        };
        let (bytes, all) = tokio::join!(reader, exit.drained());
        assert!(all && bytes.iter().all(|&byte| byte == 7));
        // And the stream goes on for the child.
        sink.write_all(b"late").await.unwrap();
        drop(sink);
        let mut rest = String::new();
        host.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "late");
    }

    #[tokio::test]
    async fn output_without_a_reader_is_not_drained() {
        let registry = Registry::default();
        let (source, sink) = pipe();
        let (mut exit, mut finishes) = Exit::new(1);
        tokio::spawn(drain(registry.open(), Arc::new(source), finishes.pop().unwrap()));
        sink.write_all(b"x").await.unwrap();
        drop(sink);
        let short = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(short, exit.drained()).await.is_err());
    }

    #[tokio::test]
    async fn output_that_is_given_up_is_not_handed_over() {
        let registry = Registry::default();
        let (source, sink) = pipe();
        let (mut exit, mut finishes) = Exit::new(1);
        let pump = tokio::spawn(drain(registry.open(), Arc::new(source), finishes.pop().unwrap()));
        sink.write_all(b"x").await.unwrap();
        pump.abort();
        assert!(!exit.drained().await);
    }

    #[tokio::test]
    async fn output_survives_a_broken_connection() {
        let registry = Registry::default();
        let port = registry.open();
        let id = port.id();
        let (source, sink) = pipe();
        let (_exit, mut finishes) = Exit::new(1);
        tokio::spawn(drain(port, Arc::new(source), finishes.pop().unwrap()));
        drop(connect(&registry, id).await);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        sink.write_all(b"kept").await.unwrap();
        drop(sink);
        let mut text = String::new();
        connect(&registry, id).await.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "kept");
    }

    #[tokio::test]
    async fn a_quiet_terminal_can_be_attached_to_again() {
        let registry = Registry::default();
        let port = registry.open();
        let id = port.id();
        let (source, sink) = pipe();
        let (_exit, mut finishes) = Exit::new(1);
        tokio::spawn(terminal(port, Arc::new(source), finishes.pop().unwrap()));
        // Nothing was said meanwhile.
        drop(connect(&registry, id).await);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        let mut host = connect(&registry, id).await;
        host.shutdown().await.unwrap();
        sink.write_all(b"kept").await.unwrap();
        drop(sink);
        let mut text = String::new();
        host.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "kept", "a half-close leaves the output");
    }

    #[tokio::test]
    async fn a_half_close_closes_stdin() {
        let registry = Registry::default();
        let port = registry.open();
        let id = port.id();
        let (source, sink) = pipe();
        tokio::spawn(feed(port, sink, Arc::default()));
        let mut host = connect(&registry, id).await;
        host.write_all(b"input").await.unwrap();
        host.shutdown().await.unwrap();
        let mut bytes = [0; 16];
        assert_eq!(source.read(&mut bytes).await.unwrap(), 5);
        assert_eq!(source.read(&mut bytes).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn closing_stdin_keeps_what_has_arrived() {
        let registry = Registry::default();
        let port = registry.open();
        let id = port.id();
        let (source, sink) = pipe();
        let close = Arc::new(Notify::new());
        tokio::spawn(feed(port, sink, close.clone()));
        let mut host = connect(&registry, id).await;
        host.write_all(b"input").await.unwrap();
        close.notify_one();
        let mut bytes = [0; 16];
        assert_eq!(source.read(&mut bytes).await.unwrap(), 5);
        assert_eq!(source.read(&mut bytes).await.unwrap(), 0);
    }
}
