//! Pods by containerd's sandbox API, where no pause container stands for them.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::{self, BUSYBOX_IMAGE, Containerd, SANDBOX_HANDLER},
    cri::{self, ContainerState, Cri, LinuxContainerResources, Pod, PodSandboxState, StopPodSandboxRequest},
    node::Product,
    record,
};
use containerd_shim_protos::{
    sandbox_api::SandboxMetricsRequest, sandbox_async::SandboxClient, shim_async::Client, ttrpc::context,
};
use nix::sys::signal::Signal;

#[tokio::test]
async fn a_pod_needs_no_pause_container() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut config = cri::pod_config("shim-sandbox");
    config.dns_config = Some(cri::DnsConfig { servers: vec!["10.9.8.7".into()], ..Default::default() });
    let pod = cri.run_pod(config, SANDBOX_HANDLER).await;
    if containerd::version()? < (2, 0) {
        // It does not know the API, and says so.
        ensure!(pod.is_err(), "containerd 1.7 made a pod of a handler that it can't have");
        return before.assert_nothing_added();
    }
    let pod = pod.with_context(|| node.containerd_log())?;
    let status = cri.pod_status(&pod).await?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
    let address = status.network.map(|network| network.ip).unwrap_or_default();
    ensure!(address.starts_with("10.244.77."), "the pod's address is {address:?}");

    let sleeper = cri::container_config("one", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let one = cri.run_container(&pod, sleeper).await.with_context(|| node.containerd_log())?;
    let said = cri
        .said(&one, "hostname; cat /etc/hostname; grep -c localhost /etc/hosts; cat /etc/resolv.conf")
        .await?;
    let (names, resolver) = said.split_at_checked("shim-sandbox\n".len() * 2).context(said.clone())?;
    ensure!(names == "shim-sandbox\n".repeat(2), "{said}");
    ensure!(!resolver.starts_with("0\n") && resolver.ends_with("\nnameserver 10.9.8.7\n"), "{said}");
    cri.remove_pod(&pod).await.with_context(|| node.containerd_log())?;
    before.assert_nothing_added()
}

#[tokio::test]
async fn the_end_of_the_machine_is_the_end_of_the_pod() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    if containerd::version()? < (2, 0) {
        return Ok(());
    }
    let pod = cri.run_pod(cri::pod_config("shim-sandbox-dies"), SANDBOX_HANDLER).await?;
    let sleeper = cri::container_config("one", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let container = cri.run_container(&pod, sleeper).await?;
    record::send(record::vmm("k8s.io", &pod.id)?, Signal::SIGKILL)?;
    ensure!(cri.wait(&container).await?.exit_code == 137);
    not_ready(&mut cri, &pod).await.with_context(|| node.containerd_log())?;
    cri.remove_pod(&pod).await.with_context(|| node.containerd_log())?;
    before.assert_nothing_added()
}

