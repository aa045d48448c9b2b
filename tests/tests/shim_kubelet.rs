//! What a kubelet mounts into containers, seen from inside; under runc too, and the answers are compared.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{
        self, ContainerConfig, Cri, Device, HugepageLimit, LinuxContainerResources, Mount, MountPropagation,
        Pod,
    },
    leaks,
};

const HANDLERS: [&str; 2] = ["caisson", "runc"];
/// How long a change may take to be seen, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(30);
const DISK: usize = 4 << 20;
/// Of huge pages, for a container.
const HUGE: u64 = 6 << 20;
/// Perl is on every Debian. With this machine's `/usr` at `/node`, a container runs it too.
const PERL: &str = "/node/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /node/lib/x86_64-linux-gnu \
                    /node/bin/perl";
/// Prints what inotify(7) tells of names that come to a directory, and of names that leave it. Names that only last
/// while a volume is written are left out.
const WATCH: &str = r#"
    $path = "/config"; $| = 1; $fd = syscall(294, 0); syscall(254, $fd, $path, 0x80 | 0x200 | 0x100);
    open(EVENTS, "<&=", $fd); print "ready\n";
    while (sysread(EVENTS, $got, 4096)) { while (length $got) {
        ($watch, $mask, $cookie, $length) = unpack("iIII", $got);
        $name = unpack("Z*", substr($got, 16, $length)); substr($got, 0, 16 + $length) = "";
        printf("%x %s\n", $mask & 0xfff, $name) unless $name =~ /tmp|new/;
    } }"#;
/// Takes so many bytes of huge pages: fallocate(2).
const TAKE_HUGE: &str = r#"
    for $size (@ARGV) {
        open(FILE, ">", "/huge/$size") or die; $! = 0; syscall(285, fileno(FILE), 0, 0, $size << 20);
        print "$size MiB: ", $! ? "refused" : "taken", "\n";
    }"#;
/// Holds a lock, and answers at a socket.
const SERVE: &str = r#"
    open(LOCK, ">", "/scratch/sub/lock"); flock(LOCK, 2);
    socket(SERVER, 1, 1, 0); bind(SERVER, pack("Sa*", 1, "/scratch/sub/socket\0")); listen(SERVER, 5);
    while (accept(CLIENT, SERVER)) { print CLIENT "from the other side\n"; close(CLIENT); }"#;
/// Tries the lock, and asks at the socket, by way of the whole volume and of a part of it.
const ASK: &str = r#"
    for $at ("/scratch/sub", "/sub") {
        until (-S "$at/socket") { sleep(1); }
        open(LOCK, ">", "$at/lock"); print flock(LOCK, 2 | 4) ? "free\n" : "held\n"; close(LOCK);
        socket(SERVER, 1, 1, 0); connect(SERVER, pack("Sa*", 1, "$at/socket\0")) or die $!; print <SERVER>;
    }"#;

type Answers = BTreeMap<String, String>;

