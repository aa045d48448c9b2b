//! Pods by containerd's sandbox API, where no pause container stands for them.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::{self, BUSYBOX_IMAGE, SANDBOX_HANDLER},
    cri::{self, PodSandboxState},
};

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
    let vmm = std::process::Command::new("pkill").args(["-KILL", "--exact", "caisson-vmm"]).status()?;
    ensure!(vmm.success(), "no VMM to be killed");
    ensure!(cri.wait(&container).await?.exit_code == 137);
    for attempt in 0.. {
        if cri.pod_status(&pod).await?.state() == PodSandboxState::SandboxNotready {
            break;
        }
        ensure!(attempt < 100, "the pod is still ready: {}", node.containerd_log());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    cri.remove_pod(&pod).await.with_context(|| node.containerd_log())?;
    before.assert_nothing_added()
}
