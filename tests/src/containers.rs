//! Containers of busybox through an agent's protocol, wherever the agent runs, and what must hold of them.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_protocol::{
    client::Client,
    connect::UnixVsock,
    v1::{self, event::Kind},
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

use crate::vsock::pattern;

/// How long an event may take to arrive.
const EVENT: Duration = Duration::from_secs(60);

/// The process of a container: a script for busybox's shell, with or without a terminal.
#[must_use]
pub fn process(script: &str, terminal: bool) -> String {
    json!({
        "terminal": terminal, "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"],
        "args": ["/bin/sh", "-c", script],
    })
    .to_string()
}

/// A root file system of nothing but the testbed's static busybox.
///
/// # Errors
/// When there is none.
pub fn busybox_root(at: &Path) -> Result<()> {
    for directory in ["bin", "proc", "dev", "tmp", "sys"] {
        fs::create_dir_all(at.join(directory))?;
    }
    fs::copy("/bin/busybox", at.join("bin/busybox")).context("the testbed's static busybox")?;
    fs::set_permissions(at.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
    for applet in ["sh", "cat", "sleep", "dd", "tail", "stty", "echo"] {
        std::os::unix::fs::symlink("busybox", at.join("bin").join(applet))?;
    }
    Ok(())
}

/// Where containers get their root file system.
#[derive(Clone, Debug)]
pub enum Root {
    /// All from one directory.
    Directory(String),
    /// Each from an overlay over this storage, with an upper layer in memory.
    Storage(String),
}

/// A pod's containers, by the agent that runs them.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The agent.
    pub client: Client<UnixVsock>,
    /// The root of every container.
    pub root: Root,
}

impl Pod {
    /// Creates and starts a container with all three streams, or a terminal.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn run(&self, id: &str, process: &str, resources: &str) -> Result<v1::StreamIds> {
        self.launch(id, &spec(process, resources)?).await
    }

    /// As [`run`](Self::run), from a whole specification but for the root's path.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn launch(&self, id: &str, spec: &Value) -> Result<v1::StreamIds> {
        let (path, rootfs_storage, storages) = match &self.root {
            Root::Directory(path) => (path.as_str(), String::new(), Vec::new()),
            Root::Storage(image) => ("/", format!("root-{id}"), overlay(id, image)),
        };
        let mut spec = spec.clone();
        spec["root"]["path"] = path.into();
        let request = v1::CreateContainerRequest {
            id: id.into(),
            spec: spec.to_string().into_bytes(),
            rootfs_storage,
            storages,
            streams: Some(v1::StreamSelection { stdin: true, stdout: true, stderr: true }),
        };
        let mut containers = self.client.containers();
        let made = containers.create_container(request).await?.into_inner();
        containers.start_container(v1::StartContainerRequest { container_id: id.into() }).await?;
        made.streams.context("streams")
    }

    /// Waits for a process's end; an empty `exec` is the container's own.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<v1::ExitStatus> {
        let request = v1::WaitRequest { container_id: id.into(), exec_id: exec.into() };
        let reply = self.client.containers().wait(request).await?.into_inner();
        reply.status.context("a status")
    }

    /// Kills what runs of a container, and removes it.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let request =
            v1::RemoveContainerRequest { container_id: id.into(), force: true, released: Vec::new() };
        self.client.containers().remove_container(request).await?;
        Ok(())
    }

    /// All that a stream has to say.
    ///
    /// # Errors
    /// When it breaks.
    pub async fn text(&self, stream: u64) -> Result<String> {
        let mut bytes = Vec::new();
        self.client.stream(stream).await?.read_to_end(&mut bytes).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs a script in a container to its end, and returns what it said.
    ///
    /// # Errors
    /// Also when it exits with anything but 0.
    pub async fn output(&self, id: &str, script: &str) -> Result<String> {
        self.output_of(id, &spec(&process(script, false), "{}")?).await
    }

    /// As [`output`](Self::output), from a whole specification but for the root's path.
    ///
    /// # Errors
    /// Also when it exits with anything but 0.
    pub async fn output_of(&self, id: &str, spec: &Value) -> Result<String> {
        let streams = self.launch(id, spec).await?;
        let (out, err) = tokio::try_join!(self.text(streams.stdout), self.text(streams.stderr))?;
        let code = self.wait(id, "").await?.code;
        self.remove(id).await?;
        ensure!(code == 0, "{} exited with {code}: {out}{err}", spec["process"]["args"]);
        Ok(out)
    }

    /// Runs a script in a running container to its end, and returns what it said.
    ///
    /// # Errors
    /// Also when it exits with anything but 0.
    pub async fn exec(&self, id: &str, script: &str) -> Result<String> {
        let mut containers = self.client.containers();
        let request = v1::ExecRequest {
            container_id: id.into(),
            exec_id: "exec".into(),
            process: process(script, false).into_bytes(),
            streams: Some(v1::StreamSelection { stdout: true, stderr: true, ..Default::default() }),
        };
        let streams = containers.exec(request).await?.into_inner().streams.context("streams")?;
        let (out, err) = tokio::try_join!(self.text(streams.stdout), self.text(streams.stderr))?;
        let code = self.wait(id, "exec").await?.code;
        let delete = v1::DeleteExecRequest { container_id: id.into(), exec_id: "exec".into() };
        containers.delete_exec(delete).await?;
        ensure!(code == 0, "{script:?} exited with {code}: {out}{err}");
        Ok(out)
    }
}