fn run(line: &str) -> Result<String> {
    let output = Command::new("sh").args(["-ec", line]).output().context("starting sh")?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The pod's name, which begins its uid.
const POD: &str = "shim-volumes";
/// A volume of another pod's.
const OTHERS: &str = "../other-uid/volumes/kubernetes.io~empty-dir/memory";

/// A pod's directory, as a kubelet makes it. What is mounted there goes with it.
struct Kubelet {
    directory: tempfile::TempDir,
    disk: String,
}

impl Kubelet {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir_in("/var/tmp")?;
        let image = directory.path().join("disk");
        fs::write(&image, [b"on the disk\n".to_vec(), vec![0; DISK - 12]].concat())?;
        let disk = run(&format!("losetup --find --show {}", image.display()))?;
        let kubelet = Self { directory, disk };
        for name in [
            "host",
            "empty-dir/scratch/sub",
            "configmap/config",
            "projected/all",
            "secret/secret",
            "empty-dir/memory",
            "empty-dir/shm",
            "empty-dir/huge",
            OTHERS,
        ] {
            fs::create_dir_all(kubelet.path(name))?;
        }
        for (name, kind, options) in [
            ("secret/secret", "tmpfs", "size=1m"),
            ("empty-dir/memory", "tmpfs", "size=2m,mode=0777"),
            ("empty-dir/shm", "tmpfs", "size=3m,mode=0777"),
            ("empty-dir/huge", "hugetlbfs", "pagesize=2M"),
            (OTHERS, "tmpfs", "size=1m"),
        ] {
            run(&format!("mount -t {kind} -o {options} none {}", kubelet.path(name).display()))?;
        }
        fs::write(kubelet.path("host/file"), "from the host\n")?;
        chown(kubelet.path("host/file"), Some(1000), Some(2000))?;
        fs::write(kubelet.path("empty-dir/scratch/sub/below"), "below\n")?;
        fs::write(kubelet.path(OTHERS).join("file"), "another pod's\n")?;
        fs::write(kubelet.path("termination"), "")?;
        fs::write(kubelet.path("hosts"), "10.1.2.3 alias.test\n")?;
        kubelet.publish("configmap/config", "..2026_1", "one\n", 0o644)?;
        kubelet.publish("projected/all", "..2026_1", "token\n", 0o444)?;
        kubelet.publish("secret/secret", "..2026_1", "secret\n", 0o400)?;
        Ok(kubelet)
    }

    /// Where something is: a volume by its kind and name, or what is no volume.
    fn path(&self, name: &str) -> PathBuf {
        let (kind, rest) = name.split_once('/').unwrap_or((name, ""));
        let root = self.directory.path().join(format!("pods/{POD}-uid"));
        match kind {
            "configmap" | "secret" | "projected" | "empty-dir" => {
                root.join(format!("volumes/kubernetes.io~{kind}")).join(rest)
            }
            _ => root.join(name),
        }
    }

    /// Writes a volume's files as the kubelet does: aside, and then in one step in the place of the old ones.
    fn publish(&self, volume: &str, version: &str, content: &str, mode: u32) -> Result<()> {
        let root = self.path(volume);
        fs::create_dir(root.join(version))?;
        let file = root.join(version).join("key");
        fs::write(&file, content)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        let old = fs::read_link(root.join("..data")).ok();
        symlink(version, root.join("..data_tmp"))?;
        fs::rename(root.join("..data_tmp"), root.join("..data"))?;
        if !root.join("key").is_symlink() {
            symlink("..data/key", root.join("key"))?;
        }
        if let Some(old) = old {
            fs::remove_dir_all(root.join(old))?;
        }
        Ok(())
    }

    fn mount(&self, at: &str, name: &str, readonly: bool) -> Mount {
        let host_path = self.path(name).to_string_lossy().into_owned();
        Mount { container_path: at.into(), host_path, readonly, ..Mount::default() }
    }

    /// What a kubelet mounts for a `subPath`: it makes the directory if it is missing, and mounts it aside.
    fn sub_path(&self, at: &str, volume: &str, path: &str, container: &str) -> Result<Mount> {
        let found = self.path(volume).join(path);
        if !found.exists() {
            for part in Path::new(path).ancestors().filter(|part| !part.as_os_str().is_empty()) {
                let part = self.path(volume).join(part);
                fs::create_dir_all(&part)?;
                fs::set_permissions(&part, fs::Permissions::from_mode(0o770))?;
                chown(&part, Some(0), Some(3000))?;
            }
        }
        let (_, name) = volume.split_once('/').context("no volume")?;
        let point = format!("volume-subpaths/{name}/{container}/{}", at.replace('/', "-"));
        let target = self.path(&point);
        if !target.exists() {
            fs::create_dir_all(target.parent().context("no parent")?)?;
            let make = if found.is_dir() { "mkdir" } else { "touch" };
            run(&format!("{make} {1}; mount --bind {0} {1}", found.display(), target.display()))?;
        }
        Ok(self.mount(at, &point, false))
    }

    fn mounts(&self, container: &str) -> Result<Vec<Mount>> {
        let slave = Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..self.mount("/slave", "host", false)
        };
        let node = Mount {
            container_path: "/node".into(),
            host_path: "/usr".into(),
            readonly: true,
            ..Mount::default()
        };
        Ok(vec![
            self.mount("/host", "host", false),
            self.mount("/host-ro", "host", true),
            self.mount("/file", "host/file", true),
            self.mount("/config", "configmap/config", true),
            self.sub_path("/key", "configmap/config", "key", container)?,
            self.mount("/projected", "projected/all", true),
            self.mount("/secret", "secret/secret", true),
            self.mount("/scratch", "empty-dir/scratch", false),
            self.sub_path("/sub", "empty-dir/scratch", "sub", container)?,
            // Before the whole: the order must not matter.
            self.sub_path("/memory-sub", "empty-dir/memory", "one/two", container)?,
            self.mount("/memory", "empty-dir/memory", false),
            self.mount("/dev/shm", "empty-dir/shm", false),
            self.mount("/huge", "empty-dir/huge", false),
            self.mount("/others", OTHERS, true),
            self.mount("/dev/termination-log", "termination", false),
            self.mount("/etc/hosts", "hosts", false),
            slave,
            node,
        ])
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        // What remains is found by the test's look at what it leaves.
        let _ = leaks::unmount_below(self.directory.path());
        let _ = run(&format!("losetup --detach {}", self.disk));
    }
}

