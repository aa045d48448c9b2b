//! Pods by containerd's sandbox API, where no pause container stands for them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::{self, BUSYBOX_IMAGE, Containerd, SANDBOX_HANDLER},
    cri::{self, Cri, Pod, PodSandboxState},
    node::Product,
    record,
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
