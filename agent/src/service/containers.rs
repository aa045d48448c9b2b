//! The `Containers` service.

use std::sync::Arc;

use caisson_protocol::v1::{self as proto, containers_server, event};
use tonic::{Request, Response, Status};

use super::{Shared, blocking, no_sandbox, stats};
use crate::container::{self, CreateRequest, ExecRequest};
use crate::oci;
use crate::task;

#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl containers_server::Containers for Service {
    async fn create_container(
        &self,
        request: Request<proto::CreateContainerRequest>,
    ) -> Result<Response<proto::CreateContainerResponse>, Status> {
        self.0.state.accepting()?;
        let (shared, request) = (self.0.clone(), request.into_inner());
        detached(async move {
            // Held: the sandbox's end waits, and then finds the container.
            let pod = shared.pod.read().await;
            pod.as_ref().ok_or_else(no_sandbox)?;
            let id = request.id.clone();
            // Taken at once: a second create of the same id must not undo the first one's storages.
            let created = create(&shared, request).await;
            created.inspect_err(|_| tracing::debug!(container = id, "not created"))
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<proto::StartContainerRequest>,
    ) -> Result<Response<proto::StartContainerResponse>, Status> {
        self.0.state.accepting()?;
        self.0.runtime.start(&request.into_inner().container_id).await?;
        Ok(Response::new(proto::StartContainerResponse {}))
    }

    async fn exec(
        &self,
        request: Request<proto::ExecRequest>,
    ) -> Result<Response<proto::ExecResponse>, Status> {
        self.0.state.accepting()?;
        if self.0.state.policy().deny_exec {
            return Err(Status::permission_denied("exec is turned off by the node's policy"));
        }
        let (shared, request) = (self.0.clone(), request.into_inner());
        detached(async move { exec(&shared, request).await }).await
    }

    async fn signal(
        &self,
        request: Request<proto::SignalRequest>,
    ) -> Result<Response<proto::SignalResponse>, Status> {
        let request = request.into_inner();
        let signal = i32::try_from(request.signal).map_err(|_| Status::invalid_argument("signal"))?;
        if request.all && !request.exec_id.is_empty() {
            return Err(Status::invalid_argument("all: an exec is one process, not the container's all"));
        }
        self.0.runtime.signal(&request.container_id, &request.exec_id, signal, request.all).await?;
        Ok(Response::new(proto::SignalResponse {}))
    }

    async fn wait(
        &self,
        request: Request<proto::WaitRequest>,
    ) -> Result<Response<proto::WaitResponse>, Status> {
        let request = request.into_inner();
        let status = self.0.processes.wait(&request.container_id, &request.exec_id).await?;
        Ok(Response::new(proto::WaitResponse { status: Some(status) }))
    }

    async fn delete_exec(
        &self,
        request: Request<proto::DeleteExecRequest>,
    ) -> Result<Response<proto::DeleteExecResponse>, Status> {
        let request = request.into_inner();
        self.0.runtime.delete_exec(&request.container_id, &request.exec_id)?;
        self.0.processes.forget(&request.container_id, &request.exec_id);
        Ok(Response::new(proto::DeleteExecResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<proto::RemoveContainerRequest>,
    ) -> Result<Response<proto::RemoveContainerResponse>, Status> {
        let (shared, request) = (self.0.clone(), request.into_inner());
        detached(async move {
            shared.remove_container(&request.container_id, request.force).await?;
            let storages = shared.storages.clone();
            blocking(move || storages.release(&request.released)).await?;
            Ok(proto::RemoveContainerResponse {})
        })
        .await
    }

    async fn resize_terminal(
        &self,
        request: Request<proto::ResizeTerminalRequest>,
    ) -> Result<Response<proto::ResizeTerminalResponse>, Status> {
        let request = request.into_inner();
        let size = |value: u32, field| u16::try_from(value).map_err(|_| Status::invalid_argument(field));
        let (width, height) = (size(request.width, "width")?, size(request.height, "height")?);
        self.0.runtime.resize(&request.container_id, &request.exec_id, width, height)?;
        Ok(Response::new(proto::ResizeTerminalResponse {}))
    }

    async fn close_stdin(
        &self,
        request: Request<proto::CloseStdinRequest>,
    ) -> Result<Response<proto::CloseStdinResponse>, Status> {
        let request = request.into_inner();
        self.0.processes.close_stdin(&request.container_id, &request.exec_id)?;
        Ok(Response::new(proto::CloseStdinResponse {}))
    }

    async fn update_container(
        &self,
        request: Request<proto::UpdateContainerRequest>,
    ) -> Result<Response<proto::UpdateContainerResponse>, Status> {
        let request = request.into_inner();
        let resources = oci::Resources::from_json(&request.resources)?;
        self.0.runtime.update(&request.container_id, resources).await?;
        Ok(Response::new(proto::UpdateContainerResponse {}))
    }

    async fn pause_container(
        &self,
        request: Request<proto::PauseContainerRequest>,
    ) -> Result<Response<proto::PauseContainerResponse>, Status> {
        let (shared, container_id) = (self.0.clone(), request.into_inner().container_id);
        detached(async move {
            shared.runtime.pause(&container_id).await?;
            shared.state.emit(event::Kind::Paused(proto::ContainerPaused { container_id }));
            Ok(proto::PauseContainerResponse {})
        })
        .await
    }

    async fn resume_container(
        &self,
        request: Request<proto::ResumeContainerRequest>,
    ) -> Result<Response<proto::ResumeContainerResponse>, Status> {
        let (shared, container_id) = (self.0.clone(), request.into_inner().container_id);
        detached(async move {
            shared.runtime.resume(&container_id).await?;
            shared.state.emit(event::Kind::Resumed(proto::ContainerResumed { container_id }));
            Ok(proto::ResumeContainerResponse {})
        })
        .await
    }

    async fn stats(
        &self,
        request: Request<proto::StatsRequest>,
    ) -> Result<Response<proto::StatsResponse>, Status> {
        let stats = self.0.runtime.stats(&request.into_inner().container_id)?;
        Ok(Response::new(stats::message(stats)))
    }

    async fn list_processes(
        &self,
        request: Request<proto::ListProcessesRequest>,
    ) -> Result<Response<proto::ListProcessesResponse>, Status> {
        let processes = self.0.runtime.processes(&request.into_inner().container_id)?;
        let message =
            |process: container::ProcessInfo| proto::ProcessInfo { pid: process.pid, exec_id: process.exec };
        let processes = processes.into_iter().map(message).collect();
        Ok(Response::new(proto::ListProcessesResponse { processes }))
    }

    async fn list_containers(
        &self,
        _: Request<proto::ListContainersRequest>,
    ) -> Result<Response<proto::ListContainersResponse>, Status> {
        let containers = self.0.runtime.list().into_iter().map(|info| self.info(info)).collect();
        Ok(Response::new(proto::ListContainersResponse { containers }))
    }
}

impl Service {
    fn info(&self, info: container::Info) -> proto::ContainerInfo {
        use proto::container_info::State;
        let state = match info.state {
            container::State::Created => State::Created,
            container::State::Running => State::Running,
            container::State::Paused => State::Paused,
            container::State::Stopped => State::Stopped,
        };
        proto::ContainerInfo {
            state: state.into(),
            pid: info.pid,
            exec_ids: info.execs,
            status: self.0.processes.status(&info.id, ""),
            annotations: info.annotations.into_iter().collect(),
            id: info.id,
        }
    }
}

async fn create(
    shared: &Arc<Shared>,
    request: proto::CreateContainerRequest,
) -> Result<proto::CreateContainerResponse, Status> {
    crate::storage::check_id(&request.id)?;
    let spec = oci::Document::spec(request.spec)?;
    let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
    let id = request.id;
    let selection = request.streams.unwrap_or_default();
    let streams = shared.processes.prepare(&id, "", &selection, terminal)?;
    let (stdio, ids, terminal) = streams.parts();
    let made = async {
        for storage in request.storages {
            shared.mount(storage, id.clone()).await?;
        }
        let (storages, storage) = (shared.storages.clone(), request.rootfs_storage);
        let mut rootfs = None;
        if !storage.is_empty() {
            rootfs = Some(blocking(move || storages.path(&storage)).await?);
        }
        let created = shared.runtime.create(CreateRequest { id: id.clone(), spec, rootfs, stdio }).await?;
        shared.processes.made(&id, "", terminal, created.terminal)?;
        Ok::<_, Status>(created.pid)
    };
    match made.await {
        Ok(pid) => Ok(proto::CreateContainerResponse { pid, streams: Some(ids) }),
        Err(error) => {
            if let Err(left) = shared.unmount_all(Some(id.clone())).await {
                shared.state.fault("containers", format!("undo: {}", left.message()));
            }
            shared.processes.forget(&id, "");
            Err(error)
        }
    }
}

async fn exec(shared: &Arc<Shared>, request: proto::ExecRequest) -> Result<proto::ExecResponse, Status> {
    crate::storage::check_id(&request.exec_id)?;
    let process = oci::Document::process(request.process)?;
    let (container, id) = (request.container_id, request.exec_id);
    let selection = request.streams.unwrap_or_default();
    let streams = shared.processes.prepare(&container, &id, &selection, process.terminal)?;
    let (stdio, ids, terminal) = streams.parts();
    let request = ExecRequest { container: container.clone(), id: id.clone(), process, stdio };
    let made = async {
        let created = shared.runtime.exec(request).await?;
        shared.processes.made(&container, &id, terminal, created.terminal)?;
        Ok::<_, Status>(created.pid)
    };
    match made.await {
        Ok(pid) => Ok(proto::ExecResponse { pid, streams: Some(ids) }),
        Err(error) => {
            shared.processes.forget(&container, &id);
            Err(error)
        }
    }
}

/// Runs what must not stop half-way when its call is cancelled.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    task::detached(work).await?.map(Response::new)
}