/// What is asked of a container with all of it.
const QUESTIONS: [&str; 21] = [
    "cat /host/file /host-ro/file /file; stat -c '%a %u %g' /host/file",
    "echo x > /host-ro/new; echo x > /file; touch /config/new; echo x > /secret/key; echo $?",
    "cat /others/file; touch /others/new",
    "echo back > /host/back; chown 7:8 /host/back; chmod 4755 /host/back; ln -s back /host/link; mkdir /host/dir",
    "ls -a /config | sort; cat /config/key /key /projected/key; readlink /config/key; readlink /config/..data",
    "stat -c '%a %u %g' /config /secret /secret/key; stat -L -c '%a %u %g %s' /config/key /secret/key; cat /secret/key",
    "cat /scratch/sub/below /sub/below; echo more >> /sub/below; cat /scratch/sub/below",
    "stat -f -c %T /memory /dev/shm; stat -c '%a %u %g' /memory /dev/shm; awk '$2 == \"/huge\" { print $3 }' /proc/mounts",
    "df -k /memory /memory-sub /dev/shm | awk '{ print $2 }'",
    "dd if=/dev/zero of=/memory/full bs=64k count=100 2>&1 | grep -c 'No space'; stat -c %s /memory/full; rm /memory/full",
    "echo kept > /memory/kept; echo shm > /dev/shm/file; ls -R /memory",
    "stat -c '%a %u %g' /memory-sub /memory/one /memory/one/two; echo sub > /memory-sub/file; cat /memory/one/two/file",
    "echo the end > /dev/termination-log; cat /dev/termination-log",
    "cat /etc/hosts; echo more >> /etc/hosts; tail -1 /etc/hosts",
    "hostname; cat /etc/hostname; cat /etc/resolv.conf",
    "ls -l /dev/disk | awk '{ print $1, $3, $4 }'; blockdev --getsize64 /dev/disk; head -c 12 /dev/disk",
    "printf written | dd of=/dev/disk bs=512 seek=1 conv=fsync 2>/dev/null; dd if=/dev/disk bs=512 skip=1 count=1 2>/dev/null | head -c 7",
    "awk '$2 ~ /^.(host|config|secret|memory|file|key|sub|node)/ { print $2, substr($4, 1, 2) }' /proc/mounts | sort",
    "ls /slave | sort",
    "cd /sys/fs/cgroup; cat hugetlb.2MB.max; $PERL -e \"$HUGE\" 4 8; cat hugetlb.2MB.current",
    "rm /huge/*; cat /sys/fs/cgroup/hugetlb.2MB.current",
];

#[tokio::test]
async fn a_kubelets_volumes_are_what_they_are_elsewhere() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut all = Vec::new();
    // For runc, this machine's: taken from free memory when they are asked for.
    fs::write("/proc/sys/vm/nr_overcommit_hugepages", "8")?;
    for handler in HANDLERS {
        let kubelet = Kubelet::new()?;
        let pod = cri.run_pod(cri::pod_config(POD), handler).await;
        let pod = pod.with_context(|| node.containerd_log())?;
        let mut answers = Answers::new();
        let asked = ask(&mut cri, &pod, &kubelet, &mut answers).await;
        asked.with_context(|| format!("with {handler}; {answers:?}\n{}", node.containerd_log()))?;
        cri.remove_pod(&pod).await?;
        look_at_the_host(&kubelet)?;
        all.push(answers);
    }
    fs::write("/proc/sys/vm/nr_overcommit_hugepages", "0")?;
    let differ: Vec<_> = all[1]
        .iter()
        .filter(|(question, theirs)| all[0].get(*question) != Some(theirs))
        .map(|(question, theirs)| {
            format!("--- {question}\ncaisson: {:?}\nrunc: {theirs:?}", all[0].get(question))
        })
        .collect();
    ensure!(differ.is_empty(), "{}", differ.join("\n"));
    before.assert_nothing_added()
}

