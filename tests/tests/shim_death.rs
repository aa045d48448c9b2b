//! Whatever dies, and whenever: nothing of a pod is left, and containerd is told the truth.

use std::{
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::{BUSYBOX_IMAGE, Containerd},
    cri::{
        self, ContainerConfig, ContainerState, Cri, LinuxContainerSecurityContext,
        LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PortMapping,
    },
    ctr::Ctr,
    leaks::Holdings,
    node::{Node, Product},
    record,
};
use nix::sys::signal::Signal;

const RUNTIME: &str = "io.containerd.caisson.v2";
const HANDLER: &str = "caisson";
/// How long a pod whose shim died may take to be removed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A failpoint of the next shims, which is reset however the test ends.
struct Armed<'a> {
    node: &'a Node,
    /// Shims that it had killed before.
    deaths: usize,
}

impl<'a> Armed<'a> {
    fn after(node: &'a Node, steps: usize) -> Result<Self> {
        node.set_failpoint(Some(steps))?;
        Ok(Self { node, deaths: Self::deaths(node) })
    }

    /// What a shim says in containerd's log before it dies.
    fn deaths(node: &Node) -> usize {
        node.containerd_log().matches("killing on purpose").count()
    }

    fn has_struck(&self) -> bool {
        Self::deaths(self.node) > self.deaths
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        // A test that fails has its own message.
        let _ = self.node.set_failpoint(None);
    }
}

/// More steps than the record of any pod here has, with their undoing.
const STEPS: usize = 150;

/// The shim dies after steps of its record in turn, as a thing is about to be made or was just undone, until a container
/// gets through: each time containerd's clean-up finds all of it by the record alone.
#[test]
fn a_shim_that_dies_at_any_stage_leaves_nothing() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    for steps in (1..STEPS).step_by(4) {
        let armed = Armed::after(&node, steps)?;
        let id = format!("shim-dies-{steps}");
        let said =
            ctr.try_run(&["run", "--rm", "--runtime", RUNTIME, BUSYBOX_IMAGE, &id, "echo", "through"])?;
        // ctr does not remove what it could not start.
        let _ = ctr.try_run(&["task", "delete", "--force", &id])?;
        let _ = ctr.try_run(&["container", "delete", &id])?;
        before.assert_nothing_added().with_context(|| format!("after {steps} steps; {said:?}"))?;
        // The death of one that is about to end is no failure of the container's.
        if !armed.has_struck() {
            ensure!(said.stdout == "through\n" && steps > 20, "{said:?} after {steps} steps");
            return Ok(());
        }
    }
    anyhow::bail!("it never gets through\n{}", node.containerd_log())
}

/// A pod with a network, a volume and two containers, one of which goes before the pod does.
async fn live(cri: &mut Cri, volume: &Path) -> Result<()> {
    let mut config = cri::pod_config("pod-dies");
    config.port_mappings =
        vec![PortMapping { container_port: 80, host_port: 18080, ..PortMapping::default() }];
    let pod = cri.run_pod(config, HANDLER).await?;
    for name in ["one", "two"] {
        let mut config = cri::container_config(name, BUSYBOX_IMAGE, &["sleep", "1000"]);
        let host_path = volume.to_string_lossy().into_owned();
        config.mounts = vec![Mount { container_path: "/data".into(), host_path, ..Mount::default() }];
        let container = cri.run_container(&pod, config).await?;
        cri.said(&container, "echo x > /data/file").await?;
        if name == "two" {
            cri.stop_container(&container, 0).await?;
            cri.remove_container(&container).await?;
        }
    }
    cri.remove_pod(&pod).await
}

