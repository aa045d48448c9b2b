//! A pod's life through CRI, with everything that a kubelet asks of it; each pod runs under runc too, and the answers
//! are compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{
        self, Capability, ContainerConfig, Cri, Int64Value, LinuxContainerResources,
        LinuxContainerSecurityContext, Mount, NamespaceMode, NamespaceOption, Pod, SecurityProfile,
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
const QUESTIONS: [&str; 24] = [
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
    "grep -E '^Sig(Blk|Ign|Cgt)' /proc/1/status; ls /proc/1/fd | wc -l; tr '\\0' '\\n' < /proc/1/environ | sort",
    "cat /proc/self/uid_map /proc/self/setgroups",
    "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range net/core/somaxconn kernel/domainname",
    "ip -o link | awk '{ print $2, $5 }' | sed 's/@[^:]*//'; cat /sys/class/net/eth0/mtu; ls /sys/class/net",
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
    run_all(cri, plain, &[&["/nonexistent"], &["/etc"], &["sh", "-c", "kill -9 $$"], &["false"]], answers)
        .await;
    let late = cri.exec_within(plain, &["sleep", "600"], 1).await;
    answers
        .insert("exec that takes too long".into(), format!("{:?}", late.err().map(|status| status.code())));
    let left = cri.said(plain, "ps | grep -c '[s]leep 600'; true").await?;
    answers.insert("what is left of it".into(), left);
    attempt_all(cri, pod, Faulty::new()?.usual(), answers).await
}

/// A soak: each container takes an emulated machine seconds.
#[tokio::test]
#[ignore = "a soak"]
async fn what_fails_fails_as_it_does_elsewhere() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut all = Vec::new();
    for handler in HANDLERS {
        let mut answers = Answers::new();
        let pod = cri.run_pod(cri::pod_config("shim-fails"), handler).await;
        let pod = pod.with_context(|| node.containerd_log())?;
        let plain = cri.run_container(&pod, container("plain", &["sleep", "1000"])).await?;
        let commands: [&[&str]; 6] = [
            &["nonexistent"],
            &["/etc/hostname"],
            &[""],
            &[],
            &["sh", "-c", "kill -SEGV $$"],
            &["sh", "-c", "nonexistent"],
        ];
        run_all(&mut cri, &plain, &commands, &mut answers).await;
        attempt_all(&mut cri, &pod, Faulty::new()?.unusual(), &mut answers).await?;
        cri.remove_pod(&pod).await?;
        all.push(answers);
    }
    // Of these runc says that they started, and then that they failed.
    for (name, why) in [("container noise", "no program"), ("container orphan", "not there")] {
        let [ours, theirs] = [0, 1].map(|index| all[index].remove(name).unwrap_or_default());
        ensure!(ours == format!("not started: {why}; exit 128 StartError, {why}"), "{name}: {ours}");
        ensure!(theirs.starts_with("exit "), "{name}: {theirs}");
    }
    compare(&all[0], &all[1])?;
    before.assert_nothing_added()
}

/// Runs commands in a container, and notes how they end.
async fn run_all(cri: &mut Cri, container: &str, commands: &[&[&str]], answers: &mut Answers) {
    for command in commands {
        let ended = match cri.exec_within(container, command, 60).await {
            Ok(reply) => format!("exit {}", reply.exit_code),
            Err(status) => format!("refused: {}", reason(status.message())),
        };
        answers.insert(format!("exec of {command:?}"), ended);
    }
}

/// Runs containers in a pod, and notes how they end.
async fn attempt_all(
    cri: &mut Cri,
    pod: &Pod,
    configs: Vec<ContainerConfig>,
    answers: &mut Answers,
) -> Result<()> {
    for config in configs {
        let name = config.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default();
        answers.insert(format!("container {name}"), attempt(cri, pod, config).await?);
    }
    Ok(())
}

/// Files that no process can be made of, in a volume.
struct Faulty(tempfile::TempDir);

