//! Many pods: at once, and one after the other.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, Cri},
};
use tokio::sync::Semaphore;

const HANDLER: &str = "caisson";
/// At once.
const CROWD: usize = 10;
/// How many start or go at a time: an emulated machine has one processor, and a guest that gets too little of it takes
/// longer to boot than anyone waits.
const HANDS: usize = 2;
/// In a row.
const ROW: usize = 100;

/// Runs a pod whose container says who it is; returns it and what was said.
async fn pod(mut cri: Cri, name: String) -> Result<(cri::Pod, String)> {
    let pod = cri.run_pod(cri::pod_config(&name), HANDLER).await?;
    let container = cri::container_config("one", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let container = cri.run_container(&pod, container).await?;
    let said = cri.said(&container, "hostname; cat /proc/sys/kernel/random/boot_id").await?;
    Ok((pod, said))
}

#[tokio::test]
#[ignore = "minutes on an emulated machine"]
async fn ten_pods_run_at_once() -> Result<()> {
    let (node, cri, before) = cri::ready().await?;
    let hands = Arc::new(Semaphore::new(HANDS));
    let starting: Vec<_> = (0..CROWD)
        .map(|index| {
            let (cri, hands) = (cri.clone(), hands.clone());
            tokio::spawn(async move {
                let _one = hands.acquire_owned().await?;
                pod(cri, format!("shim-crowd-{index}")).await
            })
        })
        .collect();
    let mut pods = Vec::new();
    for (index, started) in starting.into_iter().enumerate() {
        let (pod, said) =
            started.await?.with_context(|| format!("pod {index}\n{}", node.containerd_log()))?;
        ensure!(said.starts_with(&format!("shim-crowd-{index}\n")), "{said}");
        pods.push((pod, said));
    }
    let machines: BTreeSet<_> = pods.iter().map(|(_, said)| said).collect();
    ensure!(machines.len() == CROWD, "{machines:?}");
    let going: Vec<_> = pods
        .iter()
        .map(|(pod, _)| {
            let (mut cri, pod, hands) = (cri.clone(), pod.clone(), hands.clone());
            tokio::spawn(async move {
                let _one = hands.acquire_owned().await?;
                cri.remove_pod(&pod).await
            })
        })
        .collect();
    for gone in going {
        gone.await?.with_context(|| node.containerd_log())?;
    }
    before.assert_nothing_added()
}

/// A soak: it takes minutes.
#[tokio::test]
#[ignore = "a soak"]
async fn a_hundred_pods_in_a_row_leave_nothing() -> Result<()> {
    let (_, mut cri, before) = cri::ready().await?;
    for index in 0..ROW {
        let name = format!("shim-row-{index}");
        let (pod, _) = pod(cri.clone(), name).await.with_context(|| format!("pod {index}"))?;
        cri.remove_pod(&pod).await.with_context(|| format!("pod {index}"))?;
    }
    before.assert_nothing_added()
}
