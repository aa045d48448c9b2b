//! What an idle pod holds of its host's memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use caisson_e2e::{cost, cri};
use tokio::time::{Instant, sleep};

/// The most that shim, VMM and guest hold, in KiB, of a pod of one busybox on a node that gives 128 MiB to pods without
/// a limit: 40 MB. It is about 34,000 KiB.
const BOUND_KIB: u64 = 40_000_000 / 1024;
/// The most that an idle shim has resident: 3 MB, in KiB. It is about 1,500, and 2,100 in one that was not optimized as a
/// whole.
const SHIM_BOUND_KIB: u64 = 3_000_000 / 1024;
/// What the start needed and no longer uses is back within this time.
const REST: Duration = Duration::from_secs(60);

#[tokio::test]
#[ignore = "about the size of what is shipped, which only soaks build"]
async fn an_idle_pod_is_small() -> Result<()> {
    let (_node, mut cri, before) = cri::ready().await?;
    let (pod, container, _) = cost::start_pod(&mut cri, "idle", "caisson").await?;
    let pod_kib = || Ok(cost::pss_kib()?.values().sum());
    let started = at_most(BOUND_KIB, pod_kib).await?;
    let held = cost::pss_kib()?;
    let shim = at_most(SHIM_BOUND_KIB, cost::shims_rss_kib).await?;
    // What a call needs does not stay either.
    cri.exec(&container, &["true"]).await?;
    let after_exec = at_most(SHIM_BOUND_KIB, cost::shims_rss_kib).await?;
    println!("pod {held:?} KiB; shim resident {shim} KiB, after an exec {after_exec} KiB");
    cri.remove_pod(&pod).await?;
    ensure!(held.len() == 2, "not a shim and a VMM: {held:?}");
    ensure!(started <= BOUND_KIB, "{held:?} KiB are more than {BOUND_KIB}");
    ensure!(shim <= SHIM_BOUND_KIB, "the idle shim has {shim} KiB");
    ensure!(after_exec <= SHIM_BOUND_KIB, "the shim has {after_exec} KiB after an exec");
    before.assert_nothing_added()
}

/// What is held once it is no more than `bound`, or after [`REST`].
async fn at_most(bound: u64, held: impl Fn() -> Result<u64>) -> Result<u64> {
    let deadline = Instant::now() + REST;
    loop {
        sleep(Duration::from_secs(1)).await;
        let now = held()?;
        if now <= bound || Instant::now() > deadline {
            return Ok(now);
        }
    }
}
