//! Containers through the agent's protocol, without a VM: streams, terminals, exits, limits, many at once.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{agent::Agent, vsock::pattern};
use caisson_protocol::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

/// A root file system of nothing but busybox.
fn rootfs(at: &Path) -> Result<()> {
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

fn process(script: &str, terminal: bool) -> String {
    let script = script.replace('\\', "\\\\").replace('"', "\\\"");
    format!(
        r#"{{"terminal":{terminal},"user":{{"uid":0,"gid":0}},"cwd":"/","env":["PATH=/bin"],
            "args":["/bin/sh","-c","{script}"]}}"#
    )
}

fn spec(root: &Path, process: &str, resources: &str) -> Vec<u8> {
    format!(
        r#"{{"ociVersion":"1.2.0","process":{process},"root":{{"path":"{}"}},
            "mounts":[{{"destination":"/proc","type":"proc","source":"proc"}},
            {{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755"]}},
            {{"destination":"/dev/pts","type":"devpts","source":"devpts",
              "options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620"]}}],
            "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"mount"}},{{"type":"cgroup"}}],
            "resources":{resources}}}}}"#,
        root.display()
    )
    .into_bytes()
}

struct Pod {
    agent: Agent,
    rootfs: tempfile::TempDir,
}

impl Pod {
    async fn start() -> Result<Self> {
        let rootfs_directory = tempfile::tempdir()?;
        fs::set_permissions(rootfs_directory.path(), fs::Permissions::from_mode(0o755))?;
        rootfs(rootfs_directory.path())?;
        let agent = Agent::start().await?;
        agent.sandbox().await?;
        Ok(Self { agent, rootfs: rootfs_directory })
    }

    async fn run(&self, id: &str, process: &str, resources: &str) -> Result<v1::StreamIds> {
        let request = v1::CreateContainerRequest {
            id: id.into(),
            spec: spec(self.rootfs.path(), process, resources),
            streams: Some(v1::StreamSelection { stdin: true, stdout: true, stderr: true }),
            ..Default::default()
        };
        let mut containers = self.agent.client.containers();
        let made = containers.create_container(request).await?.into_inner();
        containers.start_container(v1::StartContainerRequest { container_id: id.into() }).await?;
        made.streams.context("streams")
    }

    async fn wait(&self, id: &str, exec: &str) -> Result<v1::ExitStatus> {
        let request = v1::WaitRequest { container_id: id.into(), exec_id: exec.into() };
        let reply = self.agent.client.containers().wait(request).await?.into_inner();
        reply.status.context("a status")
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let request = v1::RemoveContainerRequest { container_id: id.into(), force: true };
        self.agent.client.containers().remove_container(request).await?;
        Ok(())
    }

