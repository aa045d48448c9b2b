//! The gRPC services: thin layers that check a request, call the module that does the work, and name its error's
//! status code.

mod agent;
mod containers;
mod follow;
mod http;
mod machine;
mod network;
mod processes;
mod sandbox;
mod stats;
mod status;
mod storages;
mod transfers;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use caisson_protocol::server::Method;
use caisson_protocol::v1::agent_server::SERVICE_NAME as AGENT;
use caisson_protocol::v1::containers_server::SERVICE_NAME as CONTAINERS;
use caisson_protocol::v1::machine_server::SERVICE_NAME as MACHINE;
use caisson_protocol::v1::network_server::SERVICE_NAME as NETWORK;
use caisson_protocol::v1::sandbox_server::SERVICE_NAME as SANDBOX;
use caisson_protocol::v1::storages_server::SERVICE_NAME as STORAGES;
use caisson_protocol::v1::transfers_server::SERVICE_NAME as TRANSFERS;
use caisson_protocol::v1::{self as proto, Storage};
use futures_util::FutureExt;
use processes::Processes;
use thiserror::Error;
use tokio::sync::{RwLock, Semaphore, mpsc, watch};
use tonic::Status;
use tonic::body::Body;
use tracing::warn;

use crate::clock;
use crate::connection::Incoming;
use crate::container::{self, Config, Runtime};
use crate::init::CGROUP_ROOT;
use crate::pod::Pod;
use crate::state::{State, lock};
use crate::storage::Storages;
use crate::task;
use crate::transfer::Transfers;

/// Streams' handshakes at a time; who comes later waits.
const HANDSHAKES: usize = 256;

/// The agent can not serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Containers can not be run here.
    #[error("cannot run containers")]
    Runtime(#[from] container::Error),
}

/// Serves both ports until the state is closing, and then until the calls in flight have ended.
///
/// # Errors
/// When containers can not be run here.
pub async fn serve(state: Arc<State>, mut incoming: Incoming) -> Result<(), ServeError> {
    let (sender, events) = mpsc::unbounded_channel();
    let runtime = Runtime::new(container_config(&state), state.reaper.clone(), sender)?;
    let processes = Processes::new(state.clone());
    task::spawn(processes.clone().follow(events));
    state.listening_us.store(clock::boottime_us(), Ordering::Release);
    let streams = state.streams.clone();
    task::spawn(async move {
        let permits = Arc::new(Semaphore::new(HANDSHAKES));
        while let Some(connection) = incoming.streams.recv().await {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let streams = streams.clone();
            task::spawn(async move {
                streams.attach(connection).await;
                drop(permit);
            });
        }
    });
    let mut closing = state.closing.subscribe();
    let shared = Arc::new(Shared::new(state, runtime, processes));
    let ending = shared.clone();
    let (close, closed) = watch::channel(false);
    task::spawn(async move {
        // An error means that the state is gone, and with it the reason to serve.
        let _ = closing.wait_for(|&closing| closing).await;
        if !ending.state.is_init {
            // The end of a machine takes everything with it; on a machine of others nothing may stay.
            ending.remove_everything().await;
        }
        ending.state.emptied.send_replace(true);
        close.send_replace(true);
    });
    http::serve(Router::new(shared), incoming.control, closed).await;
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
    /// The one sandbox. Held while it is made or unmade, and shared while a container is made in it.
    pod: RwLock<Option<Arc<Pod>>>,
    storages: Arc<Storages>,
    transfers: Transfers,
    runtime: Runtime,
    processes: Processes,
    /// Ids of containers that are gone but for storages, which did not go.
    remains: Mutex<BTreeSet<String>>,
}

impl Shared {
    fn new(state: Arc<State>, runtime: Runtime, processes: Processes) -> Shared {
        let storages = Arc::new(Storages::new(&state.root));
        let (pod, transfers) = (RwLock::default(), Transfers::default());
        Shared { state, pod, storages, transfers, runtime, processes, remains: Mutex::default() }
    }

