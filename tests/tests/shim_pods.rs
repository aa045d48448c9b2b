//! A pod's life through CRI, with everything that a kubelet asks of it; each pod runs under runc too, and the answers
//! are compared.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{
        self, Capability, ContainerConfig, Cri, Int64Value, LinuxContainerResources,
        LinuxContainerSecurityContext, NamespaceMode, NamespaceOption, Pod, SecurityProfile,
        security_profile::ProfileType,
    },
    streaming::{RESIZE, STDERR, STDIN, STDOUT},
};

/// Ours, and the one that it is held against.
const HANDLERS: [&str; 2] = ["caisson", "runc"];
const MIB: i64 = 1 << 20;

/// What was answered, by the question.
type Answers = BTreeMap<String, String>;

/// Both answer everything alike.
fn compare(ours: &Answers, theirs: &Answers) -> Result<()> {
    let differ: Vec<_> = theirs
        .iter()
        .filter(|(question, theirs)| ours.get(*question) != Some(theirs))
        .map(|(question, theirs)| {
            format!("--- {question}\ncaisson: {}\nrunc: {theirs}", ours.get(question).map_or("", |it| it))
        })
        .collect();
    ensure!(differ.is_empty() && ours.len() == theirs.len(), "{}", differ.join("\n"));
    Ok(())
}

/// A container with processes of its own in sight, as a kubelet wants it unless told otherwise.
fn container(name: &str, command: &[&str]) -> ContainerConfig {
    let mut config = cri::container_config(name, BUSYBOX_IMAGE, command);
    let options = NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() };
    let context = LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
    config.linux.get_or_insert_default().security_context = Some(context);
    config
}

fn sh(name: &str, script: &str) -> ContainerConfig {
    container(name, &["sh", "-c", script])
}

/// What any process in a container may ask; the answer is the same on any kernel.
///
/// What differs by design is not asked: the filter that every container of ours has against the machine's own sockets, the
/// device nodes that no root file system of ours takes, files of procfs that the guest's kernel does not have.
const QUESTIONS: [&str; 20] = [
    "id",
    "env | sort",
    "pwd; umask; tty",
    "cat /proc/1/cmdline | tr '\\0' ' '",
    "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs)' /proc/self/status",
    "[ $(id -u) = 0 ] || cat /proc/1/oom_score_adj",
    "awk '{ print $2 }' /proc/self/mounts | grep -v -E 'kcore|sysrq' | sort",
    "awk '$2 ~ /^.(proc|sys)/ { print $2, substr($4, 1, 2) }' /proc/self/mounts | grep -v -E 'kcore|sysrq|scsi|thermal|firmware|interrupts' | sort",
    "ls -l /dev | awk '{ print $1, $3, $4, $5, $6, $NF }' | grep -v -E 'total|kcore'",
    "ls -ld /dev /dev/shm /dev/pts /dev/mqueue /proc /sys /tmp | awk '{ print $1, $3, $4, $NF }'",
    "stat -f -c %T /dev /dev/shm /proc /sys/fs/cgroup",
    "df -k /dev/shm | tail -1 | awk '{ print $2 }'",
    "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; cat /proc/self/cgroup",
    "ls /sys/fs/cgroup | grep -E '^(cgroup.procs|cpu.stat|memory.current|memory.events|io.stat|pids.current)$'",
    "echo x > /sys/fs/cgroup/memory.max; echo 1 > /proc/sys/kernel/panic; echo $?",
    "mkdir -p /tmp/at; mount -t tmpfs none /tmp/at; chroot / true; echo $?",
    "hostname other; hostname; cat /etc/hostname",
    "cat /etc/resolv.conf; tail -1 /etc/hosts | awk '{ print $2 }'",
    "ulimit -c; ulimit -n | awk '{ print ($1 >= 1024) }'; ulimit -s",
    "readlink /proc/self/exe; unshare -U true; echo $?",
];

