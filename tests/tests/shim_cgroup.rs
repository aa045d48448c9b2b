//! All that a pod makes its host do is done in the pod's control group, of whichever version the host has.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_e2e::{
    cgroups::{self, Group},
    containerd::{BUSYBOX_IMAGE, POD_CGROUP},
    cost,
    cri::{self, Cri},
    ctr::Ctr,
    leaks::Holdings,
    node::Node,
};

const HANDLER: &str = "caisson";
/// How long a shim may take to be in a group, and is left there.
const PATIENCE: Duration = Duration::from_secs(60);
const WHILE: Duration = Duration::from_secs(1);

/// The members of the groups below a directory.
fn members_below(directory: &Path) -> Result<Vec<u32>> {
    let mut members = Vec::new();
    for entry in fs::read_dir(directory)?.filter_map(Result::ok).filter(|entry| entry.path().is_dir()) {
        let text = fs::read_to_string(entry.path().join("cgroup.procs"))?;
        members.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    Ok(members)
}

/// Makes sure that each thread of our processes is below one of these directories in each hierarchy.
fn all_are_in(directories: &[PathBuf]) -> Result<()> {
    let processes = cost::processes()?;
    for program in ["containerd-shim-caisson-v2", "caisson-vmm"] {
        ensure!(processes.iter().any(|(name, _)| *name == program), "no {program} in {processes:?}");
    }
    for (name, pid) in processes {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = thread?.path();
            let groups = match cgroups::of(&thread) {
                // A thread of a pool may end at any time.
                Err(_) if !thread.exists() => continue,
                groups => groups?,
            };
            let is_in = |directory: &&PathBuf| groups.iter().any(|group| group.starts_with(directory));
            let outside: Vec<_> = directories.iter().filter(|directory| !is_in(directory)).collect();
            ensure!(outside.is_empty(), "a thread of {name} is in {groups:?}, and not in {outside:?}");
        }
    }
    Ok(())
}

/// What a kubelet is told of a pod and its container: the pod's group here, and the container's inside.
async fn are_counted(cri: &mut Cri, pod: &cri::Pod, container: &str) -> Result<()> {
    let value = |value: Option<cri::UInt64Value>| value.unwrap_or_default().value;
    let of_pod = cri.pod_stats(pod).await?;
    let of_container = cri.container_stats(container).await?;
    let memory = value(of_pod.memory.unwrap_or_default().working_set_bytes);
    // The machine is as large as its guest has touched.
    ensure!(memory > 10 << 20, "a pod of {memory} bytes");
    let own = value(of_container.memory.unwrap_or_default().working_set_bytes);
    ensure!(own > 10_000 && own < memory, "a container of {own} bytes in a pod of {memory}");
    let cpu = value(of_pod.cpu.unwrap_or_default().usage_core_nano_seconds);
    let own = value(of_container.cpu.unwrap_or_default().usage_core_nano_seconds);
    ensure!(own > 100_000 && own < cpu, "a container used {own} ns and its pod {cpu} ns");
    Ok(())
}

/// A group that lets nothing run shows what comes into it, and when.
#[tokio::test]
async fn the_shim_is_in_the_pods_group_before_there_is_a_machine() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let group = Group::make(&format!("{POD_CGROUP}/shim-frozen"))?;
    group.freeze(true)?;
    let mut config = cri::pod_config("shim-frozen");
    config.linux.get_or_insert_default().cgroup_parent = group.name().to_owned();
    let mut other = Cri::connect(node.socket()).await?;
    let starting = tokio::spawn(async move { other.run_pod(config, HANDLER).await });

    let frozen = async {
        while members_below(&group.directory("freezer"))?.is_empty() {
            ensure!(!starting.is_finished(), "the pod is up or refused");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(WHILE).await;
        let processes = cost::processes()?;
        let [("containerd-shim-caisson-v2", shim)] = processes[..] else { bail!("{processes:?}") };
        ensure!(members_below(&group.directory("freezer"))? == [shim], "not the shim alone");
        anyhow::Ok(())
    };
    let frozen = tokio::time::timeout(PATIENCE, frozen).await;
    group.freeze(false)?;
    let pod = starting.await?.with_context(|| node.containerd_log())?;
    frozen.context("nothing came into the group")??;

    let config = cri::container_config("main", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let container = cri.run_container(&pod, config).await?;
    all_are_in(&cgroups::directories(group.name())?)?;
    are_counted(&mut cri, &pod, &container).await?;
    cri.remove_pod(&pod).await?;
    group.remove()?;
    before.assert_nothing_added()
}

/// What containerd names for a container of no pod: a group of its namespace.
#[test]
fn a_plain_container_has_a_group_and_statistics_of_the_hosts_version() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let mut counted = Vec::new();
    for runtime in ["io.containerd.caisson.v2", "io.containerd.runc.v2"] {
        let id = "shim-cgroup";
        ctr.run(&["run", "--detach", "--runtime", runtime, BUSYBOX_IMAGE, id, "sleep", "1000"])?;
        if runtime.contains("caisson") {
            all_are_in(&cgroups::directories(&format!("/default/{id}"))?)?;
        }
        let metrics = ctr.run(&["task", "metrics", "--format", "json", id])?;
        counted.push(["usage_usec", "total_rss"].map(|name| metrics.contains(name)));
        ctr.run(&["task", "delete", "--force", id])?;
        ctr.run(&["container", "delete", id])?;
    }
    let expected = [cgroups::is_unified(), !cgroups::is_unified()];
    ensure!(counted == [expected; 2], "{counted:?} by our runtime and by runc");
    before.assert_nothing_added()
}
