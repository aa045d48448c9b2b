//! The streams that CRI serves beside its calls: what `kubectl exec`, `attach` and `port-forward` end in.
//!
//! They come over WebSocket in the kubelet's protocol `v4.channel.k8s.io`: each message begins with the number of a
//! channel.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest},
};

/// What the process reads.
pub const STDIN: u8 = 0;
/// What it writes; all of it, when it has a terminal.
pub const STDOUT: u8 = 1;
/// What it writes as errors.
pub const STDERR: u8 = 2;
/// How it ended: a Kubernetes `Status` in JSON.
pub const STATUS: u8 = 3;
/// The terminal's size: `{"Width": 80, "Height": 24}`.
pub const RESIZE: u8 = 4;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// How long an expected message may take, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An open connection.
#[derive(Debug)]
pub struct Streams {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    received: BTreeMap<u8, Vec<u8>>,
}

impl Streams {
    /// Opens what a call of CRI answered with.
    ///
    /// # Errors
    /// When nobody serves it, or not by this protocol.
    pub async fn open(url: &str) -> Result<Self> {
        let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
        let opened = timeout(PATIENCE, connect_async(request)).await.context("opening the streams")?;
        let (socket, _) = opened.with_context(|| format!("opening {url}"))?;
        Ok(Self { socket, received: BTreeMap::new() })
    }

    /// Sends bytes on a channel.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::Binary(message.into())).await.context("sending")
    }

    /// What has come on a channel so far.
    pub fn received(&self, channel: u8) -> &[u8] {
        self.received.get(&channel).map_or(&[], Vec::as_slice)
    }

    /// The same as text.
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.received(channel)).into_owned()
    }

    /// Waits until a channel has brought this text.
    ///
    /// # Errors
    /// When the streams end without it.
    pub async fn expect(&mut self, channel: u8, text: &str) -> Result<()> {
        while !self.text(channel).contains(text) {
            ensure!(self.next().await?, "no {text:?} in {:?}", self.received);
        }
        Ok(())
    }

    /// Waits until so many bytes have come on a channel.
    ///
    /// # Errors
    /// When the streams end before.
    pub async fn expect_bytes(&mut self, channel: u8, count: usize) -> Result<()> {
        while self.received(channel).len() < count {
            ensure!(self.next().await?, "{} bytes of {count}", self.received(channel).len());
        }
        Ok(())
    }

    /// Waits for the streams' end, and returns the process's exit code.
    ///
    /// # Errors
    /// When the end does not tell.
    pub async fn exit_code(&mut self) -> Result<i32> {
        while self.next().await? {}
        let text = self.text(STATUS);
        let status: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("status {text:?}"))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let causes = status["details"]["causes"].as_array().into_iter().flatten();
        let mut codes = causes.filter(|cause| cause["reason"] == "ExitCode");
        let code = codes.next().and_then(|cause| cause["message"].as_str()).with_context(|| text.clone())?;
        Ok(code.parse()?)
    }

    /// Waits for one more message; whether there was one.
    async fn next(&mut self) -> Result<bool> {
        let waited = timeout(PATIENCE, self.socket.next()).await;
        match waited.with_context(|| format!("nothing more than {:?}", self.received))? {
            None | Some(Ok(Message::Close(_)) | Err(_)) => Ok(false),
            Some(Ok(Message::Binary(bytes))) => {
                let Some((channel, rest)) = bytes.split_first() else { bail!("a message without a channel") };
                self.received.entry(*channel).or_default().extend(rest);
                Ok(true)
            }
            Some(Ok(_)) => Ok(true),
        }
    }
}