/// All questions to one container.
async fn ask(cri: &mut Cri, container: &str, kind: &str, answers: &mut Answers) -> Result<()> {
    // One call for all: each costs an emulated machine a second.
    let script: String = QUESTIONS.iter().map(|line| format!("({line}) 2>&1; echo @@@@;")).collect();
    let all = cri.said(container, &script).await?;
    let parts: Vec<_> = all.split("@@@@\n").collect();
    ensure!(parts.len() == QUESTIONS.len() + 1, "{all}");
    for (question, answer) in QUESTIONS.iter().zip(parts) {
        answers.insert(format!("{kind}: {question}"), answer.to_owned());
    }
    Ok(())
}

/// As a kubelet's most careful users have it.
fn restricted() -> ContainerConfig {
    let mut config = container("restricted", &["sleep", "1000"]);
    config.envs = vec![cri::KeyValue { key: "COLOUR".into(), value: "blue = green\n".into() }];
    config.working_dir = "/tmp".into();
    let text = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    let context = LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1000 }),
        run_as_group: Some(Int64Value { value: 2000 }),
        supplemental_groups: vec![3000, 4000],
        no_new_privs: true,
        readonly_rootfs: true,
        capabilities: Some(Capability {
            add_capabilities: text(&["NET_ADMIN"]),
            drop_capabilities: text(&["CHOWN", "KILL"]),
            ..Capability::default()
        }),
        masked_paths: text(&["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"]),
        readonly_paths: text(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]),
        seccomp: Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            ..SecurityProfile::default()
        }),
        ..LinuxContainerSecurityContext::default()
    };
    let linux = config.linux.get_or_insert_default();
    let namespaces = linux.security_context.take().and_then(|context| context.namespace_options);
    linux.security_context = Some(LinuxContainerSecurityContext { namespace_options: namespaces, ..context });
    linux.resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 64 * MIB,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        oom_score_adj: 500,
        ..LinuxContainerResources::default()
    });
    config
}

#[tokio::test]
async fn a_container_cannot_tell_what_it_runs_under() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut all = Vec::new();
    for handler in HANDLERS {
        let mut answers = Answers::new();
        let pod = cri.run_pod(cri::pod_config("shim-asked"), handler).await;
        let pod = pod.with_context(|| node.containerd_log())?;
        let plain = container("plain", &["sleep", "1000"]);
        let plain = cri.run_container(&pod, plain).await?;
        ask(&mut cri, &plain, "plain", &mut answers).await?;
        let restricted = cri.run_container(&pod, restricted()).await?;
        ask(&mut cri, &restricted, "restricted", &mut answers).await?;
        failures(&mut cri, &pod, &plain, &mut answers).await?;
        cri.remove_pod(&pod).await?;
        all.push(answers);
    }
    compare(&all[0], &all[1])?;
    before.assert_nothing_added()
}

/// What goes wrong goes wrong in the same way.
async fn failures(cri: &mut Cri, pod: &Pod, plain: &str, answers: &mut Answers) -> Result<()> {
    for command in [&["/nonexistent"][..], &["/etc"], &["sh", "-c", "kill -9 $$"], &["false"]] {
        let ended = match cri.exec_within(plain, command, 60).await {
            Ok(reply) => format!("exit {}", reply.exit_code),
            Err(_) => "refused".into(),
        };
        answers.insert(format!("exec of {command:?}"), ended);
    }
    let late = cri.exec_within(plain, &["sleep", "600"], 1).await;
    answers
        .insert("exec that takes too long".into(), format!("{:?}", late.err().map(|status| status.code())));
    let left = cri.said(plain, "ps | grep -c '[s]leep 600'; true").await?;
    answers.insert("what is left of it".into(), left);
    let missing = cri.create_container(pod, container("missing", &["/nonexistent"]));
    let missing = missing.await?;
    let refused = cri.start_container(&missing).await.is_err();
    let status = cri.container_status(&missing).await?;
    let ended = format!("refused: {refused}, exit {}, {}", status.exit_code, status.reason);
    answers.insert("a program that is not there".into(), ended);
    Ok(())
}

/// How a container ended, as kubectl shows it.
async fn ending(cri: &mut Cri, container: &str) -> Result<String> {
    let status = cri.wait(container).await?;
    // containerd notes a start when it has happened: a short life may be over by then.
    ensure!(status.started_at > 0 && status.finished_at >= status.created_at, "{status:?}");
    Ok(format!("exit {} {}", status.exit_code, status.reason))
}

