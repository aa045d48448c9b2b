//! The `Sandbox` service: the pod's life.

use std::sync::Arc;
use std::time::Duration;

use caisson_protocol::v1::{self as proto, sandbox_server};
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Response, Status};

use super::{Shared, blocking};
use crate::guest::{identity, processors};
use crate::network;
use crate::pod::{self, Pod};
use crate::state::Shutdown;
use crate::storage::check_id;
use crate::task;

/// The longest grace that a shutdown may ask for: ten minutes.
const MAX_GRACE_MS: u32 = 600_000;

/// How long killed processes may take to end when a sandbox is destroyed, unless the call says otherwise.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl sandbox_server::Sandbox for Service {
    async fn create_sandbox(
        &self,
        request: Request<proto::CreateSandboxRequest>,
    ) -> Result<Response<proto::CreateSandboxResponse>, Status> {
        self.0.state.accepting()?;
        let request = request.into_inner();
        check_id(&request.id)?;
        if !request.hostname.is_empty() {
            identity::check_hostname(&request.hostname)?;
        }
        // Cancelled calls must not leave half a pod: the work goes on in a task of its own.
        let shared = self.0.clone();
        let created = task::detached(async move {
            let mut pod = shared.pod.write().await;
            if pod.is_some() {
                return Err(Status::already_exists("the guest has a sandbox"));
            }
            match create(&shared, &request).await {
                Ok((made, reply)) => {
                    *pod = Some(Arc::new(made));
                    Ok(reply)
                }
                Err(error) => {
                    if let Err(left) = shared.unmount_all(None).await {
                        shared.state.fault("sandbox", format!("undo: {}", left.message()));
                    }
                    Err(error)
                }
            }
        });
        created.await?.map(Response::new)
    }

    async fn destroy_sandbox(
        &self,
        request: Request<proto::DestroySandboxRequest>,
    ) -> Result<Response<proto::DestroySandboxResponse>, Status> {
        let limit = match request.into_inner().timeout_ms {
            0 => DESTROY_TIMEOUT,
            milliseconds => Duration::from_millis(milliseconds.into()),
        };
        let shared = self.0.clone();
        let destroyed = task::detached(async move {
            let deadline = Instant::now() + limit;
            let late = |what: &str| Status::deadline_exceeded(format!("{what} for {limit:?}"));
            let locked = timeout_at(deadline, shared.pod.write()).await;
            let mut pod = locked.map_err(|_| late("a container is being made"))?;
            for container in shared.runtime.list() {
                let removed = timeout_at(deadline, shared.remove_container(&container.id, true)).await;
                removed.map_err(|_| late(&format!("{} survives SIGKILL", container.id)))??;
            }
            shared.unmount_all(None).await?;
            if let Some(pod) = pod.take() {
                task::blocking(move || drop(pod)).await?;
                let resolv_conf = shared.resolv_conf();
                let _ = std::fs::remove_file(resolv_conf);
            }
            Ok(proto::DestroySandboxResponse {})
        });
        destroyed.await?.map(Response::new)
    }

    async fn shutdown(
        &self,
        request: Request<proto::ShutdownRequest>,
    ) -> Result<Response<proto::ShutdownResponse>, Status> {
        self.0.state.accepting()?;
        let request = request.into_inner();
        if request.grace_ms > MAX_GRACE_MS {
            return Err(Status::invalid_argument(format!("grace_ms: more than {MAX_GRACE_MS}")));
        }
        let how = Shutdown { reboot: request.reboot, grace_ms: request.grace_ms };
        // The connection is closed only when the calls in flight, this one too, have their replies.
        self.0.state.shutdown.send_replace(Some(how));
        Ok(Response::new(proto::ShutdownResponse {}))
    }
}

/// On an error the pod that was made is dropped, and with it its namespaces; storages are the caller's to undo.
async fn create(
    shared: &Arc<Shared>,
    request: &proto::CreateSandboxRequest,
) -> Result<(Pod, proto::CreateSandboxResponse), Status> {
    shared.state.restrict(&request.policy.unwrap_or_default());
    if request.online_cpus != 0 {
        let count = request.online_cpus;
        blocking(move || processors::set_online(count)).await?;
    }
    let (root, id) = (shared.state.root.clone(), request.id.clone());
    let mut pod = blocking(move || Pod::create(&root, &id)).await?;
    if request.share_pid_namespace {
        let init = pod::init::spawn(&pod, shared.runtime.helper(), &shared.state.reaper)
            .await
            .map_err(|error| Status::internal(format!("start the pod's init: {error}")))?;
        pod.adopt(init)?;
    }
    pod.set_names(&request.hostname, &request.domainname)?;
    let config = request.network.clone().unwrap_or_default();
    let pod = blocking(move || network::apply(pod.network(), &config).map(|()| pod)).await?;
    // After the network: a parameter may be an interface's.
    pod.set_sysctls(&request.sysctls)?;
    let mut resolv_conf = String::new();
    if let Some(dns) = &request.dns {
        network::write_resolv_conf(&shared.resolv_conf(), dns)?;
        resolv_conf = shared.resolv_conf().to_string_lossy().into_owned();
    }
    for storage in request.storages.clone() {
        shared.mount(storage, String::new()).await?;
    }
    let path = |name: &str| pod.namespace(name).to_string_lossy().into_owned();
    let reply = proto::CreateSandboxResponse {
        network_namespace: path("net"),
        ipc_namespace: path("ipc"),
        uts_namespace: path("uts"),
        pid_namespace: if request.share_pid_namespace { path("pid") } else { String::new() },
        resolv_conf,
    };
    Ok((pod, reply))
}
