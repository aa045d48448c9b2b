//! A pod is as large as its limits, also after they change, and never larger than its control group lets it be.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cgroups::Group,
    containerd::{BUSYBOX_IMAGE, POD_CGROUP},
    cri::{self, Cri, LinuxContainerResources, UpdateContainerResourcesRequest},
};

const HANDLER: &str = "caisson";
const MIB: i64 = 1 << 20;

/// The RuntimeClass, whose overhead is added to the limits of a pod's control group.
const RUNTIME_CLASS: &str = include_str!("../../deploy/runtimeclass.yaml");
/// The defaults of a node.
const DEFAULTS: &str = include_str!("../../shim/src/config/default.toml");

/// The number between two texts.
fn number(text: &str, before: &str, after: &str) -> Result<i64> {
    let (_, rest) = text.split_once(before).with_context(|| format!("no {before:?}"))?;
    let (number, _) = rest.split_once(after).with_context(|| format!("no {after:?}"))?;
    number.parse().with_context(|| format!("{number:?}"))
}

/// What a RuntimeClass adds to the memory limits of a pod, in MiB.
fn overhead() -> Result<i64> {
    number(RUNTIME_CLASS, "\n    memory: \"", "Mi\"\n")
}

/// The RuntimeClass pays for what the guest itself takes by default, for the VMM and for the shim.
#[test]
fn the_runtime_class_pays_for_the_guest_and_more() -> Result<()> {
    let (overhead, guest) = (overhead()?, number(DEFAULTS, "\nguest_overhead_mib = ", "\n")?);
    let processes = overhead - guest;
    ensure!((24..=64).contains(&processes), "{overhead} MiB, of which the guest's {guest}");
    Ok(())
}

fn resources(mib: i64, cpus: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpus * 100_000,
        memory_limit_in_bytes: mib * MIB,
        ..LinuxContainerResources::default()
    }
}

/// A pod of one container, which sleeps, with these limits: both as a kubelet tells them.
async fn pod_of(
    cri: &mut Cri,
    name: &str,
    parent: &str,
    limits: LinuxContainerResources,
) -> Result<(cri::Pod, String)> {
    let mut config = cri::pod_config(name);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent = parent.to_owned();
    linux.resources = Some(limits.clone());
    let pod = cri.run_pod(config, HANDLER).await?;
    let mut config = cri::container_config("main", BUSYBOX_IMAGE, &["sleep", "1000"]);
    config.linux.get_or_insert_default().resources = Some(limits);
    let container = cri.run_container(&pod, config).await?;
    Ok((pod, container))
}

/// The processors and the memory in MiB that a container's machine has, and the container's own limit in MiB.
async fn size(cri: &mut Cri, container: &str) -> Result<(i64, i64, i64)> {
    let script = "grep -c ^processor /proc/cpuinfo; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; \
                  cat /sys/fs/cgroup/memory.max";
    let text = cri.said(container, script).await?;
    let mut numbers = text.lines().map(|line| line.parse::<i64>().with_context(|| text.clone()));
    let mut next = || numbers.next().context("three lines")?;
    Ok((next()?, next()? >> 10, next()? / MIB))
}

async fn free_mib(cri: &mut Cri, container: &str) -> Result<i64> {
    let text = cri.said(container, "sed -n 's/MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await?;
    Ok(text.trim().parse::<i64>().with_context(|| text.clone())? >> 10)
}

async fn update(
    cri: &mut Cri,
    container: &str,
    limits: LinuxContainerResources,
) -> Result<(), tonic::Status> {
    let request = UpdateContainerResourcesRequest { container_id: container.into(), linux: Some(limits) };
    cri.raw().update_container_resources(request).await.map(drop)
}

#[tokio::test]
async fn a_pod_grows_and_shrinks_in_place() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let (pod, container) = pod_of(&mut cri, "shim-resize", POD_CGROUP, resources(64, 1))
        .await
        .with_context(|| node.containerd_log())?;
    let (cpus, first, limit) = size(&mut cri, &container).await?;
    ensure!((cpus, limit) == (1, 64), "{cpus} processors and a limit of {limit} MiB");

    update(&mut cri, &container, resources(256, 2)).await.with_context(|| node.containerd_log())?;
    let (cpus, grown, limit) = size(&mut cri, &container).await?;
    ensure!((cpus, limit) == (2, 256), "{cpus} processors and a limit of {limit} MiB");
    ensure!((grown - first - 192).abs() <= 4, "from {first} to {grown} MiB");

    update(&mut cri, &container, resources(64, 1)).await.with_context(|| node.containerd_log())?;
    let (cpus, again, limit) = size(&mut cri, &container).await?;
    ensure!((cpus, limit) == (1, 64), "{cpus} processors and a limit of {limit} MiB");
    ensure!((again - first).abs() <= 4, "from {grown} to {again} MiB and not {first}");

    // Below what it booted with, by the balloon: what is in that is not free any more.
    let free = free_mib(&mut cri, &container).await?;
    update(&mut cri, &container, resources(40, 1)).await.with_context(|| node.containerd_log())?;
    let less = free_mib(&mut cri, &container).await?;
    ensure!((free - less - 24).abs() <= 6, "from {free} to {less} MiB free");

    let refused = update(&mut cri, &container, resources(1 << 20, 1)).await.err().context("a TiB")?;
    ensure!(refused.message().contains("at most"), "{refused:?}");
    ensure!(size(&mut cri, &container).await? == (1, again, 40), "a refused update changed something");
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

/// The pod's control group, as a kubelet limits it: the container's limit and the overhead of the RuntimeClass.
#[tokio::test]
async fn a_pod_that_uses_all_it_was_promised_is_not_killed() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let group = Group::make(&format!("{POD_CGROUP}/shim-promised"))?;
    let promised = 96;
    group.limit_memory((promised + overhead()?) * MIB)?;
    let (pod, container) = pod_of(&mut cri, "shim-promised", group.name(), resources(promised, 1))
        .await
        .with_context(|| node.containerd_log())?;

    // dd reads a block of this size into memory of its own.
    let fill = |mib: i64| format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1");
    cri.said(&container, &fill(promised - 8)).await?;
    // Beyond the limit it is the container that pays, inside, and not the machine.
    let beyond = cri.exec(&container, &["sh", "-c", &fill(promised + 32)]).await?;
    ensure!(beyond.exit_code == 137, "{beyond:?}");
    ensure!(cri.said(&container, "echo well").await? == "well\n");
    ensure!(group.oom_kills()? == 0, "the host killed");
    println!("peak of the pod's control group: {} MiB", group.memory_peak()? >> 20);

    cri.remove_pod(&pod).await?;
    group.remove()?;
    before.assert_nothing_added()
}