/// A kubelet's log file without its time stamps.
fn log_lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let line = |line: &str| line.split_once(' ').map(|(_, rest)| rest.to_owned());
    text.lines().map(|text| line(text).with_context(|| text.to_owned())).collect()
}

#[tokio::test]
async fn a_pod_lives_as_a_kubelet_wants_it_to() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut all = Vec::new();
    for handler in HANDLERS {
        let logs = tempfile::tempdir()?;
        let mut config = cri::pod_config("shim-life");
        config.log_directory = logs.path().to_string_lossy().into_owned();
        let pod = cri.run_pod(config, handler).await.with_context(|| node.containerd_log())?;
        let mut answers = Answers::new();
        let lived = life(&mut cri, &pod, logs.path(), &mut answers).await;
        lived.with_context(|| format!("with {handler}; {answers:?}"))?;
        cri.remove_pod(&pod).await?;
        all.push(answers);
    }
    compare(&all[0], &all[1])?;
    before.assert_nothing_added()
}

async fn life(cri: &mut Cri, pod: &Pod, logs: &Path, answers: &mut Answers) -> Result<()> {
    let mut note = |question: &str, answer: String| answers.insert(question.to_owned(), answer);
    let logged = |mut config: ContainerConfig| {
        config.log_path = format!("{}.log", config.metadata.as_ref().map_or("", |metadata| &metadata.name));
        config
    };

    // Init containers one after the other, the second one a sidecar that stays.
    let init = cri
        .run_container(pod, logged(sh("init", "echo init > /dev/shm/file; echo to the log; exit 0")))
        .await?;
    note("init container", ending(cri, &init).await?);
    cri.remove_container(&init).await?;
    let serve = "trap 'echo bye; exit 3' TERM; cat /dev/shm/file; while :; do sleep 0.2; done";
    let sidecar = cri.run_container(pod, logged(sh("sidecar", serve))).await?;

    // The main one: every kind of line. The long one is more than what containerd takes for one.
    let lines =
        "echo out; echo err >&2; printf partial; head -c 20000 /dev/zero | tr '\\0' x; echo; printf end";
    let main = cri.run_container(pod, logged(sh("main", lines))).await?;
    note("main container", ending(cri, &main).await?);
    let mut seen = log_lines(&logs.join("main.log"))?;
    // Two streams have no common order.
    seen.sort();
    note("its log", seen.join("\n"));

    let oom = |config: &mut ContainerConfig| {
        let limits =
            LinuxContainerResources { memory_limit_in_bytes: 24 * MIB, ..LinuxContainerResources::default() };
        config.linux.get_or_insert_default().resources = Some(limits);
    };
    let mut greedy = container("greedy", &["tail", "/dev/zero"]);
    oom(&mut greedy);
    let greedy = cri.run_container(pod, greedy).await?;
    note("one that takes too much memory", ending(cri, &greedy).await?);
    let killed = cri.run_container(pod, container("killed", &["sleep", "1000"])).await?;
    cri.stop_container(&killed, 1).await?;
    note("one that does not hear SIGTERM", ending(cri, &killed).await?);

    attached(cri, pod, &mut note).await?;
    measured(cri, pod, &sidecar, &mut note).await?;

    // One that comes late, when others have ended long ago.
    let late = cri.run_container(pod, sh("late", "cat /dev/shm/file; exit 7")).await?;
    note("late container", ending(cri, &late).await?);
    cri.stop_container(&sidecar, 30).await?;
    note("sidecar", ending(cri, &sidecar).await?);
    note("the sidecar's log", log_lines(&logs.join("sidecar.log"))?.join("\n"));
    Ok(())
}