/// The same, at every step, for all that a kubelet has made. Its pods are removed as it does that: until it succeeds.
#[tokio::test]
#[ignore = "takes minutes"]
async fn a_shim_that_dies_at_any_step_of_a_pods_life_leaves_nothing() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let volume = tempfile::tempdir_in("/var/tmp")?;
    for steps in 1..STEPS {
        let armed = Armed::after(&node, steps)?;
        let lived = live(&mut cri, volume.path()).await;
        let deadline = Instant::now() + PATIENCE;
        for pod in cri.pods().await? {
            while let Err(error) = cri.remove_pod(&pod).await {
                ensure!(
                    Instant::now() < deadline,
                    "after {steps} steps: {error:#}\n{}",
                    node.containerd_log()
                );
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        before.assert_nothing_added().with_context(|| format!("after {steps} steps; {lived:?}"))?;
        if !armed.has_struck() {
            lived.with_context(|| node.containerd_log())?;
            ensure!(steps > 40, "a pod of {steps} steps only");
            return Ok(());
        }
    }
    anyhow::bail!("it never gets through\n{}", node.containerd_log())
}

/// The agent dies of each call in turn, and its machine with it, until a container gets through: each time containerd
/// is told, and nothing is left.
#[test]
fn an_agent_that_dies_of_any_call_is_seen_and_leaves_nothing() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let handler = tempfile::Builder::new().suffix(".toml").tempfile()?;
    let config = handler.path().to_string_lossy().into_owned();
    for call in 1..40 {
        let parameters = format!("[machine]\nkernel_parameters = \"caisson.failpoint=die:{call}\"\n");
        std::fs::write(handler.path(), parameters)?;
        let id = format!("agent-dies-{call}");
        let run = ["run", "--rm", "--runtime", RUNTIME, "--runtime-config-path", &config];
        let said = ctr.try_run(&[&run[..], &[BUSYBOX_IMAGE, &id, "echo", "through"]].concat())?;
        // ctr does not remove what it could not start.
        let _ = ctr.try_run(&["task", "delete", "--force", &id])?;
        let _ = ctr.try_run(&["container", "delete", &id])?;
        before.assert_nothing_added().with_context(|| format!("after {call} calls; {said:?}"))?;
        if said.code == 0 {
            ensure!(call > 5 && said.stdout == "through\n", "{call} calls; {said:?}");
            return Ok(());
        }
        // Unless it had said so already, as the container's end is then.
        ensure!(said.stderr.contains("ended") || said.stdout == "through\n", "call {call}: {said:?}");
    }
    anyhow::bail!("it never gets through\n{}", node.containerd_log())
}

/// CRI's pods are in this namespace of containerd's.
const NAMESPACE: &str = "k8s.io";
/// Within this time the end of a VMM is noticed, on an emulated machine: nothing looks for it only now and then.
const SEEN: Duration = Duration::from_secs(2);

/// Kills a pod's VMM, and says when.
fn kill_vmm(pod: &cri::Pod) -> Result<Duration> {
    let vmm = record::vmm(NAMESPACE, &pod.id)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    record::send(vmm, Signal::SIGKILL)?;
    Ok(now)
}

