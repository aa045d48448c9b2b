//! A process's standard streams: containerd's fifos on one side, the agent's stream connections on the other.
//!
//! Bytes are copied as they come, and only as fast as they are taken. An output is complete when the agent has ended
//! it *and* its last byte is in the fifo.
//!
//! Fifos for output are opened for reading as well: then the reader may go and come back (a containerd that restarts)
//! without anything getting lost, and a write never fails. The fifo for input has its end when its writer closes it,
//! or when containerd says so ([`Streams::close_input`]), whichever comes first; what is in it by then still goes through.
//! That of a terminal has no end but the latter: whoever types may go and come back, too.

mod pump;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caisson_protocol::client::{Client, StreamError};
use caisson_protocol::connect::UnixVsock;
use caisson_protocol::v1;
use tokio::io::AsyncRead;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use self::pump::{End, Sink, Source};

/// Where containerd wants a process's streams. Empty: nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// The fifo for input.
    pub stdin: String,
    /// The fifo, or a file, for output; with a terminal, all of it.
    pub stdout: String,
    /// The same for errors; never used with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Why streams can't be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// containerd's side.
    #[error("open {path:?}")]
    Open {
        /// What containerd named.
        path: PathBuf,
        /// Why it can't be opened.
        source: io::Error,
    },
    /// A URI of a kind that is not served.
    #[error("{0:?} is neither a path nor a file:// URI")]
    Scheme(String),
    /// The guest's side.
    #[error("attach to a stream in the guest")]
    Agent(#[from] StreamError),
}

impl Stdio {
    /// Which of the guest's streams are wanted.
    pub fn selection(&self) -> v1::StreamSelection {
        v1::StreamSelection {
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr.is_empty(),
        }
    }
}

/// The streams of a process, being copied. Dropping them stops that.
#[derive(Debug, Default)]
pub struct Streams {
    outputs: JoinSet<()>,
    /// Of each output, whether there is something that nobody takes.
    waiting: Vec<Arc<AtomicBool>>,
    input: Option<Input>,
}

/// The way in.
#[derive(Debug)]
struct Input {
    close: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Input {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Streams {
    /// Connects both sides and begins to copy.
    ///
    /// # Errors
    /// When a fifo can't be opened or the agent refuses.
    pub async fn connect(
        agent: &Client<UnixVsock>,
        ids: &v1::StreamIds,
        stdio: &Stdio,
    ) -> Result<Streams, ConnectError> {
        let mut streams = Streams::default();
        if ids.terminal != 0 {
            let (from, to) = agent.stream(ids.terminal).await?.into_split();
            if !stdio.stdin.is_empty() {
                streams.input = Some(Input::copy(&stdio.stdin, to, End::Detach)?);
            } else {
                // To drop it would be to half-close the connection.
                to.forget();
            }
            streams.copy_out(from, &stdio.stdout)?;
            return Ok(streams);
        }
        for (id, path) in [(ids.stdout, &stdio.stdout), (ids.stderr, &stdio.stderr)] {
            if id != 0 {
                let (from, to) = agent.stream(id).await?.into_split();
                to.forget();
                streams.copy_out(from, path)?;
            }
        }
        if ids.stdin != 0 {
            let (from, to) = agent.stream(ids.stdin).await?.into_split();
            drop(from);
            streams.input = Some(Input::copy(&stdio.stdin, to, End::Close)?);
        }
        Ok(streams)
    }

    fn copy_out(
        &mut self,
        from: impl AsyncRead + Unpin + Send + 'static,
        path: &str,
    ) -> Result<(), ConnectError> {
        let waits = Arc::new(AtomicBool::new(false));
        self.outputs.spawn(pump::output(from, Sink::open(path)?, waits.clone()));
        self.waiting.push(waits);
        Ok(())
    }

    /// Lets what is in the input's fifo by now through, and closes the process's input.
    pub fn close_input(&self) {
        if let Some(input) = &self.input {
            // Remembered, should the task be busy writing.
            input.close.notify_one();
        }
    }

    /// Waits until all output is where containerd wants it, and ends the input. Tells whether it got that far within
    /// `limit`.
    pub async fn finish(&mut self, limit: Duration) -> bool {
        self.input = None;
        let all = async { while self.outputs.join_next().await.is_some() {} };
        timeout(limit, all).await.is_ok()
    }

    /// Whether there is output that nobody takes. It goes where it belongs once somebody does.
    pub fn is_waiting(&self) -> bool {
        self.waiting.iter().any(|waits| waits.load(Ordering::Relaxed))
    }
}

impl Input {
    fn copy(from: &str, to: OwnedWriteHalf, end: End) -> Result<Input, ConnectError> {
        let (from, close) = (Source::open(from, end)?, Arc::new(Notify::new()));
        let task = tokio::spawn(pump::input(from, to, close.clone(), end));
        Ok(Input { close, task })
    }
}

#[cfg(test)]
impl Streams {
    /// One output, for tests of those who have streams.
    pub fn of_output(from: tokio::net::UnixStream, path: &str) -> Streams {
        let mut streams = Streams::default();
        streams.copy_out(from, path).unwrap();
        streams
    }
}
