//! A small CRI client: what a kubelet says to containerd when it runs a pod.

// Generated from proto/cri.proto.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod proto {
    tonic::include_proto!("runtime.v1");
}

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
pub use proto::*;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use self::runtime_service_client::RuntimeServiceClient;
use crate::{
    containerd::{BRIDGE, POD_CGROUP},
    leaks::Holdings,
    node::Node,
    streaming::Streams,
};

/// A connection to containerd's CRI plugin.
#[derive(Clone, Debug)]
pub struct Cri {
    client: RuntimeServiceClient<Channel>,
}

/// A pod that this client runs. It is not removed on drop: [`Cri::remove_pod`] is part of what is tested.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    config: PodSandboxConfig,
}

impl Cri {
    /// Connects to the containerd at this socket.
    ///
    /// # Errors
    /// When nothing answers there.
    pub async fn connect(socket: PathBuf) -> Result<Self> {
        Ok(Self { client: RuntimeServiceClient::new(channel(socket).await?) })
    }

    /// The generated client, for a call that has no method of its own here.
    pub fn raw(&mut self) -> &mut RuntimeServiceClient<Channel> {
        &mut self.client
    }

    /// Runs a pod through this runtime handler.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn run_pod(&mut self, config: PodSandboxConfig, handler: &str) -> Result<Pod> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let reply = self.client.run_pod_sandbox(request).await.context("RunPodSandbox")?;
        Ok(Pod { id: reply.into_inner().pod_sandbox_id, config })
    }

    /// All pods that there are, with as much of their configuration as their removal needs.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn pods(&mut self) -> Result<Vec<Pod>> {
        let reply = self.client.list_pod_sandbox(Empty::default()).await;
        let items = reply.context("ListPodSandbox")?.into_inner().items;
        let pod = |item: PodSandbox| Pod {
            id: item.id,
            config: PodSandboxConfig { metadata: item.metadata, ..PodSandboxConfig::default() },
        };
        Ok(items.into_iter().map(pod).collect())
    }

    /// A pod's status.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn pod_status(&mut self, pod: &Pod) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let reply = self.client.pod_sandbox_status(request).await.context("PodSandboxStatus")?;
        reply.into_inner().status.context("PodSandboxStatus without a status")
    }

    /// Stops a pod and removes it with its containers.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn remove_pod(&mut self, pod: &Pod) -> Result<()> {
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.client.stop_pod_sandbox(stop).await.context("StopPodSandbox")?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.client.remove_pod_sandbox(remove).await.context("RemovePodSandbox")?;
        Ok(())
    }

    /// Creates and starts a container in a pod, and returns its id.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn run_container(&mut self, pod: &Pod, config: ContainerConfig) -> Result<String> {
        let container = self.create_container(pod, config).await?;
        self.start_container(&container).await?;
        Ok(container)
    }

    /// Creates a container in a pod, and returns its id.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn create_container(&mut self, pod: &Pod, config: ContainerConfig) -> Result<String> {
        let create = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let reply = self.client.create_container(create).await.context("CreateContainer")?;
        Ok(reply.into_inner().container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn start_container(&mut self, container: &str) -> Result<()> {
        let start = StartContainerRequest { container_id: container.into() };
        self.client.start_container(start).await.context("StartContainer")?;
        Ok(())
    }

    /// Runs a command in a container to its end.
    ///
    /// # Errors
    /// CRI's own; a command that exits with another code than 0 is not one.
    pub async fn exec(&mut self, container: &str, cmd: &[&str]) -> Result<ExecSyncResponse> {
        self.exec_within(container, cmd, 60).await.context("ExecSync")
    }

    /// Runs a command in a container, for so many seconds at most.
    ///
    /// # Errors
    /// CRI's own status.
    pub async fn exec_within(
        &mut self,
        container: &str,
        cmd: &[&str],
        timeout: i64,
    ) -> Result<ExecSyncResponse, tonic::Status> {
        let cmd = cmd.iter().map(ToString::to_string).collect();
        let request = ExecSyncRequest { container_id: container.into(), cmd, timeout };
        Ok(self.client.exec_sync(request).await?.into_inner())
    }

    /// What a script in a container prints.
    ///
    /// # Errors
    /// CRI's own, and when it exits with anything but 0.
    pub async fn said(&mut self, container: &str, script: &str) -> Result<String> {
        let reply = self.exec(container, &["sh", "-c", script]).await?;
        let (out, err) =
            (String::from_utf8(reply.stdout)?, String::from_utf8_lossy(&reply.stderr).into_owned());
        ensure!(reply.exit_code == 0, "{script:?} exited with {}: {out}{err}", reply.exit_code);
        Ok(out)
    }

    /// Starts a command in a container, with its streams, as `kubectl exec -i` and, with a terminal, `-it`.
    ///
    /// # Errors
    /// CRI's own, and when the streams can't be opened.
    pub async fn exec_streams(&mut self, container: &str, cmd: &[&str], tty: bool) -> Result<Streams> {
        let cmd = cmd.iter().map(ToString::to_string).collect();
        let container_id = container.into();
        let request = ExecRequest { container_id, cmd, tty, stdin: true, stdout: true, stderr: !tty };
        Streams::open(&self.client.exec(request).await.context("Exec")?.into_inner().url).await
    }

    /// Opens the streams of a container's own process.
    ///
    /// # Errors
    /// CRI's own, and when the streams can't be opened.
    pub async fn attach(&mut self, container: &str, tty: bool) -> Result<Streams> {
        let container_id = container.into();
        let request = AttachRequest { container_id, stdin: true, tty, stdout: true, stderr: !tty };
        Streams::open(&self.client.attach(request).await.context("Attach")?.into_inner().url).await
    }

    /// Connects to a port in a pod, as `kubectl port-forward`: bytes go and come on the streams' channel 0, an error on
    /// channel 1, each behind two bytes with the port.
    ///
    /// # Errors
    /// CRI's own, and when the streams can't be opened.
    pub async fn port_forward(&mut self, pod: &Pod, port: u16) -> Result<Streams> {
        let request = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![port.into()] };
        let url = self.client.port_forward(request).await.context("PortForward")?.into_inner().url;
        Streams::open(&format!("{url}?port={port}")).await
    }

    /// A container's status.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn container_status(&mut self, container: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: container.into(), verbose: false };
        let reply = self.client.container_status(request).await.context("ContainerStatus")?;
        reply.into_inner().status.context("ContainerStatus without a status")
    }

    /// A pod's first address.
    ///
    /// # Errors
    /// CRI's own, or when it has none.
    pub async fn address(&mut self, pod: &Pod) -> Result<String> {
        self.pod_status(pod).await?.network.map(|network| network.ip).context("the pod has no address")
    }

    /// What a container uses.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn container_stats(&mut self, container: &str) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: container.into() };
        let reply = self.client.container_stats(request).await.context("ContainerStats")?;
        reply.into_inner().stats.context("ContainerStats without any")
    }

    /// What a pod uses.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn pod_stats(&mut self, pod: &Pod) -> Result<LinuxPodSandboxStats> {
        let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
        let reply = self.client.pod_sandbox_stats(request).await.context("PodSandboxStats")?;
        reply.into_inner().stats.and_then(|stats| stats.linux).context("PodSandboxStats without any")
    }

    /// Changes a running container's limits.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn update(&mut self, container: &str, linux: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest { container_id: container.into(), linux: Some(linux) };
        self.client.update_container_resources(request).await.context("UpdateContainerResources")?;
        Ok(())
    }

    /// Ends a container: SIGTERM, and SIGKILL after so many seconds.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn stop_container(&mut self, container: &str, timeout: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: container.into(), timeout };
        self.client.stop_container(request).await.context("StopContainer")?;
        Ok(())
    }

    /// Removes a container that has ended.
    ///
    /// # Errors
    /// CRI's own.
    pub async fn remove_container(&mut self, container: &str) -> Result<()> {
        let request = RemoveContainerRequest { container_id: container.into() };
        self.client.remove_container(request).await.context("RemoveContainer")?;
        Ok(())
    }

    /// Waits until a container has exited, and returns its last status.
    ///
    /// # Errors
    /// CRI's own, or when it is still running after a minute.
    pub async fn wait(&mut self, container: &str) -> Result<ContainerStatus> {
        for _ in 0..600 {
            let status = self.container_status(container).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        bail!("container {container} is still running after a minute")
    }
}

