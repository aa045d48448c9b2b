//! What runc does on the same machine, through the same clients: the baseline that our runtime is held against. If
//! one of these fails, the machine or containerd is at fault, not our code.

use anyhow::{Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, Cri},
    ctr::Ctr,
    leaks::Holdings,
    node::Node,
};

#[test]
fn ctr_runs_a_container() -> Result<()> {
    let ctr = Ctr::new(&Node::ready()?);
    let before = Holdings::now()?;
    let greeting = ["run", "--rm", BUSYBOX_IMAGE, "baseline-run", "echo", "hello"];
    ensure!(ctr.run(&greeting)? == "hello\n");
    let exit = ["run", "--rm", BUSYBOX_IMAGE, "baseline-exit", "sh", "-c", "exit 7"];
    ensure!(ctr.try_run(&exit)?.code == 7);
    before.assert_nothing_added()
}

#[tokio::test]
async fn cri_runs_a_pod() -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    // The first pod makes the bridge, which stays by design: look only after it.
    let first = cri.run_pod(cri::pod_config("baseline-first"), "runc").await?;
    cri.remove_pod(&first).await?;
    let before = Holdings::now()?;

    let pod = cri.run_pod(cri::pod_config("baseline"), "runc").await?;
    let address = cri.pod_status(&pod).await?.network.map(|n| n.ip).unwrap_or_default();
    ensure!(address.starts_with("10.244.77."), "the pod's address is {address:?}");

    let sleeper = cri::container_config("sleeper", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let sleeper = cri.run_container(&pod, sleeper).await?;
    let reply = cri.exec(&sleeper, &["sh", "-c", "hostname; echo oops >&2; exit 3"]).await?;
    let said = (reply.exit_code, &*reply.stdout, &*reply.stderr);
    ensure!(said == (3, &b"baseline\n"[..], &b"oops\n"[..]), "exec said {said:?}");

    let brief = cri.run_container(&pod, cri::container_config("brief", BUSYBOX_IMAGE, &["false"])).await?;
    ensure!(cri.wait(&brief).await?.exit_code == 1);

    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}
