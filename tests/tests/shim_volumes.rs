//! Volumes that are neither plain directories nor a kubelet's: images, and what no machine can be given.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
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
