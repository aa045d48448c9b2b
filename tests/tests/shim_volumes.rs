//! Volumes that are neither plain directories nor a kubelet's: images, and what no machine can be given. And what a
//! container's files leave behind.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cost,
    cri::{self, ImageSpec, Mount, MountPropagation, VersionRequest},
};

fn run(line: &str) -> Result<()> {
    let output = Command::new("sh").args(["-ec", line]).output().context("starting sh")?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[tokio::test]
async fn an_image_is_a_volume() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let version = cri.raw().version(VersionRequest::default()).await?.into_inner().runtime_version;
    let numbers: Vec<u32> =
        version.trim_start_matches('v').split('.').map_while(|number| number.parse().ok()).collect();
    let pod = cri.run_pod(cri::pod_config("shim-image"), "caisson").await?;
    let mut config = cri::container_config("user", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let image = ImageSpec { image: BUSYBOX_IMAGE.into(), ..ImageSpec::default() };
    config.mounts = vec![Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(image),
        ..Mount::default()
    }];
    let started = cri.run_container(&pod, config).await;
    if numbers < vec![2, 1] {
        // Older ones know of no such volumes, whatever the runtime.
        ensure!(started.is_err(), "containerd {version} has image volumes");
    } else {
        let user = started.with_context(|| node.containerd_log())?;
        let said = cri.said(&user, "cmp /bin/busybox /image/bin/busybox; touch /image/new; echo $?").await?;
        ensure!(said == "1\n", "{said}");
    }
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

/// A share of mounts in both directions can't be had with a machine in between.
#[tokio::test]
async fn mounts_that_should_appear_on_the_host_are_refused() -> Result<()> {
    let (_, mut cri, before) = cri::ready().await?;
    let pod = cri.run_pod(cri::pod_config("shim-shared"), "caisson").await?;
    let volume = tempfile::tempdir_in("/var/tmp")?;
    run(&format!("mount --bind {0} {0}; mount --make-shared {0}", volume.path().display()))?;
    let mut config = cri::container_config("user", BUSYBOX_IMAGE, &["true"]);
    config.mounts = vec![Mount {
        container_path: "/shared".into(),
        host_path: volume.path().to_string_lossy().into_owned(),
        propagation: MountPropagation::PropagationBidirectional.into(),
        ..Mount::default()
    }];
    let refused = cri.run_container(&pod, config).await;
    run(&format!("umount {}", volume.path().display()))?;
    let told = format!("{:#}", refused.err().context("it runs")?);
    ensure!(told.contains("cannot appear on the host"), "{told}");
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

/// How many files the VMM has open, and the parent that jails it.
fn open_files_of_the_vmm() -> Result<usize> {
    let mut open = 0;
    for (name, pid) in cost::processes()? {
        if name == "caisson-vmm" {
            open += fs::read_dir(format!("/proc/{pid}/fd")).context("reading the VMM's descriptors")?.count();
        }
    }
    ensure!(open > 0, "no VMM runs");
    Ok(open)
}

/// A pod whose containers are restarted for months must not pin the file systems of all of them: the guest forgets their
/// files, and the file server closes them.
#[tokio::test]
async fn files_of_a_removed_container_are_closed() -> Result<()> {
    let (_, mut cri, before) = cri::ready().await?;
    let pod = cri.run_pod(cri::pod_config("shim-forgotten"), "caisson").await?;
    let volume = tempfile::tempdir_in("/var/tmp")?;
    fs::write(volume.path().join("file"), "text")?;
    let mut config = cri::container_config("reader", BUSYBOX_IMAGE, &["sleep", "1000"]);
    config.mounts = vec![Mount {
        container_path: "/v".into(),
        host_path: volume.path().to_string_lossy().into_owned(),
        ..Mount::default()
    }];
    let (mut during, mut after) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let reader = cri.run_container(&pod, config.clone()).await?;
        cri.said(&reader, "find / -xdev > /dev/null; cat /v/file").await?;
        during.push(open_files_of_the_vmm()?);
        cri.stop_container(&reader, 0).await?;
        cri.remove_container(&reader).await?;
        // The guest forgets in its own time.
        let (mut least, deadline) = (usize::MAX, Instant::now() + Duration::from_secs(5));
        let bound = after.first().copied().unwrap_or(0);
        while least > bound && Instant::now() < deadline {
            least = least.min(open_files_of_the_vmm()?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        after.push(least);
    }
    let seen = format!("open with each container: {during:?}, after its removal: {after:?}");
    ensure!(during.iter().zip(&after).all(|(during, after)| during > after), "nothing was closed: {seen}");
    ensure!(after.last() <= after.first(), "something stays: {seen}");
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}
