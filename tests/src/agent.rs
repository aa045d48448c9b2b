//! The agent as a plain process, and a client of it.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use caisson_protocol::{client::Client, connect::UnixVsock, v1};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    containers::{Pod, Root, busybox_root},
    node::Product,
};

/// How long an agent may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// An agent that is not PID 1, in mount and network namespaces of its own, so that what it mounts and moves goes
/// with it.
pub struct Agent {
    child: Child,
    directory: tempfile::TempDir,
    /// A connected client.
    pub client: Client<UnixVsock>,
}

impl Agent {
    /// Starts one and connects to it.
    ///
    /// # Errors
    /// When the binary is missing or does not listen.
    pub async fn start() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("agent.sock");
        let child = Command::new("unshare")
            .args(["--mount", "--net", "--"])
            .arg(Product::Agent.path()?)
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--root")
            .arg(directory.path().join("root"))
            .spawn()
            .context("starting caisson-agent")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(UnixVsock::new(&socket)).await {
                Ok(client) => return Ok(Self { child, directory, client }),
                Err(error) if Instant::now() > deadline => bail!("the agent does not listen: {error:?}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Another client, with a connection of its own.
    ///
    /// # Errors
    /// When the agent does not let it in.
    pub async fn connect(&self) -> Result<Client<UnixVsock>> {
        Ok(Client::connect(UnixVsock::new(self.directory.path().join("agent.sock"))).await?)
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its storages and namespaces are, in its mount namespace.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// A path of the agent's mount namespace, as this process reaches it.
    #[must_use]
    pub fn inside(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref().strip_prefix("/").unwrap_or(path.as_ref()).to_owned();
        PathBuf::from(format!("/proc/{}/root", self.child.id())).join(path)
    }

    /// Runs a program in the agent's namespaces and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn run_inside(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("nsenter")
            .args(["--mount", "--net", "--target", &self.child.id().to_string(), "--"])
            .args(arguments)
            .output()?;
        anyhow::ensure!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// How many descriptors the agent has open.
    ///
    /// # Errors
    /// When it is gone.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// Makes a sandbox that has nothing but namespaces.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn sandbox(&self) -> Result<v1::CreateSandboxResponse> {
        let request = v1::CreateSandboxRequest { id: "pod".into(), ..Default::default() };
        Ok(self.client.sandbox().create_sandbox(request).await?.into_inner())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It removes its containers and their control groups. What else it leaves is in its own namespaces.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// An agent with a pod, and what its containers run on.
pub struct Bed {
    /// The agent.
    pub agent: Agent,
    /// Its pod.
    pub pod: Pod,
    _root: tempfile::TempDir,
}

impl Bed {
    /// Starts them.
    ///
    /// # Errors
    /// When something is missing.
    pub async fn start() -> Result<Self> {
        let root = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir()?;
        busybox_root(root.path())?;
        let agent = Agent::start().await?;
        agent.sandbox().await?;
        let pod =
            Pod { client: agent.client.clone(), root: Root::Directory(root.path().to_string_lossy().into()) };
        Ok(Self { agent, pod, _root: root })
    }
}
