//! Containers through the agent's protocol, without a VM: streams, terminals, exits, limits, many at once.

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    agent::{Agent, Bed},
    containers::{self, Pod, process},
};
use caisson_protocol::v1;

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

#[tokio::test]
async fn many_containers_by_eight_clients_leave_nothing() -> Result<()> {
    by_eight_clients(100).await
}

#[tokio::test]
#[ignore = "a soak: `cargo xtask test --soak`"]
async fn five_hundred_containers_by_eight_clients_leave_nothing() -> Result<()> {
    by_eight_clients(500).await
}

const CLIENTS: usize = 8;

/// What the agent's anonymous memory may grow by: its histories of events and log lines fill, and its allocator keeps
/// some of what was freed. Fewer bytes than 100 containers would leave if each left a page of 16 KiB.
const GROWTH: u64 = 1536 << 10;

/// Each of eight clients makes, uses and removes its share of `count` containers; the agent then holds what it held
/// before.
async fn by_eight_clients(count: usize) -> Result<()> {
    let bed = Bed::start().await?;
    // The first make the agent's threads, and with them their stacks and arenas.
    churn(&bed.pod, "warm", 2 * CLIENTS).await?;
    settle(&bed.agent).await?;
    let before = Held::by(&bed.agent)?;
    churn(&bed.pod, "c", count).await?;
    settle(&bed.agent).await?;
    let after = Held::by(&bed.agent)?;
    println!("before {count} containers: {before:?}; after: {after:?}");
    assert!(after.descriptors <= before.descriptors, "descriptors are left");
    assert_eq!(after.mounts, before.mounts, "mounts are left");
    assert!(after.anonymous <= before.anonymous + GROWTH, "memory is left");
    let left = bed.pod.client.containers().list_containers(v1::ListContainersRequest {}).await?.into_inner();
    assert!(left.containers.is_empty());
    let group = format!("/sys/fs/cgroup/caisson-agent-{}", bed.agent.pid());
    let groups = fs::read_dir(&group)?.flatten().filter(|entry| entry.path().is_dir()).count();
    assert_eq!(groups, 0, "control groups are left in {group}");
    Ok(())
}

/// What an agent holds.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    mounts: BTreeSet<String>,
    /// Bytes.
    anonymous: u64,
}

impl Held {
    fn by(agent: &Agent) -> Result<Self> {
        let process = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", agent.pid()));
        let status = process("status")?;
        let kibibytes =
            status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
        let point = |line: &str| line.split(' ').nth(4).unwrap_or_default().to_owned();
        Ok(Self {
            descriptors: agent.descriptors()?,
            mounts: process("mountinfo")?.lines().map(point).collect(),
            anonymous: kibibytes.context("RssAnon")?.parse::<u64>()? << 10,
        })
    }
}

/// Waits until the agent has no child, no thread of a finished task, and no stream that lingers for its last bytes.
async fn settle(agent: &Agent) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let of_process = |file: &str| fs::read_to_string(format!("/proc/{0}/task/{0}/{file}", agent.pid()));
    let streams = || async {
        let metrics = agent.client.agent().metrics(v1::MetricsRequest {}).await?.into_inner().metrics;
        anyhow::Ok(metrics.iter().any(|metric| metric.name == "agent_streams" && metric.value > 0.0))
    };
    loop {
        let threads = fs::read_dir(format!("/proc/{}/task", agent.pid()))?.count();
        let children = of_process("children")?;
        if children.trim().is_empty() && threads == 1 && !streams().await? {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "children {children:?}, {threads} threads");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn churn(pod: &Pod, name: &str, count: usize) -> Result<()> {
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let (pod, name) = (pod.clone(), name.to_owned());
        clients.spawn(async move {
            for number in (client..count).step_by(CLIENTS) {
                one(&pod, &format!("{name}{number}")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }
    Ok(())
}

async fn one(pod: &Pod, id: &str) -> Result<()> {
    pod.run(id, &process("exec sleep 1000", false), "{}").await?;
    let request = v1::ExecRequest {
        container_id: id.into(),
        exec_id: "x".into(),
        process: process("exit 5", false).into_bytes(),
        streams: None,
    };
    pod.client.containers().exec(request).await?;
    ensure!(pod.wait(id, "x").await?.code == 5, "{id}");
    pod.remove(id).await
}
