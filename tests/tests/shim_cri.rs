//! Our runtime through CRI, as a kubelet uses it: pods of several containers, in one machine each.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, ContainerConfig, Cri, LinuxContainerResources, Mount, Pod},
    record,
};
use nix::sys::signal::Signal;

const HANDLER: &str = "caisson";

async fn sleeper(cri: &mut Cri, pod: &Pod, name: &str) -> Result<String> {
    let config = cri::container_config(name, BUSYBOX_IMAGE, &["sleep", "1000"]);
    cri.run_container(pod, config).await
}

fn with_oom_score(name: &str, oom_score_adj: i64) -> ContainerConfig {
    let mut config = cri::container_config(name, BUSYBOX_IMAGE, &["sleep", "1000"]);
    config.linux.get_or_insert_default().resources =
        Some(LinuxContainerResources { oom_score_adj, ..LinuxContainerResources::default() });
    config
}

/// Those of the processes that the pod's memory is in.
fn oom_scores() -> Result<Vec<String>> {
    let found = Command::new("pgrep").args(["--exact", "caisson-vmm"]).output()?;
    let scores = String::from_utf8(found.stdout)?;
    let scores = scores.lines().map(|pid| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")));
    Ok(scores.map(|score| score.map(|score| score.trim().to_owned())).collect::<Result<_, _>>()?)
}

#[tokio::test]
async fn a_pod_runs_containers_on_a_kernel_of_its_own() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let pod = cri.run_pod(cri::pod_config("shim-pod"), HANDLER).await;
    let pod = pod.with_context(|| node.containerd_log())?;
    let address = cri.pod_status(&pod).await?.network.map(|n| n.ip).unwrap_or_default();
    ensure!(address.starts_with("10.244.77."), "the pod's address is {address:?}");

    let one = cri.run_container(&pod, with_oom_score("one", 300)).await;
    let one = one.with_context(|| node.containerd_log())?;
    let two = cri.run_container(&pod, with_oom_score("two", 200)).await?;
    let kernel = cri.said(&one, "uname -r").await?;
    ensure!(kernel != std::fs::read_to_string("/proc/sys/kernel/osrelease")?, "{kernel}");
    ensure!(
        cri.said(&two, "cat /proc/sys/kernel/random/boot_id").await?
            == cri.said(&one, "cat /proc/sys/kernel/random/boot_id").await?,
        "two machines"
    );
    ensure!(cri.said(&one, "hostname").await? == "shim-pod\n");
    let seen = cri.said(&one, "ip -4 -o address show eth0").await?;
    ensure!(seen.contains(&address), "the container sees {seen:?}, not {address}");
    let failing = cri.exec(&one, &["sh", "-c", "echo out; echo err >&2; exit 3"]).await?;
    let got = (failing.exit_code, &*failing.stdout, &*failing.stderr);
    ensure!(got == (3, &b"out\n"[..], &b"err\n"[..]), "{got:?}");

    // Containers of a pod share its network and its memory, and nothing else.
    cri.said(&one, "echo shared > /dev/shm/file; echo mine > /tmp/file").await?;
    ensure!(cri.said(&two, "cat /dev/shm/file; ls /tmp").await? == "shared\n");

    // The machine is spared as much as the least of its containers, when the node is short of memory.
    ensure!(oom_scores()? == ["200"; 2], "{:?}", oom_scores());

    let brief = cri::container_config("brief", BUSYBOX_IMAGE, &["sh", "-c", "exit 9"]);
    let brief = cri.run_container(&pod, brief).await?;
    let ended = cri.wait(&brief).await?;
    ensure!(ended.exit_code == 9, "{ended:?}");
    cri.remove_pod(&pod).await.with_context(|| node.containerd_log())?;
    before.assert_nothing_added()
}