    /// Removes a container with its streams and storages. When the latter stay, it may be repeated.
    async fn remove_container(&self, id: &str, force: bool) -> Result<(), Status> {
        match self.runtime.remove(id, force).await {
            Err(container::Error::NoContainer(_)) if lock(&self.remains).contains(id) => {}
            removed => removed?,
        }
        if let Err(left) = self.unmount_all(Some(id.to_owned())).await {
            lock(&self.remains).insert(id.to_owned());
            return Err(Status::internal(left.message()));
        }
        lock(&self.remains).remove(id);
        // Last: it frees the id, which a new container's storages may be mounted for from now on.
        self.processes.forget_all(id);
        Ok(())
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
        let pod = self.pod.write().await.take();
        // Its end waits for its processes.
        let _ = task::blocking(move || drop(pod)).await;
        if let Err(error) = std::fs::remove_dir(container_config(&self.state).cgroup) {
            warn!(%error, "the control group stays");
        }
    }

    async fn pod(&self) -> Result<Arc<Pod>, Status> {
        let pod = self.pod.read().await.clone();
        pod.ok_or_else(no_sandbox)
    }

    async fn mount(&self, storage: Storage, owner: String) -> Result<PathBuf, Status> {
        let storages = self.storages.clone();
        blocking(move || storages.mount(&storage, &owner)).await
    }

    async fn unmount_all(&self, owner: Option<String>) -> Result<(), Status> {
        let (storages, all) = (self.storages.clone(), owner.is_none());
        blocking(move || storages.unmount_all(owner.as_deref())).await?;
        if all {
            let remains = std::mem::take(&mut *lock(&self.remains));
            remains.iter().for_each(|id| self.processes.forget_all(id));
        }
        Ok(())
    }

    fn resolv_conf(&self) -> PathBuf {
        self.state.root.join("resolv.conf")
    }

    /// The root directory of a container, as its processes see it.
    fn container_root(&self, id: &str) -> Result<OwnedFd, Status> {
        Ok(self.runtime.root(id)?)
    }
}

fn no_sandbox() -> Status {
    Status::failed_precondition("the guest has no sandbox")
}

/// Sends each call to its service by the path's first component, and to its method by the second.
#[derive(Clone)]
struct Router {
    state: Arc<State>,
    agent: Arc<agent::Service>,
    containers: Arc<containers::Service>,
    machine: Arc<machine::Service>,
    network: Arc<network::Service>,
    sandbox: Arc<sandbox::Service>,
    storages: Arc<storages::Service>,
    transfers: Arc<transfers::Service>,
}

impl Router {
    fn new(shared: Arc<Shared>) -> Router {
        let state = shared.state.clone();
        Router {
            containers: Arc::new(containers::Service(shared.clone())),
            agent: Arc::new(agent::Service::new(state.clone())),
            machine: Arc::new(machine::Service(shared.clone())),
            network: Arc::new(network::Service(shared.clone())),
            sandbox: Arc::new(sandbox::Service(shared.clone())),
            storages: Arc::new(storages::Service(shared.clone())),
            transfers: Arc::new(transfers::Service(shared)),
            state,
        }
    }

    fn find(&self, path: &str) -> Result<Method, Status> {
        let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
        let found = match service {
            AGENT => proto::agent_method(self.agent.clone(), method),
            CONTAINERS => proto::containers_method(self.containers.clone(), method),
            MACHINE => proto::machine_method(self.machine.clone(), method),
            NETWORK => proto::network_method(self.network.clone(), method),
            SANDBOX => proto::sandbox_method(self.sandbox.clone(), method),
            STORAGES => proto::storages_method(self.storages.clone(), method),
            TRANSFERS => proto::transfers_method(self.transfers.clone(), method),
            _ => return Err(Status::unimplemented(format!("no service {service:?}"))),
        };
        found.ok_or_else(|| Status::unimplemented(format!("{service} has no method {method:?}")))
    }

    /// Answers a call. A panic ends this call alone, and is told: the hook has recorded it.
    async fn call(&self, request: ::http::Request<Body>) -> ::http::Response<Body> {
        let path = request.uri().path().to_owned();
        let method = match self.find(&path) {
            Ok(method) => method,
            Err(status) => return status.into_http(),
        };
        AssertUnwindSafe(method.serve(request)).catch_unwind().await.unwrap_or_else(|_| {
            self.state.fault("service", format!("{path} panicked"));
            Status::internal("the agent's handler panicked").into_http()
        })
    }
}

/// Runs work that blocks off the reactor's thread.
async fn blocking<T, E, F>(work: F) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    task::blocking(work).await?.map_err(Into::into)
}
