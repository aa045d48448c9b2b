//! The host's end: typed clients of all services over one control connection, and stream connections.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use thiserror::Error;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::service_fn;

use crate::connect::Connect;
use crate::stream::{self, HandshakeError};
use crate::v1::agent_client::AgentClient;
use crate::v1::containers_client::ContainersClient;
use crate::v1::machine_client::MachineClient;
use crate::v1::network_client::NetworkClient;
use crate::v1::sandbox_client::SandboxClient;
use crate::v1::storages_client::StoragesClient;
use crate::v1::transfers_client::TransfersClient;
use crate::v1::{VersionRequest, VersionResponse};
use crate::{MAX_PROTOCOL, MIN_PROTOCOL, limits, ports};

/// Deadline of a call that has nothing to wait for.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the agent could not be reached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No control connection.
    #[error("cannot connect to the agent")]
    Connect(#[from] tonic::transport::Error),
    /// The agent refused the first call.
    #[error("the agent refused the version handshake")]
    Version(#[from] Status),
    /// The agent chose a version that was not offered.
    #[error("the agent chose protocol version {0}, which was not offered")]
    Protocol(u32),
}

/// Why a byte stream could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// No connection to the stream port.
    #[error("cannot connect to the agent's streams")]
    Connect(#[from] io::Error),
    /// The handshake failed.
    #[error("cannot attach to stream {stream}")]
    Attach {
        /// The stream's id.
        stream: u64,
        /// What went wrong.
        source: HandshakeError,
    },
}

/// A client of one agent. Clones share the connection, which is made again when it breaks.
#[derive(Clone, Debug)]
pub struct Client<C> {
    connector: C,
    channel: Channel,
    version: VersionResponse,
}

/// `message` with a deadline, which the agent gets to know.
pub fn with_deadline<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// `message` with the deadline of an ordinary call, [`CALL_TIMEOUT`].
pub fn call<T>(message: T) -> Request<T> {
    with_deadline(message, CALL_TIMEOUT)
}

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $client:ident;)*) => {
        $($(#[$doc])*
        pub fn $name(&self) -> $client<Channel> {
            $client::new(self.channel.clone())
                .max_decoding_message_size(limits::MAX_MESSAGE)
                .max_encoding_message_size(limits::MAX_MESSAGE)
        })*
    };
}

impl<C: Connect> Client<C> {
    /// Connects, and agrees with the agent on a protocol version.
    ///
    /// # Errors
    /// When the agent does not listen (yet), or has no version in common with this crate.
    pub async fn connect(connector: C) -> Result<Client<C>, ClientError> {
        let dial = connector.clone();
        let dial = service_fn(move |_| {
            let dial = dial.clone();
            async move { dial.connect(ports::CONTROL).await.map(TokioIo::new) }
        });
        // The name is never resolved: the connector ignores it.
        let channel = Endpoint::from_static("http://agent")
            .http2_max_header_list_size(16 << 10)
            .connect_timeout(limits::HANDSHAKE_TIMEOUT)
            .connect_with_connector(dial)
            .await?;
        let mut client = Client { connector, channel, version: VersionResponse::default() };
        let range = VersionRequest { min_protocol: MIN_PROTOCOL, max_protocol: MAX_PROTOCOL };
        client.version = client.agent().version(call(range)).await?.into_inner();
        if !(MIN_PROTOCOL..=MAX_PROTOCOL).contains(&client.version.protocol) {
            return Err(ClientError::Protocol(client.version.protocol));
        }
        Ok(client)
    }

    /// What the agent said of itself when the client connected.
    pub fn version(&self) -> &VersionResponse {
        &self.version
    }

    services! {
        /// The agent itself.
        agent: AgentClient;
        /// The pod.
        sandbox: SandboxClient;
        /// Containers and processes.
        containers: ContainersClient;
        /// The guest as a machine.
        machine: MachineClient;
        /// The pod's network.
        network: NetworkClient;
        /// File systems.
        storages: StoragesClient;
        /// Copies and port-forwards.
        transfers: TransfersClient;
    }

    /// Opens a connection to a byte stream; see [`stream`] for what its ends mean.
    ///
    /// # Errors
    /// When the agent can not be reached or refuses.
    pub async fn stream(&self, stream: u64) -> Result<C::Io, StreamError> {
        let mut connection = self.connector.connect(ports::STREAMS).await?;
        stream::attach(&mut connection, stream)
            .await
            .map_err(|source| StreamError::Attach { stream, source })?;
        Ok(connection)
    }
}