/// Waits until a container that shares its memory file system with others has left a mark there.
async fn marked(cri: &mut Cri, container: &str) -> Result<()> {
    cri.said(container, "until [ -e /dev/shm/busy ]; do sleep 0.1; done").await.map(drop)
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
            let script = "touch /dev/shm/busy; exec sleep 1000";
            tokio::spawn(async move { cri.exec(&container, &["sh", "-c", script]).await })
        });
        if let Some(container) = container.as_deref().filter(|_| busy.is_some()) {
            marked(&mut cri, container).await?;
        }
        let killed = kill_vmm(&pod)?;
        if let Some(busy) = busy {
            let ended =
                tokio::time::timeout(Duration::from_secs(20), busy).await.context("exec goes on")??;
            ensure!(ended.as_ref().is_ok_and(|exec| exec.exit_code == 137), "{ended:?}");
        }
        match container {
            Some(container) if stage == "created" => {
                ensure!(cri.start_container(&container).await.is_err(), "started in a dead machine");
            }
            Some(container) => {
                let ended = cri.wait(&container).await?;
                ensure!(ended.exit_code == 137, "{ended:?}");
                let finished = Duration::from_nanos(ended.finished_at.try_into()?);
                let after = finished.checked_sub(killed).context("an end before the end")?;
                println!("{stage}: seen after {after:?}");
                ensure!(after < SEEN, "the end of the VMM was seen after {after:?}");
            }
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
    // In the middle.
    let log = logs.join("talker.log");
    for attempt in 0.. {
        if std::fs::read_to_string(&log).is_ok_and(|log| log.contains(" F line 15\n")) {
            break;
        }
        ensure!(attempt < 600, "it does not say a thing: {}", containerd.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    containerd.restart(products)?;

    let mut client = Cri::connect(containerd.socket()).await?;
    let ended = client.wait(&talker).await?;
    ensure!(ended.exit_code == 8, "{ended:?}; {}", containerd.log());
    let log = std::fs::read_to_string(log)?;
    let said: Vec<_> = log.lines().filter_map(|line| line.rsplit_once(" F ")).map(|(_, said)| said).collect();
    let expected: Vec<_> = (1..=100).map(|n| format!("line {n}")).collect();
    ensure!(said == expected, "{log}");
    client.remove_pod(&pod).await?;
    containerd.end()?;
    before.assert_nothing_added()
}

/// containerd is killed after some steps of the record of a container that it makes and removes, and started again: it
/// finds the container or does not, can always remove it, and nothing is left.
fn containerd_dies_after(steps: impl Iterator<Item = usize>) -> Result<()> {
    Node::ready()?;
    let nothing = Holdings::now()?;
    let directory = tempfile::tempdir()?;
    let products = Product::Shim.path()?;
    let mut containerd = Containerd::start(directory.path(), products.parent())?;
    containerd.import(&Product::Images.path()?.join("busybox.tar"))?;
    let ctr = Ctr::at(containerd.socket(), "default");
    let before = Holdings::now()?;
    for (died, steps) in steps.enumerate() {
        containerd.die_after(steps)?;
        let id = format!("containerd-dies-{steps}");
        let said = ctr.try_run(&["run", "--runtime", RUNTIME, BUSYBOX_IMAGE, &id, "echo", "through"])?;
        if !containerd.has_died()? {
            ensure!(died > 2 && said.stdout == "through\n", "after {died} deaths: {said:?}");
            ctr.run(&["container", "delete", &id])?;
            containerd.end()?;
            return nothing.assert_nothing_added();
        }
        containerd.restart(products.parent())?;
        let _ = ctr.try_run(&["task", "delete", "--force", &id])?;
        ctr.run(&["container", "delete", &id]).with_context(|| containerd.log())?;
        before.assert_nothing_added().with_context(|| format!("{steps} steps; {}", containerd.log()))?;
    }
    anyhow::bail!("it never gets through")
}

#[test]
fn a_containerd_that_dies_while_it_makes_a_container_can_remove_it() -> Result<()> {
    containerd_dies_after((4..STEPS).step_by(6))
}

#[test]
#[ignore = "takes minutes"]
fn a_containerd_that_dies_at_any_step_can_remove_what_it_made() -> Result<()> {
    containerd_dies_after(1..STEPS)
}

/// A container whose processes its pod's others see, and theirs it.
fn neighbour(name: &str, command: &[&str]) -> ContainerConfig {
    let mut config = cri::container_config(name, BUSYBOX_IMAGE, command);
    let options = NamespaceOption { pid: NamespaceMode::Pod.into(), ..NamespaceOption::default() };
    config.linux.get_or_insert_default().security_context =
        Some(LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() });
    config
}

/// A container's first process is killed by a neighbour, with more of its processes around: that is the end of all of
/// them and of nobody else, and the container can be made again.
#[tokio::test]
async fn the_death_of_a_first_process_is_its_containers_alone() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut config = cri::pod_config("shim-init-dies");
    let options = NamespaceOption { pid: NamespaceMode::Pod.into(), ..NamespaceOption::default() };
    config.linux.get_or_insert_default().security_context =
        Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
    let pod = cri.run_pod(config, HANDLER).await.with_context(|| node.containerd_log())?;
    let lasting = cri.run_container(&pod, neighbour("neighbour", &["sleep", "1000"])).await?;
    let count = "ps | grep -c '[s]leep [234]'; true";
    for attempt in 0..2 {
        let mut victim = neighbour("victim", &["sh", "-c", "sleep 2222 & exec sleep 3333"]);
        victim.metadata.get_or_insert_default().attempt = attempt;
        let victim = cri.run_container(&pod, victim).await?;
        let mut added = cri.exec_streams(&victim, &["sleep", "4444"], false).await?;
        // The last of them may still be on its way.
        cri.said(&lasting, &format!("until [ $({count}) = 3 ]; do sleep 0.2; done")).await?;
        cri.said(&lasting, "kill -9 $(ps | awk '/[s]leep 3333/ { print $1 }')").await?;
        let ended = cri.wait(&victim).await?;
        ensure!((ended.exit_code, ended.reason.as_str()) == (137, "Error"), "{ended:?}");
        let exec = tokio::time::timeout(Duration::from_secs(20), added.exit_code()).await;
        ensure!(exec.context("the process that was added goes on")?? == 137);
        let left = cri.said(&lasting, count).await?;
        ensure!(left == "0\n", "{left} are left");
        cri.remove_container(&victim).await?;
    }
    ensure!(cri.container_status(&lasting).await?.state() == ContainerState::ContainerRunning);
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}
