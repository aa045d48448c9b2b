//! How the host reaches the agent's ports.
//!
//! The VMM's vsock device is backed by a unix socket: the host connects to it, writes `CONNECT <port>\n`, reads
//! `OK <number>\n`, and from then on talks to whoever listens on that port in the guest. An agent that runs outside
//! of a VM speaks the same on its socket, so [`UnixVsock`] reaches both.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::limits::HANDSHAKE_TIMEOUT;

/// The longest line of the handshake, either way, with its newline.
pub const MAX_LINE: usize = 32;

/// Opens connections to vsock ports of one agent.
pub trait Connect: Clone + Send + Sync + 'static {
    /// A connection. Dropping it closes it; `shutdown` half-closes it.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// # Errors
    /// When nobody listens on `port`.
    fn connect(&self, port: u32) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

/// Connects through the unix socket behind a vsock device.
#[derive(Clone, Debug)]
pub struct UnixVsock {
    path: PathBuf,
}

impl UnixVsock {
    /// `path`: the socket. Nothing is opened yet.
    pub fn new(path: impl AsRef<Path>) -> UnixVsock {
        UnixVsock { path: path.as_ref().to_owned() }
    }
}

impl Connect for UnixVsock {
    type Io = UnixStream;

    async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let handshake = async {
            let mut stream = UnixStream::connect(&self.path).await?;
            stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
            let line = read_line(&mut stream).await?;
            if line.starts_with("OK ") {
                Ok(stream)
            } else {
                Err(io::Error::new(io::ErrorKind::ConnectionRefused, format!("vsock port {port}: {line:?}")))
            }
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await?
    }
}

/// The listening side: reads `CONNECT <port>\n`. Answer with [`accepted`], or drop the connection.
///
/// # Errors
/// When the peer sends anything else, or takes too long.
pub async fn accept<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<u32> {
    let line = tokio::time::timeout(HANDSHAKE_TIMEOUT, read_line(stream)).await??;
    line.strip_prefix("CONNECT ")
        .and_then(|port| port.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not a CONNECT line: {line:?}")))
}

/// The listening side: answers a [`accept`]ed connection.
///
/// # Errors
/// When the transport fails.
pub async fn accepted<S: AsyncWrite + Unpin>(stream: &mut S, port: u32) -> io::Result<()> {
    stream.write_all(format!("OK {port}\n").as_bytes()).await
}

/// One line without its newline. Byte by byte, because what follows belongs to someone else.
async fn read_line<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<String> {
    let mut line = Vec::with_capacity(MAX_LINE);
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            _ if line.len() + 1 >= MAX_LINE => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "handshake line too long"));
            }
            byte => line.push(byte),
        }
    }
    String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "handshake is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::duplex;
    use tokio::net::UnixListener;

    use super::*;

    async fn accept_bytes(bytes: &[u8]) -> io::Result<u32> {
        let (mut host, mut agent) = duplex(256);
        host.write_all(bytes).await.unwrap();
        drop(host);
        accept(&mut agent).await
    }

    #[tokio::test]
    async fn connects_and_leaves_what_follows_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let port = accept(&mut stream).await.unwrap();
            stream.write_all(format!("OK {port}\nrest").as_bytes()).await.unwrap();
            port
        };
        let connector = UnixVsock::new(&path);
        let (stream, port) = tokio::join!(connector.connect(1025), agent);
        let mut rest = String::new();
        stream.unwrap().read_to_string(&mut rest).await.unwrap();
        assert_eq!((port, rest.as_str()), (1025, "rest"));
    }

    #[tokio::test]
    async fn a_port_without_listener_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = async { drop(listener.accept().await.unwrap()) };
        let connector = UnixVsock::new(&path);
        let (stream, ()) = tokio::join!(connector.connect(7), agent);
        assert!(stream.is_err());
    }

    #[tokio::test]
    async fn odd_lines_are_refused() {
        for line in ["CONNECT \n", "CONNECT x\n", "connect 1\n", "CONNECT 4294967296\n", "CONNECT 1", "\n"] {
            assert!(accept_bytes(line.as_bytes()).await.is_err(), "{line:?}");
        }
        assert!(accept_bytes(&[b'C'; 200]).await.is_err());
        assert_eq!(accept_bytes(b"CONNECT 4294967295\n").await.unwrap(), u32::MAX);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _ = runtime.block_on(accept_bytes(&bytes));
        }
    }
}