/// Who asks for it has no patience with a guest that does not begin it.
#[tokio::test]
async fn a_probe_that_is_given_up_while_it_begins_leaves_no_process() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let pod = cri.run_pod(cri::pod_config("shim-probe"), HANDLER).await?;
    let container = sleeper(&mut cri, &pod, "probed").await.with_context(|| node.containerd_log())?;
    let machine = record::machine("k8s.io", &pod.id)?;
    record::send(machine, Signal::SIGSTOP)?;
    let probe = cri.exec(&container, &["sleep", "777"]);
    let probe = tokio::time::timeout(Duration::from_secs(2), probe).await;
    record::send(machine, Signal::SIGCONT)?;
    ensure!(probe.is_err(), "{probe:?}");
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut absent = 0;
    // Seen to be gone twice, as it may not have begun the first time.
    while absent < 2 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let processes = cri.said(&container, "ps -o args").await?;
        absent = if processes.contains("sleep 777") { 0 } else { absent + 1 };
        ensure!(Instant::now() < deadline, "{processes}");
    }
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

#[tokio::test]
async fn the_host_and_the_pod_reach_one_another() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let pod = cri.run_pod(cri::pod_config("shim-net"), HANDLER).await?;
    let address = cri.pod_status(&pod).await?.network.map(|n| n.ip).unwrap_or_default();
    let script = "mkdir /www; echo from the pod > /www/index.html; httpd -f -p 80 -h /www";
    let server = cri::container_config("server", BUSYBOX_IMAGE, &["sh", "-c", script]);
    cri.run_container(&pod, server).await.with_context(|| node.containerd_log())?;
    let client = sleeper(&mut cri, &pod, "client").await?;

    let answer = get(&format!("{address}:80")).await?;
    ensure!(answer.ends_with("from the pod\n"), "{answer:?}");
    let inside = cri.said(&client, "wget -q -O - http://127.0.0.1/").await?;
    ensure!(inside == "from the pod\n", "{inside:?}");
    cri.said(&client, "ping -c 1 -W 5 10.244.77.1").await?;

    let other = cri.run_pod(cri::pod_config("shim-net-other"), HANDLER).await?;
    let peer = sleeper(&mut cri, &other, "peer").await?;
    let across = cri.said(&peer, &format!("wget -q -O - http://{address}/")).await?;
    ensure!(across == "from the pod\n", "{across:?}");
    cri.remove_pod(&other).await?;
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

/// What an HTTP server answers, once it listens.
async fn get(address: &str) -> Result<String> {
    let mut attempts = 0;
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) if attempts == 100 => return Err(error).context("connecting to the pod"),
            Err(_) => attempts += 1,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test]
async fn volumes_are_the_hosts_and_read_only_is_kept() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let volume = tempfile::tempdir()?;
    std::fs::write(volume.path().join("file"), "from the host\n")?;
    let pod = cri.run_pod(cri::pod_config("shim-volumes"), HANDLER).await?;
    let mut config = cri::container_config("user", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let mount = |path: &str, readonly| Mount {
        container_path: path.into(),
        host_path: volume.path().to_string_lossy().into_owned(),
        readonly,
        ..Mount::default()
    };
    config.mounts = vec![mount("/rw", false), mount("/ro", true)];
    let user = cri.run_container(&pod, config).await.with_context(|| node.containerd_log())?;
    ensure!(cri.said(&user, "cat /rw/file /ro/file").await? == "from the host\nfrom the host\n");
    cri.said(&user, "echo from the guest > /rw/answer; chown 1000:1000 /rw/answer").await?;
    let answer = volume.path().join("answer");
    ensure!(std::fs::read_to_string(&answer)? == "from the guest\n");
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&answer)?);
    ensure!(owner == 1000, "the file belongs to {owner}");
    let refused = cri.exec(&user, &["sh", "-c", "echo x > /ro/file"]).await?;
    ensure!(refused.exit_code != 0, "a read-only volume was written to");
    ensure!(cri.said(&user, "grep -c . /etc/hosts; test -e /etc/resolv.conf").await?.trim() != "0");
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}