/// Waits until a pod is known to have ended.
async fn not_ready(cri: &mut Cri, pod: &Pod) -> Result<()> {
    for _ in 0..100 {
        if cri.pod_status(pod).await?.state() == PodSandboxState::SandboxNotready {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    anyhow::bail!("the pod is still ready")
}

/// Where a pod's shim listens: some part of containerd's has noted it.
fn shim_address(containerd: &Path, pod: &Pod) -> Result<String> {
    for part in fs::read_dir(containerd.join("state"))? {
        let note = part?.path().join("k8s.io").join(&pod.id).join("bootstrap.json");
        if let Ok(text) = fs::read_to_string(note) {
            let noted: serde_json::Value = serde_json::from_str(&text)?;
            return Ok(noted["address"].as_str().context("an address")?.to_owned());
        }
    }
    anyhow::bail!("nobody knows where the shim of {} listens", pod.id)
}

/// What a pod costs, as its shim tells whoever asks by the sandbox API; containerd itself does not.
async fn has_metrics(containerd: &Path, pod: &Pod) -> Result<bool> {
    let client = SandboxClient::new(Client::connect(&shim_address(containerd, pod)?).await?);
    let request = SandboxMetricsRequest { sandbox_id: pod.id.clone(), ..SandboxMetricsRequest::default() };
    let reply = client.sandbox_metrics(context::with_duration(Duration::from_secs(30)), &request).await?;
    let metric = reply.metrics.into_option().unwrap_or_default();
    Ok(metric.id == pod.id && metric.data.into_option().is_some_and(|data| !data.value.is_empty()))
}

/// Several containers, one after the other and side by side, are stopped with their pod.
#[tokio::test]
async fn containers_come_and_go_in_a_pod_without_a_pause_container() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    if containerd::version()? < (2, 0) {
        return Ok(());
    }
    let pod = cri.run_pod(cri::pod_config("shim-sandbox-many"), SANDBOX_HANDLER).await?;
    let init =
        cri::container_config("init", BUSYBOX_IMAGE, &["sh", "-c", "echo left > /dev/shm/note; exit 3"]);
    let init = cri.run_container(&pod, init).await.with_context(|| node.containerd_log())?;
    ensure!(cri.wait(&init).await?.exit_code == 3);
    cri.remove_container(&init).await?;

    let sleeper = |name| cri::container_config(name, BUSYBOX_IMAGE, &["sleep", "1000"]);
    let one = cri.run_container(&pod, sleeper("one")).await?;
    let two = cri.run_container(&pod, sleeper("two")).await.with_context(|| node.containerd_log())?;
    let boot_id = "cat /proc/sys/kernel/random/boot_id /dev/shm/note; hostname";
    let said = (cri.said(&one, boot_id).await?, cri.said(&two, boot_id).await?);
    ensure!(said.0 == said.1 && said.0.ends_with("\nleft\nshim-sandbox-many\n"), "{said:?}");
    let used = cri.container_stats(&two).await?;
    let working_set = used.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |bytes| bytes.value);
    ensure!(working_set > 0, "no memory in use");
    let socket = node.socket();
    ensure!(has_metrics(socket.parent().context("containerd's directory")?, &pod).await?, "no metrics");
    let limit = LinuxContainerResources { memory_limit_in_bytes: 48 << 20, ..Default::default() };
    cri.update(&two, limit).await?;
    let limit = cri.said(&two, "cat /sys/fs/cgroup/memory.max").await?;
    ensure!(limit == format!("{}\n", 48 << 20), "{limit}");

    let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    cri.raw().stop_pod_sandbox(stop).await.with_context(|| node.containerd_log())?;
    for container in [&one, &two] {
        let status = cri.container_status(container).await?;
        let ended = (status.state(), status.exit_code);
        ensure!(ended == (ContainerState::ContainerExited, 137), "{status:?}");
    }
    not_ready(&mut cri, &pod).await?;
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

/// The containerd that comes after finds the pod, what is in it, and, later, its end.
#[tokio::test]
async fn a_containerd_that_comes_back_finds_a_pod_without_a_pause_container() -> Result<()> {
    let (_, _, before) = cri::ready().await?;
    if containerd::version()? < (2, 0) {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let products = Product::Shim.path()?;
    let mut containerd = Containerd::start(directory.path(), products.parent())?;
    for image in ["pause.tar", "busybox.tar"] {
        containerd.import(&Product::Images.path()?.join(image))?;
    }
    let mut client = Cri::connect(containerd.socket()).await?;
    let pod = client.run_pod(cri::pod_config("shim-sandbox-again"), SANDBOX_HANDLER).await?;
    let sleeper = |name| cri::container_config(name, BUSYBOX_IMAGE, &["sleep", "1000"]);
    let one = client.run_container(&pod, sleeper("one")).await.with_context(|| containerd.log())?;
    let address = client.address(&pod).await?;
    containerd.restart(products.parent())?;

    let mut client = Cri::connect(containerd.socket()).await?;
    let status = client.pod_status(&pod).await?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}; {}", containerd.log());
    ensure!(client.address(&pod).await? == address, "it was at {address}: {status:?}");
    ensure!(client.said(&one, "echo still here").await? == "still here\n");
    let two = client.run_container(&pod, sleeper("two")).await.with_context(|| containerd.log())?;
    record::send(record::vmm("k8s.io", &pod.id)?, Signal::SIGKILL)?;
    for container in [&one, &two] {
        ensure!(client.wait(container).await?.exit_code == 137);
    }
    not_ready(&mut client, &pod).await.with_context(|| containerd.log())?;
    client.remove_pod(&pod).await.with_context(|| containerd.log())?;
    containerd.end()?;
    before.assert_nothing_added()
}
