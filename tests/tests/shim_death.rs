//! Whatever dies, and whenever: nothing of a pod is left, and containerd is told the truth.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::{BUSYBOX_IMAGE, Containerd},
    cri::{self, Cri},
    ctr::Ctr,
    leaks::Holdings,
    node::{Node, Product},
};

const RUNTIME: &str = "io.containerd.caisson.v2";

/// Resets the failpoint, however the test ends.
struct Armed<'a>(&'a Node);

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        // A test that fails has its own message.
        let _ = self.0.set_failpoint(None);
    }
}

/// The shim dies after each line of its record in turn, as the thing in it is about to be made, until a container gets
/// through: each time containerd's clean-up finds all of it by the record alone.
#[test]
fn a_shim_that_dies_at_any_step_leaves_nothing() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let armed = Armed(&node);
    for lines in 1..60 {
        node.set_failpoint(Some(lines))?;
        let id = format!("shim-dies-{lines}");
        let said =
            ctr.try_run(&["run", "--rm", "--runtime", RUNTIME, BUSYBOX_IMAGE, &id, "echo", "through"])?;
        let through = said.stdout == "through\n";
        // ctr does not remove what it could not start.
        let _ = ctr.try_run(&["task", "delete", "--force", &id])?;
        let _ = ctr.try_run(&["container", "delete", &id])?;
        before.assert_nothing_added().with_context(|| format!("after {lines} lines; {said:?}"))?;
        if through {
            ensure!(lines > 10, "a pod of {lines} lines only");
            drop(armed);
            return Ok(());
        }
        ensure!(said.code != 0, "{said:?}");
    }
    anyhow::bail!("it never gets through\n{}", node.containerd_log())
}

const HANDLER: &str = "caisson";

/// Kills the only VMM there is.
fn kill_vmm() -> Result<()> {
    let killed = Command::new("pkill").args(["-KILL", "--exact", "caisson-vmm"]).status()?;
    ensure!(killed.success(), "there is no VMM to be killed");
    Ok(())
}

/// The VMM dies before there is a container, between its making and its start, while one runs, and while a process is
/// in it that was added: each time the pod is told to be gone, and removing it leaves nothing.
#[tokio::test]
async fn a_vmm_that_dies_at_any_stage_is_seen_and_leaves_nothing() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    for stage in ["empty", "created", "started", "busy"] {
        let pod = cri.run_pod(cri::pod_config(&format!("shim-vmm-dies-{stage}")), HANDLER).await?;
        let sleeper = cri::container_config("sleeper", BUSYBOX_IMAGE, &["sleep", "1000"]);
        let container = match stage {
            "empty" => None,
            _ => Some(cri.create_container(&pod, sleeper).await?),
        };
        if let Some(container) = container.as_deref().filter(|_| stage != "created") {
            cri.start_container(container).await?;
        }
        let busy = container.clone().filter(|_| stage == "busy").map(|container| {
            let mut cri = cri.clone();
            tokio::spawn(async move { cri.exec(&container, &["sleep", "1000"]).await })
        });
        if busy.is_some() {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        kill_vmm()?;
        if let Some(busy) = busy {
            let ended =
                tokio::time::timeout(Duration::from_secs(20), busy).await.context("exec goes on")??;
            ensure!(ended.as_ref().map_or(true, |exec| exec.exit_code == 137), "{ended:?}");
        }
        match container {
            Some(container) if stage == "created" => {
                ensure!(cri.start_container(&container).await.is_err(), "started in a dead machine");
            }
            Some(container) => ensure!(cri.wait(&container).await?.exit_code == 137),
            None => {}
        }
        cri.remove_pod(&pod).await.with_context(|| format!("{stage}: {}", node.containerd_log()))?;
        before.assert_nothing_added().with_context(|| format!("stage {stage}"))?;
    }
    Ok(())
}

/// containerd is killed in the middle of a container's output: the one that comes after it finds the container, its
/// output whole, and its end.
#[tokio::test]
async fn a_containerd_that_dies_finds_everything_again() -> Result<()> {
    let (_, _, before) = cri::ready().await?;
    let directory = tempfile::tempdir()?;
    let products = Product::Shim.path()?;
    let products = products.parent();
    let mut containerd = Containerd::start(directory.path(), products)?;
    for image in ["pause.tar", "busybox.tar"] {
        containerd.import(&Product::Images.path()?.join(image))?;
    }
    let logs = directory.path().join("logs");
    std::fs::create_dir(&logs)?;
    let mut client = Cri::connect(containerd.socket()).await?;
    let mut config = cri::pod_config("shim-containerd-dies");
    config.log_directory = logs.to_string_lossy().into_owned();
    let pod = client.run_pod(config, HANDLER).await?;
    let script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; sleep 0.1; done; exit 8";
    let mut config = cri::container_config("talker", BUSYBOX_IMAGE, &["sh", "-c", script]);
    config.log_path = "talker.log".into();
    let talker = client.run_container(&pod, config).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    containerd.restart(products)?;

    let mut client = Cri::connect(containerd.socket()).await?;
    let ended = client.wait(&talker).await?;
    ensure!(ended.exit_code == 8, "{ended:?}; {}", containerd.log());
    let log = std::fs::read_to_string(logs.join("talker.log"))?;
    let said: Vec<_> = log.lines().filter_map(|line| line.rsplit_once(" F ")).map(|(_, said)| said).collect();
    let expected: Vec<_> = (1..=100).map(|n| format!("line {n}")).collect();
    ensure!(said == expected, "{log}");
    client.remove_pod(&pod).await?;
    containerd.end()?;
    before.assert_nothing_added()
}
