//! What an idle pod holds of its host's memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use caisson_e2e::{cost, cri};
use tokio::time::{Instant, sleep};

/// The most that shim, VMM and guest hold, in KiB, of a pod of one busybox on a node that gives 128 MiB to pods without
/// a limit. It is about 40,000, and some 3,000 more where the guest's free memory happens to be in small pieces.
const BOUND_KIB: u64 = 46 << 10;
/// What the start needed and no longer uses is back within this time.
const REST: Duration = Duration::from_secs(60);

#[tokio::test]
async fn an_idle_pod_is_small() -> Result<()> {
    let (_node, mut cri, before) = cri::ready().await?;
    let (pod, _, _) = cost::start_pod(&mut cri, "idle", "caisson").await?;
    let deadline = Instant::now() + REST;
    let held = loop {
        let held = cost::pss_kib()?;
        if held.values().sum::<u64>() <= BOUND_KIB || Instant::now() > deadline {
            break held;
        }
        sleep(Duration::from_secs(1)).await;
    };
    println!("{held:?} KiB");
    cri.remove_pod(&pod).await?;
    ensure!(held.len() == 2, "not a shim and a VMM: {held:?}");
    ensure!(held.values().sum::<u64>() <= BOUND_KIB, "{held:?} KiB are more than {BOUND_KIB}");
    before.assert_nothing_added()
}
