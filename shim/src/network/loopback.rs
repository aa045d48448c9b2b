//! The pod's loopback, seen from the host.
//!
//! What wants to reach a port of the pod's own (a kubelet's port-forward) enters its namespace and connects to `localhost`.
//! Nobody listens there: the pod's processes are in the guest. So one socket takes all such connections, and the agent
//! connects each to the same port in the guest. No frame of the network comes here, as those all go to the guest's card.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use caisson_protocol::client::{Client, call};
use caisson_protocol::connect::UnixVsock;
use caisson_protocol::v1;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::NetworkError;
use super::bpf::Steering;
use super::namespace::Namespace;

/// Connections at a time; more wait.
const CONNECTIONS: usize = 64;
/// How long to wait after one could not be taken: there are no descriptors left, say.
const RECOVER: Duration = Duration::from_millis(200);

/// All TCP connections that are made inside a pod's namespace, for somebody who takes them.
#[derive(Debug)]
pub struct Loopback {
    listener: TcpListener,
    steering: Steering,
}

impl Loopback {
    /// Listens in the namespace.
    pub(super) fn listen(namespace: &Namespace) -> Result<Loopback, NetworkError> {
        namespace.within(async || {
            let listen = || {
                // Of both families, where the node has both.
                let listener = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
                    .or_else(|_| TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))))?;
                listener.set_nonblocking(true)?;
                let steering = Steering::start(namespace.as_fd(), listener.as_fd())?;
                Ok(Loopback { listener, steering })
            };
            listen().map_err(NetworkError::Loopback)
        })
    }

    /// Where they arrive, for tests.
    #[cfg(test)]
    pub(super) fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// Connects whoever comes to the guest's loopback, until the task is aborted.
    ///
    /// # Errors
    /// When the socket can't be waited on.
    pub fn forward(self, agent: Client<UnixVsock>) -> std::io::Result<JoinHandle<()>> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let steering = self.steering;
        Ok(tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(CONNECTIONS));
            while let Ok(place) = places.clone().acquire_owned().await {
                let connection = match listener.accept().await {
                    Ok((connection, _)) => connection,
                    Err(error) => {
                        tracing::warn!(%error, "take a connection to the pod's loopback");
                        tokio::time::sleep(RECOVER).await;
                        continue;
                    }
                };
                let agent = agent.clone();
                tokio::spawn(async move {
                    if let Err(error) = connect(connection, agent).await {
                        tracing::debug!(error = %error, "a connection to the pod's loopback");
                    }
                    drop(place);
                });
            }
            drop(steering);
        }))
    }
}

/// Why a connection did not come to be, or ended; for the log alone.
type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn connect(mut connection: TcpStream, agent: Client<UnixVsock>) -> Result<(), Failure> {
    // The socket's own address is the one that was asked for.
    let port = connection.local_addr()?.port().into();
    let request = v1::PortForwardRequest { port, address: String::new() };
    let connected = async {
        let stream = agent.transfers().port_forward(call(request)).await?.into_inner().stream;
        Ok::<_, Failure>(agent.stream(stream).await?)
    };
    let mut stream = match connected.await {
        Ok(stream) => stream,
        Err(error) => {
            // As if nobody had listened.
            connection.set_zero_linger()?;
            return Err(error);
        }
    };
    tokio::io::copy_bidirectional(&mut connection, &mut stream).await?;
    Ok(())
}
