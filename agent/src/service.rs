//! The gRPC services: thin layers that check a request, call the module that does the work, and name its error's
//! status code.

mod agent;
mod containers;
mod follow;
mod machine;
mod network;
mod processes;
mod sandbox;
mod stats;
mod status;
mod storages;
mod transfers;

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use caisson_protocol::limits;
use caisson_protocol::v1::Storage;
use caisson_protocol::v1::agent_server::{AgentServer, SERVICE_NAME as AGENT};
use caisson_protocol::v1::containers_server::{ContainersServer, SERVICE_NAME as CONTAINERS};
use caisson_protocol::v1::machine_server::{MachineServer, SERVICE_NAME as MACHINE};
use caisson_protocol::v1::network_server::{NetworkServer, SERVICE_NAME as NETWORK};
use caisson_protocol::v1::sandbox_server::{SERVICE_NAME as SANDBOX, SandboxServer};
use caisson_protocol::v1::storages_server::{SERVICE_NAME as STORAGES, StoragesServer};
use caisson_protocol::v1::transfers_server::{SERVICE_NAME as TRANSFERS, TransfersServer};
use futures_util::FutureExt;
use processes::Processes;
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::Server;
use tower::Service;
use tracing::warn;

use crate::clock;
use crate::connection::Incoming;
use crate::container::{self, Config, Runtime};
use crate::init::CGROUP_ROOT;
use crate::pod::Pod;
use crate::state::State;
use crate::storage::Storages;
use crate::transfer::Transfers;