fn user(kubelet: &Kubelet, name: &str) -> Result<ContainerConfig> {
    let script = format!("{PERL} -e '{WATCH}' > /scratch/events & exec {PERL} -e '{SERVE}'");
    let mut config = cri::container_config(name, BUSYBOX_IMAGE, &["sh", "-c", &script]);
    config.mounts = kubelet.mounts(name)?;
    let host_path = kubelet.disk.clone();
    config.devices =
        vec![Device { container_path: "/dev/disk".into(), host_path, permissions: "rwm".into() }];
    let huge = HugepageLimit { page_size: "2MB".into(), limit: HUGE };
    let resources =
        LinuxContainerResources { hugepage_limits: vec![huge], ..LinuxContainerResources::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    Ok(config)
}

async fn ask(cri: &mut Cri, pod: &Pod, kubelet: &Kubelet, answers: &mut Answers) -> Result<()> {
    let container = cri.run_container(pod, user(kubelet, "user")?).await?;
    let questions: String = QUESTIONS.iter().map(|line| format!("({line}) 2>&1; echo @@@@;")).collect();
    let script = format!("PERL='{PERL}'; HUGE='{TAKE_HUGE}'; {questions}");
    let said = cri.said(&container, &script).await?;
    let parts: Vec<_> = said.split("@@@@\n").collect();
    ensure!(parts.len() == QUESTIONS.len() + 1, "{said}");
    for (question, answer) in QUESTIONS.iter().zip(parts) {
        answers.insert((*question).to_owned(), answer.to_owned());
    }

    // The kubelet swaps a volume's files: whoever watches them hears of it, and finds the new ones.
    let events = || Ok(fs::read_to_string(kubelet.path("empty-dir/scratch/events"))?);
    wait_for(events, "ready\n").await?;
    kubelet.publish("configmap/config", "..2026_2", "two\n", 0o640)?;
    answers.insert("what a watcher hears".into(), wait_for(events, "200 ..2026_1\n").await?);
    kubelet.publish("projected/all", "..2026_2", "next token\n", 0o444)?;
    let seen = "until grep -q next /projected/key; do sleep 0.1; done; cat /projected/key";
    answers.insert("a new token".into(), cri.said(&container, seen).await?);
    let after =
        cri.said(&container, "cat /config/key /key; ls -a /config | sort; stat -L -c %a /config/key").await?;
    answers.insert("after the swap".into(), after);

    // What the host mounts later is seen where that was asked for.
    fs::create_dir(kubelet.path("host/late"))?;
    run(&format!("mount -t tmpfs none {0}; echo late > {0}/file", kubelet.path("host/late").display()))?;
    let late = cri.said(&container, "cat /slave/late/file; ls /host/late").await?;
    answers.insert("a late mount".into(), late);
    unmount(&kubelet.path("host/late")).await?;
    let gone = cri.said(&container, "ls /slave/late").await?;
    answers.insert("its end".into(), gone);

    // Another container of the pod, and one that comes when the first is gone.
    let mut other = user(kubelet, "other")?;
    other.command = vec!["sleep".into(), "1000".into()];
    let other = cri.run_container(pod, other).await?;
    let shared = "cat /memory/kept /memory-sub/file /dev/shm/file /config/key /key; \
                  dd if=/dev/disk bs=512 skip=1 count=1 2>/dev/null | head -c 7";
    answers.insert("another container".into(), cri.said(&other, shared).await?);
    // They share files as processes of one machine do.
    let asking = format!("{PERL} -e '{ASK}'; echo news > /scratch/news");
    answers.insert("between containers".into(), cri.said(&other, &asking).await?);
    answers.insert("at once".into(), cri.said(&container, "cat /scratch/news").await?);
    cri.stop_container(&container, 0).await?;
    cri.remove_container(&container).await?;
    answers.insert("after the first is gone".into(), cri.said(&other, shared).await?);
    Ok(())
}

async fn wait_for(read: impl Fn() -> Result<String>, part: &str) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = read()?;
        if text.contains(part) {
            return Ok(text);
        }
        ensure!(Instant::now() < deadline, "{part} is not in {text:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// As a kubelet does: it is tried again while somebody uses it.
async fn unmount(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = run(&format!("umount {}", path.display())) {
        ensure!(Instant::now() < deadline, "{error:#}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// What the containers did, on the host.
fn look_at_the_host(kubelet: &Kubelet) -> Result<()> {
    let told = run(&format!(
        "cd {}; cat termination; stat -c '%a %u %g' host/back; readlink host/link",
        kubelet.path("").display()
    ))?;
    ensure!(told == "the end\n4755 7 8\nback", "{told}");
    let disk = fs::read(kubelet.directory.path().join("disk"))?;
    ensure!(disk[512..519] == *b"written", "{:?}", &disk[512..519]);
    Ok(())
}