fn overlay(id: &str, image: &str) -> Vec<v1::Storage> {
    use v1::storage::Source;
    let upper = format!("upper-{id}");
    let tmpfs = Source::Tmpfs(v1::Tmpfs { size: 16 << 20, ..Default::default() });
    let stack = Source::Overlay(v1::Overlay { lowers: vec![image.into()], upper: upper.clone() });
    let storage = |id, source| v1::Storage { id, source: Some(source), ..Default::default() };
    vec![storage(upper, tmpfs), storage(format!("root-{id}"), stack)]
}

/// A container's specification, without a root: namespaces that separate it from the guest, and the usual mounts.
///
/// # Errors
/// When an argument is not JSON.
pub fn spec(process: &str, resources: &str) -> Result<Value> {
    Ok(json!({
        "ociVersion": "1.2.0",
        "process": serde_json::from_str::<Value>(process)?,
        "root": {},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": serde_json::from_str::<Value>(resources)?,
        },
    }))
}

/// A container's specification that shares the sandbox's namespaces, as a pod's containers do.
///
/// # Errors
/// When `process` is not JSON.
pub fn pod_spec(process: &str, sandbox: &v1::CreateSandboxResponse) -> Result<Value> {
    let mut spec = spec(process, "{}")?;
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    for (kind, path) in [
        ("network", &sandbox.network_namespace),
        ("ipc", &sandbox.ipc_namespace),
        ("uts", &sandbox.uts_namespace),
        ("pid", &sandbox.pid_namespace),
    ] {
        namespaces.push(match path.as_str() {
            "" => json!({"type": kind}),
            path => json!({"type": kind, "path": path}),
        });
    }
    spec["linux"]["namespaces"] = namespaces.into();
    if let (false, Some(mounts)) = (sandbox.resolv_conf.is_empty(), spec["mounts"].as_array_mut()) {
        let options = ["bind", "ro"];
        mounts.push(
            json!({"destination": "/etc/resolv.conf", "source": sandbox.resolv_conf, "options": options}),
        );
    }
    Ok(spec)
}

/// Both outputs, the exit code, and the refusal of a second start.
///
/// # Errors
/// When it is not so.
pub async fn output_and_exit_code_arrive(pod: &Pod) -> Result<()> {
    let streams = pod.run("one", &process("echo out; echo err >&2; exit 7", false), "{}").await?;
    let (out, err) = tokio::try_join!(pod.text(streams.stdout), pod.text(streams.stderr))?;
    ensure!((out.as_str(), err.as_str()) == ("out\n", "err\n"), "{out:?} {err:?}");
    let status = pod.wait("one", "").await?;
    let got = (status.code, status.signal, status.output_complete);
    ensure!(got == (7, 0, true), "{got:?}");
    let again = v1::StartContainerRequest { container_id: "one".into() };
    let refused = pod.client.containers().start_container(again).await.err().map(|error| error.code());
    ensure!(refused == Some(Code::FailedPrecondition), "{refused:?}");
    pod.remove("one").await
}

