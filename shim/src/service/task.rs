//! The task service: containerd's `containerd.task.v3.Task`, and v2, which has the same messages.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::Task;
use ttrpc::asynchronous::TtrpcContext;

use super::{detached, stats};
use crate::pod::container::{Container, NewContainer, NewExec};
use crate::pod::process::{self, Process};
use crate::pod::{Pod, PodError};
use crate::share::Mount;
use crate::streams::Stdio;
use crate::wire;

/// The service over one pod.
#[derive(Clone, Debug)]
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// The service over `pod`.
    pub fn new(pod: Arc<Pod>) -> TaskService {
        TaskService { pod }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.pod.clone();
        detached(async move {
            if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
                return Err(PodError::Unimplemented(
                    "a container can't be restored from a checkpoint".into(),
                ));
            }
            let pid = pod.create(new_container(request)).await?;
            Ok(CreateTaskResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = self.pod.clone();
        detached(async move {
            let pid = pod.start(&request.id, &request.exec_id).await?;
            Ok(StartResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod.clone();
        detached(async move {
            let (pid, exit) = pod.delete(&request.id, &request.exec_id).await?;
            Ok(DeleteResponse {
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(wire::timestamp(exit.at)),
                ..Default::default()
            })
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            let exec = NewExec {
                id: request.exec_id,
                process: request.spec.into_option().unwrap_or_default().value,
                stdio: Stdio {
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                    terminal: request.terminal,
                },
            };
            pod.exec(&request.id, exec)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let pod = self.pod.clone();
        detached(async move {
            let container = pod.container(&request.id)?;
            let process = container.process(&request.exec_id)?;
            Ok(state(&container, &process))
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let pod = self.pod.clone();
        let process = detached(async move { pod.container(&request.id)?.process(&request.exec_id) }).await?;
        let exit = process.wait().await;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(wire::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.kill(&request.id, &request.exec_id, request.signal, request.all).await?;
            Ok(Empty::default())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pod = self.pod.clone();
        detached(async move {
            // The one process that means something on this host. The guest's own numbers would be taken for others'.
            let pid = pod.container(&request.id)?.sandbox().machine().pid();
            let process = ProcessInfo { pid, ..Default::default() };
            Ok(PidsResponse { processes: vec![process], ..Default::default() })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.set_paused(&request.id, true).await?;
            Ok(Empty::default())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.set_paused(&request.id, false).await?;
            Ok(Empty::default())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let why = "a container can't be checkpointed by itself: its processes live in the pod's machine";
        detached(async move { Err(PodError::Unimplemented(why.into())) }).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            let container = pod.container(&request.id)?;
            container.resize(&request.exec_id, request.width, request.height).await?;
            Ok(Empty::default())
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            let process = pod.container(&request.id)?.process(&request.exec_id)?;
            if request.stdin {
                process.close_input().await;
            }
            Ok(Empty::default())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            let resources = request.resources.into_option().unwrap_or_default().value;
            pod.container(&request.id)?.update(&resources, &request.annotations).await?;
            Ok(Empty::default())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let pod = self.pod.clone();
        detached(async move {
            let stats = pod.container(&request.id)?.stats().await?;
            Ok(StatsResponse { stats: MessageField::some(stats::any(stats)?), ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Asked of a shim whose container may not be made yet, or is gone: the shim's own part is true all the same.
        let task_pid = match self.pod.container(&request.id) {
            Ok(container) => container.sandbox().machine().pid(),
            Err(_) => 0,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(async move {
            pod.shutdown(request.now).await;
            Ok(Empty::default())
        })
        .await
    }
}

fn new_container(request: CreateTaskRequest) -> NewContainer {
    let mount = |mount: containerd_shim_protos::api::Mount| Mount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    };
    NewContainer {
        id: request.id,
        bundle: request.bundle.into(),
        rootfs: request.rootfs.into_iter().map(mount).collect(),
        stdio: Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    }
}

fn state(container: &Container, process: &Process) -> StateResponse {
    let status = match process.status() {
        process::Status::Created => Status::CREATED,
        process::Status::Running if container.is_paused() => Status::PAUSED,
        process::Status::Running => Status::RUNNING,
        process::Status::Stopped(_) => Status::STOPPED,
    };
    let exit = process.exit();
    StateResponse {
        id: container.id().to_owned(),
        exec_id: process.exec.clone(),
        bundle: container.bundle().to_owned(),
        pid: container.sandbox().machine().pid(),
        status: status.into(),
        stdin: process.stdio.stdin.clone(),
        stdout: process.stdio.stdout.clone(),
        stderr: process.stdio.stderr.clone(),
        terminal: process.stdio.terminal,
        exit_status: exit.map_or(0, |exit| exit.code),
        exited_at: exit.map(|exit| wire::timestamp(exit.at)).into(),
        ..Default::default()
    }
}