/// Streams of a container's own process and of others, with and without a terminal.
async fn attached(
    cri: &mut Cri,
    pod: &Pod,
    note: &mut impl FnMut(&str, String) -> Option<String>,
) -> Result<()> {
    let mut shell = container("shell", &["sh", "-i"]);
    (shell.stdin, shell.tty) = (true, true);
    let shell = cri.run_container(pod, shell).await?;
    let mut terminal = cri.attach(&shell, true).await?;
    terminal.send(RESIZE, br#"{"Width": 91, "Height": 17}"#).await?;
    terminal.send(STDIN, b"tty; sleep 1; stty size\n").await?;
    terminal.expect(STDOUT, "17 91").await?;
    ensure!(terminal.text(STDOUT).contains("/dev/pts/0"), "{}", terminal.text(STDOUT));
    drop(terminal);
    // It goes on without anyone attached, and for the next one.
    let mut again = cri.attach(&shell, true).await?;
    again.send(STDIN, b"exit 11\n").await?;
    note("a shell that was attached to", ending(cri, &shell).await?);

    let mut input = container("input", &["sh", "-c", "read line; echo got $line >&2; exit 5"]);
    (input.stdin, input.stdin_once) = (true, true);
    let input = cri.run_container(pod, input).await?;
    let mut streams = cri.attach(&input, false).await?;
    streams.send(STDIN, b"a line\n").await?;
    streams.expect(STDERR, "got a line\n").await?;
    note("one that reads", ending(cri, &input).await?);

    let keeper = cri.run_container(pod, container("keeper", &["sleep", "1000"])).await?;
    let script = "head -c 300000 | md5sum; echo err >&2; exit 42";
    let mut exec = cri.exec_streams(&keeper, &["sh", "-c", script], false).await?;
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for part in bytes.chunks(30_000) {
        exec.send(STDIN, part).await?;
    }
    note("exec's exit code", exec.exit_code().await?.to_string());
    note("exec's streams", format!("{}{}", exec.text(STDOUT), exec.text(STDERR)));
    let mut tty = cri.exec_streams(&keeper, &["sh", "-c", "tty; echo err >&2; exit 6"], true).await?;
    note("exit code of one with a terminal", tty.exit_code().await?.to_string());
    note("its terminal", tty.text(STDOUT));
    Ok(())
}

/// Statistics where CRI looks for them, and limits that change.
async fn measured(
    cri: &mut Cri,
    pod: &Pod,
    container: &str,
    note: &mut impl FnMut(&str, String) -> Option<String>,
) -> Result<()> {
    let address = cri.address(pod).await?;
    let ping =
        std::process::Command::new("ping").args(["-c", "3", "-i", "0.2", "-s", "1000", &address]).output()?;
    ensure!(ping.status.success(), "{ping:?}");
    let stats = cri.container_stats(container).await?;
    let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
    let used = cpu.usage_core_nano_seconds.unwrap_or_default().value;
    let set = memory.working_set_bytes.unwrap_or_default().value;
    ensure!(used > 1_000_000 && used < 600_000_000_000, "{used} ns of a processor");
    ensure!(set > 10_000 && set < 64 << 20, "a working set of {set} bytes");
    let stats = cri.pod_stats(pod).await?;
    let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
    let used = cpu.usage_core_nano_seconds.unwrap_or_default().value;
    ensure!(used > 1_000_000, "the pod used {used} ns of a processor");
    ensure!(memory.working_set_bytes.unwrap_or_default().value > 10_000, "{memory:?}");
    let network =
        stats.network.and_then(|network| network.default_interface).context("no network statistics")?;
    let bytes = |value: Option<cri::UInt64Value>| value.unwrap_or_default().value;
    let (received, sent) = (bytes(network.rx_bytes), bytes(network.tx_bytes));
    ensure!(
        network.name == "eth0" && received >= 3000 && sent >= 3000,
        "{received} in and {sent} out of 3,000 each"
    );

    let resources = |memory: i64, quota| LinuxContainerResources {
        memory_limit_in_bytes: memory * MIB,
        cpu_period: 100_000,
        cpu_quota: quota,
        ..LinuxContainerResources::default()
    };
    for (memory, quota) in [(80, 70_000), (48, 30_000)] {
        cri.update(container, resources(memory, quota)).await?;
        let seen = cri.said(container, "cd /sys/fs/cgroup; cat memory.max cpu.max").await?;
        note(&format!("updated to {memory}"), seen);
    }
    Ok(())
}
