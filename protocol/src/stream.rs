//! Byte streams: one connection each, opened by the host.
//!
//! ```text
//! host → agent   magic "CSTR" (4 bytes) · version u16 · reserved u16 = 0 · stream id u64      (little endian)
//! agent → host   status u8: 0 = attached, else a [`Refusal`], and the agent closes
//! then           the stream's bytes, unframed
//! ```
//!
//! - *Direction.* stdin carries bytes to the agent; stdout and stderr to the host; a terminal, a port-forward and
//!   nothing else both ways; a copy in the copy's direction.
//! - *End of data* is a half-close (`shutdown(SHUT_WR)`) by the writing side. On stdin it closes the process's
//!   stdin. On a terminal it does nothing: a terminal has no end of file, the host sends `^D`.
//! - *Back-pressure* is the transport's: who does not read stops the writer. The agent buffers at most 64 KiB.
//! - *Detach.* A connection that breaks without a half-close leaves its stream open, and it can be connected to
//!   again; bytes which were in the broken connection are lost. One connection at a time. A host that half-closes
//!   an output stream detaches from it.
//! - *Exit.* The exit of a process is reported after the last byte of its output was written to its connection.
//!   An output that nobody takes delays the report by [`DRAIN_TIMEOUT`](crate::limits::DRAIN_TIMEOUT) at most,
//!   and is then reported as incomplete. Streams end with end of data after the process's last descriptor closes.

use std::io;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::limits::HANDSHAKE_TIMEOUT;

/// First bytes of every stream connection.
pub const MAGIC: [u8; 4] = *b"CSTR";
/// Version of the handshake.
pub const VERSION: u16 = 1;
/// Bytes of a [`Hello`].
pub const HELLO_SIZE: usize = 16;
/// The status byte of an accepted connection.
const ATTACHED: u8 = 0;

/// What the host opens a stream connection with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// As issued by the reply of the verb that made the stream; never 0.
    pub stream: u64,
}

/// Why the agent refused a connection.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// The connection did not begin with a well-formed hello.
    #[error("the agent did not understand the stream handshake")]
    Malformed = 1,
    /// The agent speaks another version of the handshake.
    #[error("the agent speaks another version of the stream handshake")]
    Version = 2,
    /// No such stream, or it has ended.
    #[error("the stream does not exist or has ended")]
    NotFound = 3,
    /// Another connection is attached.
    #[error("the stream has a connection already")]
    Busy = 4,
    /// Too many connections.
    #[error("the agent has too many stream connections")]
    Exhausted = 5,
}

/// Why a stream could not be attached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The transport failed or ended.
    #[error("stream connection failed")]
    Io(#[from] io::Error),
    /// The agent said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The agent answered with a status that this version does not know.
    #[error("unknown stream status {0}")]
    UnknownStatus(u8),
    /// The peer did not finish the handshake in time.
    #[error("stream handshake timed out")]
    TimedOut,
}

impl Hello {
    /// The bytes on the wire.
    pub fn encode(self) -> [u8; HELLO_SIZE] {
        let mut bytes = [0; HELLO_SIZE];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..].copy_from_slice(&self.stream.to_le_bytes());
        bytes
    }

    /// # Errors
    /// The refusal to answer with.
    pub fn decode(bytes: &[u8; HELLO_SIZE]) -> Result<Hello, Refusal> {
        let [m0, m1, m2, m3, v0, v1, r0, r1, stream @ ..] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Refusal::Malformed);
        }
        if u16::from_le_bytes([v0, v1]) != VERSION {
            return Err(Refusal::Version);
        }
        let stream = u64::from_le_bytes(stream);
        if [r0, r1] != [0, 0] || stream == 0 {
            return Err(Refusal::Malformed);
        }
        Ok(Hello { stream })
    }
}

impl Refusal {
    fn from_status(status: u8) -> Option<Refusal> {
        [Refusal::Malformed, Refusal::Version, Refusal::NotFound, Refusal::Busy, Refusal::Exhausted]
            .into_iter()
            .find(|&refusal| refusal as u8 == status)
    }
}