    async fn text(&self, stream: u64) -> Result<String> {
        let mut bytes = Vec::new();
        self.agent.client.stream(stream).await?.read_to_end(&mut bytes).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[tokio::test]
async fn output_and_exit_code_arrive() -> Result<()> {
    let pod = Pod::start().await?;
    let streams = pod.run("one", &process("echo out; echo err >&2; exit 7", false), "{}").await?;
    let (out, err) = tokio::try_join!(pod.text(streams.stdout), pod.text(streams.stderr))?;
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    let status = pod.wait("one", "").await?;
    assert_eq!((status.code, status.signal, status.output_complete), (7, 0, true));
    let again = v1::StartContainerRequest { container_id: "one".into() };
    let refused = pod.agent.client.containers().start_container(again).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    pod.remove("one").await
}

#[tokio::test]
async fn a_hundred_megabytes_go_through_a_container_intact() -> Result<()> {
    let pod = Pod::start().await?;
    let streams = pod.run("cat", &process("exec cat", false), "{}").await?;
    let data = pattern(1 << 20).repeat(100);
    let mut stdin = pod.agent.client.stream(streams.stdin).await?;
    let mut stdout = pod.agent.client.stream(streams.stdout).await?;
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
    assert_eq!(pod.wait("cat", "").await?.code, 0);
    pod.remove("cat").await
}

#[tokio::test]
async fn a_terminal_has_a_size_and_both_directions() -> Result<()> {
    let pod = Pod::start().await?;
    let streams = pod.run("tty", &process("read x; stty size; echo got $x", true), "{}").await?;
    assert_eq!((streams.stdout, streams.stdin), (0, 0));
    let mut terminal = pod.agent.client.stream(streams.terminal).await?;
    let size = v1::ResizeTerminalRequest {
        container_id: "tty".into(),
        width: 101,
        height: 37,
        ..Default::default()
    };
    pod.agent.client.containers().resize_terminal(size).await?;
    terminal.write_all(b"hello\n").await?;
    let mut text = Vec::new();
    terminal.read_to_end(&mut text).await?;
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("37 101") && text.contains("got hello"), "{text:?}");
    assert_eq!(pod.wait("tty", "").await?.code, 0);
    pod.remove("tty").await
}

#[tokio::test]
async fn too_much_memory_is_reported() -> Result<()> {
    let pod = Pod::start().await?;
    let from = v1::EventsRequest { from_sequence: 1, epoch: Vec::new() };
    let mut events = pod.agent.client.agent().events(from).await?.into_inner();
    let limit = r#"{"memory":{"limit":20971520,"swap":20971520}}"#;
    // tail keeps what has no newline in memory.
    let streams = pod.run("eater", &process("exec tail /dev/zero", false), limit).await?;
    let _ = tokio::try_join!(pod.text(streams.stdout), pod.text(streams.stderr))?;
    let status = pod.wait("eater", "").await?;
    assert_eq!((status.code, status.signal), (137, 9));
    let first =
        tokio::time::timeout(Duration::from_secs(30), events.message()).await??.context("an event")?;
    assert!(
        matches!(&first.kind, Some(v1::event::Kind::Oom(oom)) if oom.container_id == "eater"),
        "{first:?}"
    );
    let second =
        tokio::time::timeout(Duration::from_secs(30), events.message()).await??.context("an event")?;
    assert!(matches!(second.kind, Some(v1::event::Kind::Exit(_))), "{second:?}");
    pod.remove("eater").await
}

#[tokio::test]
async fn execs_and_signals_reach_a_running_container() -> Result<()> {
    let pod = Pod::start().await?;
    pod.run("long", &process("exec sleep 1000", false), "{}").await?;
    let mut containers = pod.agent.client.containers();
    let request = v1::ExecRequest {
        container_id: "long".into(),
        exec_id: "e1".into(),
        process: process("echo in $$; exit 3", false).into_bytes(),
        streams: Some(v1::StreamSelection { stdout: true, ..Default::default() }),
    };
    let streams = containers.exec(request.clone()).await?.into_inner().streams.context("streams")?;
    assert!(pod.text(streams.stdout).await?.starts_with("in "));
    assert_eq!(pod.wait("long", "e1").await?.code, 3);
    assert_eq!(containers.exec(request).await.unwrap_err().code(), Code::AlreadyExists);
    let delete = v1::DeleteExecRequest { container_id: "long".into(), exec_id: "e1".into() };
    containers.delete_exec(delete).await?;
    let signal = v1::SignalRequest { container_id: "long".into(), signal: 9, ..Default::default() };
    containers.signal(signal).await?;
    assert_eq!(pod.wait("long", "").await?.code, 137);
    pod.remove("long").await
}

/// Each of eight clients makes, uses and removes its share.
#[tokio::test]
async fn many_containers_by_eight_clients_leave_nothing() -> Result<()> {
    const CONTAINERS: usize = 500;
    const CLIENTS: usize = 8;
    let pod = std::sync::Arc::new(Pod::start().await?);
    let one = |pod: std::sync::Arc<Pod>, id: String| async move {
        pod.run(&id, &process("exec sleep 1000", false), "{}").await?;
        let request = v1::ExecRequest {
            container_id: id.clone(),
            exec_id: "x".into(),
            process: process("exit 5", false).into_bytes(),
            streams: None,
        };
        pod.agent.client.containers().exec(request).await?;
        ensure!(pod.wait(&id, "x").await?.code == 5, "{id}");
        pod.remove(&id).await
    };
    one(pod.clone(), "warm".into()).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = pod.agent.descriptors()?;
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let pod = pod.clone();
        clients.spawn(async move {
            for number in (client..CONTAINERS).step_by(CLIENTS) {
                one(pod.clone(), format!("c{number}")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }
    // Streams may linger for a second.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(pod.agent.descriptors()? <= before, "{} descriptors, {before} before", pod.agent.descriptors()?);
    let left =
        pod.agent.client.containers().list_containers(v1::ListContainersRequest {}).await?.into_inner();
    assert!(left.containers.is_empty());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", pod.agent.pid()))?;
    assert_eq!(children.trim(), "");
    let group = format!("/sys/fs/cgroup/caisson-agent-{}", pod.agent.pid());
    let groups = fs::read_dir(&group)?.flatten().filter(|entry| entry.path().is_dir()).count();
    assert_eq!(groups, 0, "control groups are left in {group}");
    Ok(())
}
