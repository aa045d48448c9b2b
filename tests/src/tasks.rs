//! containerd's own service for tasks, call by call: `ctr` has no words for a task that is made and not started, and hides
//! the codes of refusals.

// Generated from proto/tasks.proto.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
mod proto {
    tonic::include_proto!("containerd.services.tasks.v1");
}

use anyhow::{Context, Result};
use proto::{
    Any, CloseIoRequest, CreateTaskRequest, ExecProcessRequest, KillRequest, Process, ResizePtyRequest, Task,
    UpdateTaskRequest, tasks_client::TasksClient,
};
pub use proto::{Exit, Mount, WaitResponse};
use tonic::{Request, Status, metadata::AsciiMetadataValue, transport::Channel};

use crate::{cri, ctr::Ctr, node::Node};

/// The tests' namespace of containerd's.
const NAMESPACE: &str = "default";
/// The type of an exec's process, as Go's package names it.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The type of an update.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// What a call comes to.
pub type Answer<T = ()> = Result<T, Status>;

/// A client in the namespace `default`.
#[derive(Clone, Debug)]
pub struct Tasks {
    client: TasksClient<Channel>,
}

impl Tasks {
    /// Connects to the node's containerd.
    ///
    /// # Errors
    /// When nothing answers.
    pub async fn connect(node: &Node) -> Result<Self> {
        Ok(Self { client: TasksClient::new(cri::channel(node.socket()).await?) })
    }

    /// Makes a task of a container that `ctr containers create` has made.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn create(&mut self, id: &str, rootfs: Vec<Mount>) -> Answer<u32> {
        let request = CreateTaskRequest { container_id: id.into(), rootfs };
        Ok(self.client.create(named(request)).await?.into_inner().pid)
    }

    /// Starts a container's own process, or with `exec` one that was added.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn start(&mut self, id: &str, exec: &str) -> Answer<u32> {
        Ok(self.client.start(named(process(id, exec))).await?.into_inner().pid)
    }

    /// Deletes a task.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn delete(&mut self, id: &str) -> Answer<Exit> {
        Ok(self.client.delete(named(task(id))).await?.into_inner())
    }

    /// Deletes a process that was added.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn delete_exec(&mut self, id: &str, exec: &str) -> Answer<Exit> {
        Ok(self.client.delete_process(named(process(id, exec))).await?.into_inner())
    }

    /// Signals a process.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn kill(&mut self, id: &str, exec: &str, signal: u32) -> Answer {
        let request = KillRequest { container_id: id.into(), exec_id: exec.into(), signal, all: false };
        self.client.kill(named(request)).await.map(drop)
    }

    /// Adds a process that runs this command, without streams.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn exec(&mut self, id: &str, exec: &str, command: &[&str]) -> Answer {
        let spec = serde_json::json!({
            "args": command, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        });
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            spec: Some(Any { type_url: PROCESS.into(), value: spec.to_string().into_bytes() }),
            ..ExecProcessRequest::default()
        };
        self.client.exec(named(request)).await.map(drop)
    }

    /// Gives a process's terminal a size.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn resize(&mut self, id: &str, exec: &str) -> Answer {
        let request =
            ResizePtyRequest { container_id: id.into(), exec_id: exec.into(), width: 100, height: 40 };
        self.client.resize_pty(named(request)).await.map(drop)
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn close_input(&mut self, id: &str, exec: &str) -> Answer {
        let request = CloseIoRequest { container_id: id.into(), exec_id: exec.into(), stdin: true };
        self.client.close_io(named(request)).await.map(drop)
    }

    /// Stops a container's processes from running.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn pause(&mut self, id: &str) -> Answer {
        self.client.pause(named(task(id))).await.map(drop)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn resume(&mut self, id: &str) -> Answer {
        self.client.resume(named(task(id))).await.map(drop)
    }

    /// The processes of a container on this machine.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn pids(&mut self, id: &str) -> Answer<Vec<u32>> {
        let listed = self.client.list_pids(named(task(id))).await?.into_inner().processes;
        Ok(listed.into_iter().map(|process| process.pid).collect())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn update(&mut self, id: &str, resources: &serde_json::Value) -> Answer {
        let any = Any { type_url: RESOURCES.into(), value: resources.to_string().into_bytes() };
        let request = UpdateTaskRequest { container_id: id.into(), resources: Some(any) };
        self.client.update(named(request)).await.map(drop)
    }

    /// Waits for a process's end, and returns its code.
    ///
    /// # Errors
    /// containerd's own.
    pub async fn wait(&mut self, id: &str, exec: &str) -> Answer<u32> {
        Ok(self.client.wait(named(process(id, exec))).await?.into_inner().exit_status)
    }
}

/// The mounts that make the root file system of a container of `ctr containers create`.
///
/// # Errors
/// When containerd knows none.
pub fn rootfs(ctr: &Ctr, id: &str) -> Result<Vec<Mount>> {
    let lines = ctr.run(&["snapshots", "mounts", "/nowhere", id])?;
    // mount -t TYPE SOURCE /nowhere -o OPTIONS
    let mount = |line: &str| {
        let mut words = line.split_whitespace().skip(2);
        let (kind, source) = (words.next()?.to_owned(), words.next()?.to_owned());
        let options = words.nth(2)?.split(',').map(str::to_owned).collect();
        Some(Mount { r#type: kind, source, target: String::new(), options })
    };
    lines.lines().map(|line| mount(line).with_context(|| format!("no mount: {line:?}"))).collect()
}

fn task(id: &str) -> Task {
    Task { container_id: id.into() }
}

fn process(id: &str, exec: &str) -> Process {
    Process { container_id: id.into(), exec_id: exec.into() }
}

/// A request in the tests' namespace.
fn named<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", AsciiMetadataValue::from_static(NAMESPACE));
    request
}
