//! Containers through the agent's protocol, without a VM: streams, terminals, exits, limits, many at once.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use anyhow::{Result, ensure};
use caisson_e2e::{
    agent::Agent,
    containers::{self, Pod, Root, busybox_root, process},
};
use caisson_protocol::v1;

/// An agent with a pod, and what its containers run on.
struct Bed {
    agent: Agent,
    pod: Pod,
    _root: tempfile::TempDir,
}

impl Bed {
    async fn start() -> Result<Self> {
        let root = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir()?;
        busybox_root(root.path())?;
        let agent = Agent::start().await?;
        agent.sandbox().await?;
        let pod =
            Pod { client: agent.client.clone(), root: Root::Directory(root.path().to_string_lossy().into()) };
        Ok(Self { agent, pod, _root: root })
    }
}

#[tokio::test]
async fn output_and_exit_code_arrive() -> Result<()> {
    containers::output_and_exit_code_arrive(&Bed::start().await?.pod).await
}

#[tokio::test]
async fn a_hundred_megabytes_go_through_a_container_intact() -> Result<()> {
    containers::a_hundred_megabytes_go_through_a_container_intact(&Bed::start().await?.pod).await
}

#[tokio::test]
async fn a_terminal_has_a_size_and_both_directions() -> Result<()> {
    containers::a_terminal_has_a_size_and_both_directions(&Bed::start().await?.pod).await
}

#[tokio::test]
async fn too_much_memory_is_reported() -> Result<()> {
    containers::too_much_memory_is_reported(&Bed::start().await?.pod).await
}

#[tokio::test]
async fn execs_and_signals_reach_a_running_container() -> Result<()> {
    containers::execs_and_signals_reach_a_running_container(&Bed::start().await?.pod).await
}

/// Each of eight clients makes, uses and removes its share.
#[tokio::test]
async fn many_containers_by_eight_clients_leave_nothing() -> Result<()> {
    const CONTAINERS: usize = 500;
    const CLIENTS: usize = 8;
    let bed = Bed::start().await?;
    let (agent, pod) = (&bed.agent, &bed.pod);
    let one = |pod: Pod, id: String| async move {
        pod.run(&id, &process("exec sleep 1000", false), "{}").await?;
        let request = v1::ExecRequest {
            container_id: id.clone(),
            exec_id: "x".into(),
            process: process("exit 5", false).into_bytes(),
            streams: None,
        };
        pod.client.containers().exec(request).await?;
        ensure!(pod.wait(&id, "x").await?.code == 5, "{id}");
        pod.remove(&id).await
    };
    one(pod.clone(), "warm".into()).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = agent.descriptors()?;
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
    assert!(agent.descriptors()? <= before, "{} descriptors, {before} before", agent.descriptors()?);
    let left = pod.client.containers().list_containers(v1::ListContainersRequest {}).await?.into_inner();
    assert!(left.containers.is_empty());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()))?;
    assert_eq!(children.trim(), "");
    let group = format!("/sys/fs/cgroup/caisson-agent-{}", agent.pid());
    let groups = fs::read_dir(&group)?.flatten().filter(|entry| entry.path().is_dir()).count();
    assert_eq!(groups, 0, "control groups are left in {group}");
    Ok(())
}