impl Faulty {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir_in("/var/tmp")?;
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
        for (name, content, mode) in [
            ("noise", "no program of any kind\n", 0o755),
            ("orphan", "#!/nonexistent\n", 0o755),
            ("roots", "#!/bin/sh\n", 0o700),
        ] {
            fs::write(directory.path().join(name), content)?;
            fs::set_permissions(directory.path().join(name), Permissions::from_mode(mode))?;
        }
        fs::create_dir(directory.path().join("closed"))?;
        fs::set_permissions(directory.path().join("closed"), Permissions::from_mode(0o700))?;
        Ok(Self(directory))
    }

    fn mount(&self, at: &str) -> Mount {
        let host_path = self.0.path().to_string_lossy().into_owned();
        Mount { container_path: at.into(), host_path, ..Mount::default() }
    }

    fn container(&self, name: &str, command: &[&str]) -> ContainerConfig {
        let mut config = container(name, command);
        config.mounts = vec![self.mount("/faulty")];
        config
    }

    /// One that runs in this directory, as this user.
    fn placed(&self, name: &str, command: &[&str], directory: &str, user: i64) -> ContainerConfig {
        let mut config = self.container(name, command);
        config.working_dir = directory.into();
        let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        context.run_as_user = Some(Int64Value { value: user });
        config
    }

    /// One with the volume mounted here.
    fn mounted(&self, name: &str, at: &str) -> ContainerConfig {
        let mut config = container(name, &["true"]);
        config.mounts = vec![self.mount(at)];
        config
    }

    /// Containers that end badly, each in another way.
    fn usual(&self) -> Vec<ContainerConfig> {
        vec![
            self.container("missing", &["/nonexistent"]),
            self.container("directory", &["/etc"]),
            self.placed("closed-directory", &["true"], "/faulty/closed", 1000),
        ]
    }

    /// More of them.
    fn unusual(&self) -> Vec<ContainerConfig> {
        let mut nobody = self.container("unknown-user", &["true"]);
        let context = nobody.linux.get_or_insert_default().security_context.get_or_insert_default();
        context.run_as_username = "nobody-knows".into();
        let here = ["sh", "-c", "[ $PWD = /no/such/directory ]"];
        vec![
            nobody,
            self.container("not-in-path", &["nonexistent"]),
            self.container("not-executable", &["/etc/hostname"]),
            self.container("empty-name", &[""]),
            self.container("noise", &["/faulty/noise"]),
            self.container("orphan", &["/faulty/orphan"]),
            self.container("exit-126", &["sh", "-c", "/etc/hostname"]),
            self.container("exit-127", &["sh", "-c", "nonexistent"]),
            self.container("exit-255", &["sh", "-c", "exit 255"]),
            self.container("out-of-time", &["sh", "-c", "ulimit -t 1; while :; do :; done"]),
            self.placed("not-permitted", &["/faulty/roots"], "", 1000),
            self.placed("user-of-no-name", &["sh", "-c", "exit $(id -u | tail -c 3)"], "", 12345),
            self.placed("new-directory", &here, "/no/such/directory", 0),
            self.placed("file-as-directory", &["true"], "/bin/busybox", 0),
            self.mounted("mount-below-a-file", "/etc/hostname/below"),
            self.mounted("mount-in-proc", "/proc/below"),
        ]
    }
}

/// What comes of a container: how it ends, or why it does not start.
async fn attempt(cri: &mut Cri, pod: &Pod, config: ContainerConfig) -> Result<String> {
    // The codes are not compared: ours tell what went wrong, runc's are all unknown.
    let refusal = |error: anyhow::Error| reason(&format!("{error:#}"));
    let container = match cri.create_container(pod, config).await {
        Ok(container) => container,
        Err(error) => return Ok(format!("not made: {}", refusal(error))),
    };
    let refused = cri.start_container(&container).await.err();
    let status = if refused.is_some() {
        cri.container_status(&container).await?
    } else {
        cri.wait(&container).await?
    };
    let told = reason(&status.message);
    let ended = format!("exit {} {}, {told}", status.exit_code, status.reason);
    cri.remove_container(&container).await?;
    Ok(refused.map_or_else(|| ended.clone(), |error| format!("not started: {}; {ended}", refusal(error))))
}

/// What the reader of an error learns from it, whatever the words around it.
fn reason(text: &str) -> String {
    let text = text.to_lowercase();
    let known = [
        ("no such file or directory", "not there"),
        ("executable file not found", "not there"),
        ("permission denied", "not permitted"),
        ("is a directory", "not permitted"),
        ("not a directory", "no directory"),
        ("exec format error", "no program"),
        ("no users found", "no such user"),
        ("needs a program", "not there"),
        ("args must not be empty", "not there"),
        ("args cannot be empty", "not there"),
        ("nonexistent", "by its name"),
    ];
    let found = known.iter().filter(|(words, _)| text.contains(words)).map(|(_, meaning)| *meaning);
    found.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
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