/// 100 MiB go in and come out again, every byte as it was.
///
/// # Errors
/// When it is not so.
pub async fn a_hundred_megabytes_go_through_a_container_intact(pod: &Pod) -> Result<()> {
    let streams = pod.run("cat", &process("exec cat", false), "{}").await?;
    let data = pattern(1 << 20).repeat(100);
    let mut stdin = pod.client.stream(streams.stdin).await?;
    let mut stdout = pod.client.stream(streams.stdout).await?;
    let mut back = Vec::with_capacity(data.len());
    let write = async {
        stdin.write_all(&data).await?;
        stdin.shutdown().await?;
        anyhow::Ok(())
    };
    let read = async { Ok(stdout.read_to_end(&mut back).await?) };
    tokio::try_join!(write, read)?;
    ensure!(back == data, "what came back differs");
    let _ = pod.text(streams.stderr).await?;
    ensure!(pod.wait("cat", "").await?.code == 0);
    pod.remove("cat").await
}

/// A terminal, its size, and both directions.
///
/// # Errors
/// When it is not so.
pub async fn a_terminal_has_a_size_and_both_directions(pod: &Pod) -> Result<()> {
    let streams = pod.run("tty", &process("read x; stty size; echo got $x", true), "{}").await?;
    let got = (streams.stdout, streams.stdin);
    ensure!(got == (0, 0), "{got:?}");
    let mut terminal = pod.client.stream(streams.terminal).await?;
    let size = v1::ResizeTerminalRequest {
        container_id: "tty".into(),
        width: 101,
        height: 37,
        ..Default::default()
    };
    pod.client.containers().resize_terminal(size).await?;
    terminal.write_all(b"hello\n").await?;
    let mut text = Vec::new();
    terminal.read_to_end(&mut text).await?;
    let text = String::from_utf8_lossy(&text);
    ensure!(text.contains("37 101") && text.contains("got hello"), "{text:?}");
    ensure!(pod.wait("tty", "").await?.code == 0);
    pod.remove("tty").await
}

/// A container that takes more memory than its limit is killed, which is told before its exit.
///
/// # Errors
/// When it is not so.
pub async fn too_much_memory_is_reported(pod: &Pod) -> Result<()> {
    let from = v1::EventsRequest { from_sequence: 1, epoch: Vec::new() };
    let mut events = pod.client.agent().events(from).await?.into_inner();
    let limit = r#"{"memory":{"limit":20971520,"swap":20971520}}"#;
    // tail keeps what has no newline in memory.
    let streams = pod.run("eater", &process("exec tail /dev/zero", false), limit).await?;
    let _ = tokio::try_join!(pod.text(streams.stdout), pod.text(streams.stderr))?;
    let status = pod.wait("eater", "").await?;
    let got = (status.code, status.signal);
    ensure!(got == (137, 9), "{got:?}");
    let mut killed = false;
    loop {
        // Those of earlier containers come first.
        let event = tokio::time::timeout(EVENT, events.message()).await??.context("an event")?;
        match event.kind {
            Some(Kind::Oom(oom)) if oom.container_id == "eater" => killed = true,
            Some(Kind::Exit(exit)) if exit.container_id == "eater" => break,
            _ => {}
        }
    }
    ensure!(killed, "the exit came first");
    pod.remove("eater").await
}

/// Further processes, and a signal that ends the first.
///
/// # Errors
/// When it is not so.
pub async fn execs_and_signals_reach_a_running_container(pod: &Pod) -> Result<()> {
    pod.run("long", &process("exec sleep 1000", false), "{}").await?;
    let mut containers = pod.client.containers();
    let request = v1::ExecRequest {
        container_id: "long".into(),
        exec_id: "e1".into(),
        process: process("echo in $$; exit 3", false).into_bytes(),
        streams: Some(v1::StreamSelection { stdout: true, ..Default::default() }),
    };
    let streams = containers.exec(request.clone()).await?.into_inner().streams.context("streams")?;
    ensure!(pod.text(streams.stdout).await?.starts_with("in "));
    ensure!(pod.wait("long", "e1").await?.code == 3);
    let refused = containers.exec(request).await.err().map(|error| error.code());
    ensure!(refused == Some(Code::AlreadyExists), "{refused:?}");
    let delete = v1::DeleteExecRequest { container_id: "long".into(), exec_id: "e1".into() };
    containers.delete_exec(delete).await?;
    let signal = v1::SignalRequest { container_id: "long".into(), signal: 9, ..Default::default() };
    containers.signal(signal).await?;
    ensure!(pod.wait("long", "").await?.code == 137);
    pod.remove("long").await
}
