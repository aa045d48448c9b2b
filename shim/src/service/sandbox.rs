//! The sandbox service, `containerd.runtime.sandbox.v1.Sandbox`: a pod without a container that stands for it.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::platform::Platform;
use prost::Message;
use ttrpc::asynchronous::TtrpcContext;

use super::{detached, stats, status};
use crate::pod::bare::BareState;
use crate::pod::cri::{self, PodSandboxConfig};
use crate::pod::{Pod, PodError};
use crate::wire;

/// CRI's names of a sandbox's states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service over one pod.
#[derive(Clone, Debug)]
pub struct SandboxService {
    pod: Arc<Pod>,
}

impl SandboxService {
    /// The service over `pod`.
    pub fn new(pod: Arc<Pod>) -> SandboxService {
        SandboxService { pod }
    }

    /// The pod, if that is the one that is asked for.
    fn pod(&self, id: &str) -> Result<Arc<Pod>, PodError> {
        if id == self.pod.id() {
            Ok(self.pod.clone())
        } else {
            Err(PodError::NotFound(format!("sandbox {id}")))
        }
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move {
            let pod = pod?;
            let options = request.options.into_option().unwrap_or_default();
            if options.type_url != cri::TYPE {
                let what = format!("options: {:?} is not {}", options.type_url, cri::TYPE);
                return Err(PodError::Invalid(what));
            }
            let config = PodSandboxConfig::decode(&*options.value)
                .map_err(|error| PodError::Invalid(format!("options: {error}")))?;
            let mut wanted = config.sandbox(&request.sandbox_id, &request.netns_path)?;
            wanted.annotations.extend(cri::of_author(request.annotations));
            pod.create_sandbox(wanted)?;
            Ok(CreateSandboxResponse::default())
        })
        .await
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move {
            let (pid, at) = pod?.start_sandbox().await?;
            let created_at = MessageField::some(wire::timestamp(at));
            Ok(StartSandboxResponse { pid, created_at, ..Default::default() })
        })
        .await
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let platform =
            Platform { os: "linux".into(), architecture: architecture().into(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move {
            pod?.stop_sandbox().await;
            Ok(StopSandboxResponse::default())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let pod = self.pod(&request.sandbox_id);
        // What only waits need not outlive its call.
        let exit = pod.map_err(|error| status(&error))?.wait_sandbox().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(wire::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move {
            let mut status = SandboxStatusResponse {
                sandbox_id: request.sandbox_id,
                state: NOT_READY.into(),
                ..Default::default()
            };
            match pod?.sandbox_state() {
                BareState::Ready { pid, at } => {
                    status.pid = pid;
                    status.state = READY.into();
                    status.created_at = MessageField::some(wire::timestamp(at));
                }
                BareState::Ended(exit) => status.exited_at = MessageField::some(wire::timestamp(exit.at)),
                BareState::Absent | BareState::Made(_) | BareState::Starting => {}
            }
            Ok(status)
        })
        .await
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move { pod.map(|_| PingResponse::default()) }).await
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move {
            let pod = pod?;
            pod.stop_sandbox().await;
            pod.shutdown(true).await;
            Ok(ShutdownSandboxResponse::default())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let pod = self.pod(&request.sandbox_id);
        detached(async move {
            let stats = pod?.sandbox_stats().await?;
            let mut response = SandboxMetricsResponse::default();
            let metric = response.metrics.mut_or_insert_default();
            metric.id = request.sandbox_id;
            metric.timestamp = MessageField::some(wire::timestamp(SystemTime::now()));
            metric.data = MessageField::some(stats::any(stats)?);
            Ok(response)
        })
        .await
    }
}

/// The processor's name in Go's words, which are everyone's here.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