/// The host's side: attaches a fresh connection to a stream.
///
/// # Errors
/// When the agent refuses, or does not answer in time.
pub async fn attach<S>(connection: &mut S, stream: u64) -> Result<(), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = async {
        connection.write_all(&Hello { stream }.encode()).await?;
        connection.flush().await?;
        match connection.read_u8().await? {
            ATTACHED => Ok(()),
            status => Err(match Refusal::from_status(status) {
                Some(refusal) => refusal.into(),
                None => HandshakeError::UnknownStatus(status),
            }),
        }
    };
    tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.unwrap_or(Err(HandshakeError::TimedOut))
}

/// The agent's side: reads which stream a fresh connection wants. Follow with [`answer`].
///
/// # Errors
/// When the hello does not come in time or is refused; the refusal was sent then.
pub async fn accept<S>(connection: &mut S) -> Result<Hello, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = async {
        let mut bytes = [0; HELLO_SIZE];
        connection.read_exact(&mut bytes).await?;
        match Hello::decode(&bytes) {
            Ok(hello) => Ok(hello),
            Err(refusal) => {
                answer(connection, Err(refusal)).await?;
                Err(refusal.into())
            }
        }
    };
    tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.unwrap_or(Err(HandshakeError::TimedOut))
}

/// The agent's side: the status byte.
///
/// # Errors
/// When the transport fails.
pub async fn answer<S>(connection: &mut S, result: Result<(), Refusal>) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let status = result.map_or_else(|refusal| refusal as u8, |()| ATTACHED);
    connection.write_all(&[status]).await?;
    connection.flush().await
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::*;

    #[test]
    fn hello_has_the_documented_layout() {
        let bytes = Hello { stream: 0x0102_0304_0506_0708 }.encode();
        assert_eq!(bytes, *b"CSTR\x01\x00\x00\x00\x08\x07\x06\x05\x04\x03\x02\x01");
    }

    #[test]
    fn wrong_hellos_are_told_apart() {
        let good = Hello { stream: 9 }.encode();
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            Hello::decode(&bytes)
        };
        assert_eq!(with(0, b'X'), Err(Refusal::Malformed));
        assert_eq!(with(4, 2), Err(Refusal::Version));
        assert_eq!(with(6, 1), Err(Refusal::Malformed));
        assert_eq!(with(8, 0), Err(Refusal::Malformed), "stream 0 is never issued");
    }

    proptest! {
        #[test]
        fn every_stream_id_survives(stream in 1u64..) {
            prop_assert_eq!(Hello::decode(&Hello { stream }.encode()), Ok(Hello { stream }));
        }

        #[test]
        fn what_decodes_is_canonical(bytes: [u8; HELLO_SIZE]) {
            if let Ok(hello) = Hello::decode(&bytes) {
                prop_assert_eq!(hello.encode(), bytes);
            }
        }

        #[test]
        fn a_near_miss_decodes_to_itself_or_not_at_all(stream in 1u64.., at in 0..HELLO_SIZE, byte: u8) {
            let mut bytes = Hello { stream }.encode();
            bytes[at] = byte;
            if let Ok(hello) = Hello::decode(&bytes) {
                prop_assert_eq!(hello.encode(), bytes);
            }
        }
    }

    #[tokio::test]
    async fn both_sides_agree() {
        let (mut host, mut agent) = duplex(64);
        let agent_side = async {
            let hello = accept(&mut agent).await.unwrap();
            answer(&mut agent, Ok(())).await.unwrap();
            hello.stream
        };
        let (attached, stream) = tokio::join!(attach(&mut host, 77), agent_side);
        attached.unwrap();
        assert_eq!(stream, 77);
    }

    #[tokio::test]
    async fn every_refusal_reaches_the_host() {
        for refusal in
            [Refusal::Malformed, Refusal::Version, Refusal::NotFound, Refusal::Busy, Refusal::Exhausted]
        {
            let (mut host, mut agent) = duplex(64);
            answer(&mut agent, Err(refusal)).await.unwrap();
            match attach(&mut host, 1).await {
                Err(HandshakeError::Refused(seen)) => assert_eq!(seen, refusal),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn an_agent_that_hangs_up_is_an_error() {
        let (mut host, agent) = duplex(64);
        drop(agent);
        assert!(matches!(attach(&mut host, 1).await, Err(HandshakeError::Io(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up() {
        let (mut host, mut agent) = duplex(64);
        assert!(matches!(accept(&mut agent).await, Err(HandshakeError::TimedOut)));
        assert!(matches!(attach(&mut host, 1).await, Err(HandshakeError::TimedOut)));
    }
}