/// A machine that is ready for a test through CRI, a client, and what the machine holds before the test. The first pod of
/// all, one of runc's, makes the pods' bridge, which stays by design.
///
/// # Errors
/// When something is missing on this machine, and CRI's own.
pub async fn ready() -> Result<(Node, Cri, Holdings)> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    // What a failed test left, as far as it goes: that test says so itself, and its own second try needs the names.
    for pod in cri.pods().await? {
        let _ = cri.remove_pod(&pod).await;
    }
    if !Path::new("/sys/class/net").join(BRIDGE).exists() {
        let first = cri.run_pod(pod_config("bridge-maker"), "runc").await?;
        cri.remove_pod(&first).await?;
    }
    let before = Holdings::now()?;
    Ok((node, cri, before))
}

/// A connection to a containerd, for a client of any of its services.
///
/// # Errors
/// When nothing answers at its socket.
pub async fn channel(socket: PathBuf) -> Result<Channel> {
    Endpoint::from_static("http://containerd")
        .connect_with_connector(service_fn(move |_: Uri| dial(socket.clone())))
        .await
        .context("connecting to containerd")
}

async fn dial(socket: PathBuf) -> std::io::Result<TokioIo<UnixStream>> {
    Ok(TokioIo::new(UnixStream::connect(socket).await?))
}

/// The configuration of a pod that asks for nothing special, in the tests' cgroup.
pub fn pod_config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("{name}-uid"),
            namespace: "caisson-e2e".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: POD_CGROUP.into(),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// The configuration of a container that runs this command.
pub fn container_config(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image.into(), ..ImageSpec::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        linux: Some(LinuxContainerConfig::default()),
        ..ContainerConfig::default()
    }
}