/// The agent can not serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Containers can not be run here.
    #[error("cannot run containers")]
    Runtime(#[from] container::Error),
    /// The control connections failed.
    #[error("cannot serve control connections")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves both ports until the state is closing, and then until the calls in flight have ended.
///
/// # Errors
/// When containers can not be run here, or the transport under the control connections fails.
pub async fn serve(state: Arc<State>, mut incoming: Incoming) -> Result<(), ServeError> {
    let (sender, events) = mpsc::unbounded_channel();
    let runtime = Runtime::new(container_config(&state), state.reaper.clone(), sender)?;
    let processes = Processes::new(state.clone());
    tokio::spawn(processes.clone().follow(events));
    state.listening_us.store(clock::boottime_us(), Ordering::Release);
    let streams = state.streams.clone();
    tokio::spawn(async move {
        let permits = Arc::new(Semaphore::new(limits::MAX_STREAM_CONNECTIONS));
        while let Some(connection) = incoming.streams.recv().await {
            // Handshakes in flight are what is bounded here; streams themselves are bounded by who makes them.
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let streams = streams.clone();
            tokio::spawn(async move {
                streams.attach(connection).await;
                drop(permit);
            });
        }
    });
    let permits = Arc::new(Semaphore::new(limits::MAX_CONTROL_CONNECTIONS));
    let control = ReceiverStream::new(incoming.control).filter_map(move |connection| {
        let permit = permits.clone().try_acquire_owned();
        if permit.is_err() {
            warn!(limit = limits::MAX_CONTROL_CONNECTIONS, "closed a control connection: too many");
        }
        permit.ok().map(|permit| Ok::<_, Infallible>(connection.holding(permit)))
    });
    let mut closing = state.closing.subscribe();
    let shared = Arc::new(Shared::new(state, runtime, processes));
    let ending = shared.clone();
    let closed = async move {
        // An error means that the state is gone, and with it the reason to serve.
        let _ = closing.wait_for(|&closing| closing).await;
        if !ending.state.is_init {
            // The end of a machine takes everything with it; on a machine of others nothing may stay.
            ending.remove_everything().await;
        }
        ending.state.emptied.send_replace(true);
    };
    Server::builder()
        .max_concurrent_streams(limits::MAX_IN_FLIGHT)
        .http2_max_header_list_size(16 << 10)
        .serve_with_incoming_shutdown(Router::new(shared), control, closed)
        .await?;
    Ok(())
}

fn container_config(state: &State) -> Config {
    // Outside of a VM, others have groups there, and so may another agent.
    let name = if state.is_init { "pod".to_owned() } else { format!("caisson-agent-{}", std::process::id()) };
    Config { cgroup: Path::new(CGROUP_ROOT).join(name), helper: "/proc/self/exe".into() }
}

/// What the services work on.
struct Shared {
    state: Arc<State>,
    /// The one sandbox. Held while it is made or unmade.
    pod: tokio::sync::Mutex<Option<Arc<Pod>>>,
    storages: Arc<Storages>,
    transfers: Transfers,
    runtime: Runtime,
    processes: Processes,
}

impl Shared {
    fn new(state: Arc<State>, runtime: Runtime, processes: Processes) -> Shared {
        let storages = Arc::new(Storages::new(&state.root));
        let (pod, transfers) = (tokio::sync::Mutex::default(), Transfers::default());
        Shared { state, pod, storages, transfers, runtime, processes }
    }

    /// Removes a container with its streams and storages.
    async fn remove_container(&self, id: &str, force: bool) -> Result<(), Status> {
        self.runtime.remove(id, force).await?;
        self.processes.forget_all(id);
        self.unmount_all(Some(id.to_owned())).await
    }

    /// Removes all containers, storages and namespaces, and the control group that they were in.
    async fn remove_everything(&self) {
        for container in self.runtime.list() {
            if let Err(error) = self.remove_container(&container.id, true).await {
                warn!(container = container.id, error = error.message(), "not removed");
            }
        }
        if let Err(error) = self.unmount_all(None).await {
            warn!(error = error.message(), "storages stay");
        }
        let pod = self.pod.lock().await.take();
        // Its end waits for its processes.
        let _ = tokio::task::spawn_blocking(move || drop(pod)).await;
        if let Err(error) = std::fs::remove_dir(container_config(&self.state).cgroup) {
            warn!(%error, "the control group stays");
        }
    }

    async fn pod(&self) -> Result<Arc<Pod>, Status> {
        let pod = self.pod.lock().await.clone();
        pod.ok_or_else(|| Status::failed_precondition("the guest has no sandbox"))
    }

    async fn mount(&self, storage: Storage, owner: String) -> Result<PathBuf, Status> {
        let storages = self.storages.clone();
        blocking(move || storages.mount(&storage, &owner)).await
    }

    async fn unmount_all(&self, owner: Option<String>) -> Result<(), Status> {
        let storages = self.storages.clone();
        blocking(move || storages.unmount_all(owner.as_deref())).await
    }

    fn resolv_conf(&self) -> PathBuf {
        self.state.root.join("resolv.conf")
    }

    /// The root directory of a container, as its processes see it.
    fn container_root(&self, id: &str) -> Result<OwnedFd, Status> {
        Ok(self.runtime.root(id)?)
    }
}

/// Sends each call to its service by the path's first component.
#[derive(Clone)]
struct Router {
    state: Arc<State>,
    agent: AgentServer<agent::Service>,
    containers: ContainersServer<containers::Service>,
    machine: MachineServer<machine::Service>,
    network: NetworkServer<network::Service>,
    sandbox: SandboxServer<sandbox::Service>,
    storages: StoragesServer<storages::Service>,
    transfers: TransfersServer<transfers::Service>,
}

macro_rules! server {
    ($server:ident, $service:expr) => {
        $server::new($service)
            .max_decoding_message_size(limits::MAX_MESSAGE)
            .max_encoding_message_size(limits::MAX_MESSAGE)
    };
}

impl Router {
    fn new(shared: Arc<Shared>) -> Router {
        let state = shared.state.clone();
        Router {
            containers: server!(ContainersServer, containers::Service(shared.clone())),
            agent: server!(AgentServer, agent::Service::new(state.clone())),
            machine: server!(MachineServer, machine::Service(shared.clone())),
            network: server!(NetworkServer, network::Service(shared.clone())),
            sandbox: server!(SandboxServer, sandbox::Service(shared.clone())),
            storages: server!(StoragesServer, storages::Service(shared.clone())),
            transfers: server!(TransfersServer, transfers::Service(shared)),
            state,
        }
    }
}

impl Service<http::Request<Body>> for Router {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let service = path.split('/').nth(1).unwrap_or_default();
        let call: Self::Future = match service {
            AGENT => Box::pin(self.agent.call(request)),
            CONTAINERS => Box::pin(self.containers.call(request)),
            MACHINE => Box::pin(self.machine.call(request)),
            NETWORK => Box::pin(self.network.call(request)),
            SANDBOX => Box::pin(self.sandbox.call(request)),
            STORAGES => Box::pin(self.storages.call(request)),
            TRANSFERS => Box::pin(self.transfers.call(request)),
            _ => {
                let unknown = Status::unimplemented(format!("no service {service:?}"));
                return Box::pin(std::future::ready(Ok(unknown.into_http())));
            }
        };
        let state = self.state.clone();
        // A panic ends this call alone, and is told: the hook has recorded it.
        Box::pin(AssertUnwindSafe(call).catch_unwind().map(move |result| {
            result.unwrap_or_else(|_| {
                state.fault("service", format!("{path} panicked"));
                Ok(Status::internal("the agent's handler panicked").into_http())
            })
        }))
    }
}

/// Runs blocking work (mounts, sysfs, namespaces) off the reactor's thread.
async fn blocking<T, E, F>(work: F) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Status::internal("the agent's worker panicked")),
    }
}
