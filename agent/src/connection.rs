//! Connections from the host: who may open one, and to which port.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use caisson_protocol::{connect, ports};
use nix::unistd::geteuid;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};
use tracing::{debug, warn};

use crate::task;

/// Accepted connections that wait to be served.
const BACKLOG: usize = 16;

trait Transport: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Transport for T {}

/// A connection, whatever its transport.
pub struct Connection {
    transport: Pin<Box<dyn Transport>>,
    /// Of those that there are so many of.
    _place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Wraps a transport's connection.
    pub fn new(transport: impl AsyncRead + AsyncWrite + Send + 'static) -> Connection {
        Connection { transport: Box::pin(transport), _place: None }
    }

    /// The same, in a place that is free again when it ends.
    pub fn in_place(self, place: OwnedSemaphorePermit) -> Connection {
        Connection { _place: Some(place), ..self }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.transport.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.transport.as_mut().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.transport.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.transport.as_mut().poll_shutdown(cx)
    }
}

/// The accepted connections of both ports.
pub struct Incoming {
    /// To [`ports::CONTROL`].
    pub control: mpsc::Receiver<Connection>,
    /// To [`ports::STREAMS`].
    pub streams: mpsc::Receiver<Connection>,
}

/// Listens on the vsock ports. Only the host is let in: a process inside the guest could otherwise reach the agent.
///
/// # Errors
/// When a port can not be bound.
pub fn listen_vsock() -> io::Result<Incoming> {
    let (control_sender, control) = mpsc::channel(BACKLOG);
    let (streams_sender, streams) = mpsc::channel(BACKLOG);
    for (port, sender) in [(ports::CONTROL, control_sender), (ports::STREAMS, streams_sender)] {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        task::spawn(accept_vsock(listener, sender));
    }
    Ok(Incoming { control, streams })
}

/// Listens on a unix socket as the VMM does on behalf of a guest. Only the agent's own user is let in.
///
/// # Errors
/// When the socket can not be made; an existing one is replaced.
pub fn listen_unix(path: &Path) -> io::Result<Incoming> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let (control_sender, control) = mpsc::channel(BACKLOG);
    let (streams_sender, streams) = mpsc::channel(BACKLOG);
    task::spawn(accept_unix(listener, control_sender, streams_sender));
    Ok(Incoming { control, streams })
}

async fn accept_vsock(listener: VsockListener, sender: mpsc::Sender<Connection>) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                if sender.send(Connection::new(stream)).await.is_err() {
                    return;
                }
            }
            Ok((_, peer)) => warn!(cid = peer.cid(), "refused a vsock connection from inside the guest"),
            Err(error) => accept_failed(&error).await,
        }
    }
}

async fn accept_unix(
    listener: UnixListener,
    control: mpsc::Sender<Connection>,
    streams: mpsc::Sender<Connection>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (control, streams) = (control.clone(), streams.clone());
                task::spawn(async move {
                    if let Err(error) = route_unix(stream, &control, &streams).await {
                        debug!(%error, "refused a connection");
                    }
                });
            }
            Err(error) => accept_failed(&error).await,
        }
    }
}

async fn route_unix(
    mut stream: UnixStream,
    control: &mpsc::Sender<Connection>,
    streams: &mpsc::Sender<Connection>,
) -> io::Result<()> {
    if stream.peer_cred()?.uid() != geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let port = connect::accept(&mut stream).await?;
    let sender = match port {
        ports::CONTROL => control,
        ports::STREAMS => streams,
        _ => return Err(io::ErrorKind::ConnectionRefused.into()),
    };
    connect::accepted(&mut stream, port).await?;
    sender.send(Connection::new(stream)).await.map_err(|_| io::ErrorKind::ConnectionAborted.into())
}

/// Out of descriptors or memory: let others finish instead of spinning.
async fn accept_failed(error: &io::Error) {
    warn!(%error, "accept failed");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}
