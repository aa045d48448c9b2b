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
    cri::{self, ContainerConfig, Cri, Device, ImageSpec, Mount, MountPropagation, Pod, VersionRequest},
    leaks,
    node::Node,
};

const HANDLERS: [&str; 2] = ["caisson", "runc"];
/// How long a change may take to be seen, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(30);
const DISK: usize = 4 << 20;

type Answers = BTreeMap<String, String>;

fn run(line: &str) -> Result<String> {
    let output = Command::new("sh").args(["-ec", line]).output().context("starting sh")?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

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
            "secret/secret",
            "empty-dir/memory",
            "empty-dir/shm",
            "empty-dir/huge",
        ] {
            fs::create_dir_all(kubelet.volume(name))?;
        }
        for (name, kind, options) in [
            ("secret/secret", "tmpfs", "size=1m"),
            ("empty-dir/memory", "tmpfs", "size=2m,mode=0777"),
            ("empty-dir/shm", "tmpfs", "size=3m,mode=0777"),
            ("empty-dir/huge", "hugetlbfs", "pagesize=2M"),
        ] {
            run(&format!("mount -t {kind} -o {options} none {}", kubelet.volume(name).display()))?;
        }
        fs::write(kubelet.volume("host/file"), "from the host\n")?;
        chown(kubelet.volume("host/file"), Some(1000), Some(2000))?;
        fs::write(kubelet.volume("empty-dir/scratch/sub/below"), "below\n")?;
        for name in ["termination", "hosts"] {
            fs::write(kubelet.volume(name), "")?;
        }
        fs::write(kubelet.volume("hosts"), "10.1.2.3 alias.test\n")?;
        kubelet.publish("configmap/config", "..2026_1", "one\n", 0o644)?;
        kubelet.publish("secret/secret", "..2026_1", "secret\n", 0o400)?;
        Ok(kubelet)
    }

    fn volume(&self, name: &str) -> PathBuf {
        let (kind, rest) = name.split_once('/').unwrap_or((name, ""));
        let root = self.directory.path();
        match kind {
            "configmap" | "secret" | "empty-dir" => root.join(format!("kubernetes.io~{kind}")).join(rest),
            _ => root.join(name),
        }
    }

    /// Writes a volume's files as the kubelet does: aside, and then in one step in the place of the old ones.
    fn publish(&self, volume: &str, version: &str, content: &str, mode: u32) -> Result<()> {
        let root = self.volume(volume);
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

    fn mount(&self, at: &str, volume: &str, readonly: bool) -> Mount {
        let host_path = self.volume(volume).to_string_lossy().into_owned();
        Mount { container_path: at.into(), host_path, readonly, ..Mount::default() }
    }

    fn mounts(&self) -> Vec<Mount> {
        let slave = Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..self.mount("/slave", "host", false)
        };
        vec![
            self.mount("/host", "host", false),
            self.mount("/host-ro", "host", true),
            self.mount("/file", "host/file", true),
            self.mount("/config", "configmap/config", true),
            self.mount("/key", "configmap/config/key", true),
            self.mount("/secret", "secret/secret", true),
            self.mount("/scratch", "empty-dir/scratch", false),
            self.mount("/sub", "empty-dir/scratch/sub", false),
            self.mount("/memory", "empty-dir/memory", false),
            self.mount("/dev/shm", "empty-dir/shm", false),
            self.mount("/huge", "empty-dir/huge", false),
            self.mount("/dev/termination-log", "termination", false),
            self.mount("/etc/hosts", "hosts", false),
            slave,
        ]
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
const QUESTIONS: [&str; 18] = [
    "cat /host/file /host-ro/file /file; stat -c '%a %u %g' /host/file",
    "echo x > /host-ro/new; echo x > /file; touch /config/new; echo x > /secret/key; echo $?",
    "echo back > /host/back; chown 7:8 /host/back; chmod 4755 /host/back; ln -s back /host/link; mkdir /host/dir",
    "ls -a /config | sort; cat /config/key /key; readlink /config/key /config/..data",
    "stat -L -c '%a %u %g %s' /config /config/key /secret/key; cat /secret/key",
    "cat /scratch/sub/below /sub/below; echo more >> /sub/below; cat /scratch/sub/below",
    "stat -f -c %T /memory /dev/shm /huge; stat -c '%a %u %g' /memory /dev/shm",
    "df -k /memory /dev/shm | awk '{ print $2 }'",
    "dd if=/dev/zero of=/memory/full bs=64k count=100 2>&1 | grep -c 'No space'; stat -c %s /memory/full; rm /memory/full",
    "echo kept > /memory/kept; echo shm > /dev/shm/file",
    "echo the end > /dev/termination-log; cat /dev/termination-log",
    "cat /etc/hosts; echo more >> /etc/hosts; tail -1 /etc/hosts",
    "hostname; cat /etc/hostname; cat /etc/resolv.conf",
    "ls -l /dev/disk | awk '{ print $1, $3, $4 }'; blockdev --getsize64 /dev/disk; head -c 12 /dev/disk",
    "printf written | dd of=/dev/disk bs=512 seek=1 conv=fsync 2>/dev/null; dd if=/dev/disk bs=512 skip=1 count=1 2>/dev/null | head -c 7",
    "awk '$2 ~ /^.(host|config|secret|memory|file|key|sub)/ { print $2, substr($4, 1, 2) }' /proc/mounts | sort",
    "mknod /tmp/node b 8 0 && cat /tmp/node; echo $?",
    "ls /slave | sort",
];

#[tokio::test]
async fn a_kubelets_volumes_are_what_they_are_elsewhere() -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    let before = cri::with_bridge(&mut cri).await?;
    let mut all = Vec::new();
    for handler in HANDLERS {
        let kubelet = Kubelet::new()?;
        let pod = cri.run_pod(cri::pod_config("shim-volumes"), handler).await;
        let pod = pod.with_context(|| node.containerd_log())?;
        let mut answers = Answers::new();
        let asked = ask(&mut cri, &pod, &kubelet, &mut answers).await;
        asked.with_context(|| format!("with {handler}; {answers:?}\n{}", node.containerd_log()))?;
        cri.remove_pod(&pod).await?;
        look_at_the_host(&kubelet)?;
        all.push(answers);
    }
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

fn user(kubelet: &Kubelet, name: &str) -> ContainerConfig {
    let script = "inotifyd - /config:y > /scratch/events & exec sleep 1000";
    let mut config = cri::container_config(name, BUSYBOX_IMAGE, &["sh", "-c", script]);
    config.mounts = kubelet.mounts();
    let host_path = kubelet.disk.clone();
    config.devices =
        vec![Device { container_path: "/dev/disk".into(), host_path, permissions: "rwm".into() }];
    config
}

async fn ask(cri: &mut Cri, pod: &Pod, kubelet: &Kubelet, answers: &mut Answers) -> Result<()> {
    let container = cri.run_container(pod, user(kubelet, "user")).await?;
    let script: String = QUESTIONS.iter().map(|line| format!("({line}) 2>&1; echo @@@@;")).collect();
    let said = cri.said(&container, &script).await?;
    let parts: Vec<_> = said.split("@@@@\n").collect();
    ensure!(parts.len() == QUESTIONS.len() + 1, "{said}");
    for (question, answer) in QUESTIONS.iter().zip(parts) {
        answers.insert((*question).to_owned(), answer.to_owned());
    }

    // The kubelet swaps a volume's files: whoever watches them hears of it, and finds the new ones.
    kubelet.publish("configmap/config", "..2026_2", "two\n", 0o640)?;
    let events =
        wait_for(|| Ok(fs::read_to_string(kubelet.volume("empty-dir/scratch/events"))?), "..data").await?;
    answers.insert("what a watcher hears".into(), events);
    let after =
        cri.said(&container, "cat /config/key /key; ls -a /config | sort; stat -L -c %a /config/key").await?;
    answers.insert("after the swap".into(), after);

    // What the host mounts later is seen where that was asked for.
    fs::create_dir(kubelet.volume("host/late"))?;
    run(&format!("mount -t tmpfs none {0}; echo late > {0}/file", kubelet.volume("host/late").display()))?;
    let late = cri.said(&container, "cat /slave/late/file; ls /host/late").await?;
    answers.insert("a late mount".into(), late);
    run(&format!("umount {}", kubelet.volume("host/late").display()))?;
    let gone = cri.said(&container, "ls /slave/late").await?;
    answers.insert("its end".into(), gone);

    // Another container of the pod, and one that comes when the first is gone.
    let mut other = user(kubelet, "other");
    other.command = vec!["sleep".into(), "1000".into()];
    let other = cri.run_container(pod, other).await?;
    let shared = "cat /memory/kept /dev/shm/file /config/key; dd if=/dev/disk bs=512 skip=1 count=1 2>/dev/null | head -c 7";
    answers.insert("another container".into(), cri.said(&other, shared).await?);
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

/// What the containers did, on the host.
fn look_at_the_host(kubelet: &Kubelet) -> Result<()> {
    let told = run(&format!(
        "cd {}; cat termination; stat -c '%a %u %g' host/back; readlink host/link",
        kubelet.directory.path().display()
    ))?;
    ensure!(told == "the end\n4755 7 8\nback", "{told}");
    let disk = fs::read(kubelet.directory.path().join("disk"))?;
    ensure!(disk[512..519] == *b"written", "{:?}", &disk[512..519]);
    Ok(())
}

#[tokio::test]
async fn an_image_is_a_volume() -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    let version = cri.raw().version(VersionRequest::default()).await?.into_inner().runtime_version;
    let numbers: Vec<u32> =
        version.trim_start_matches('v').split('.').map_while(|number| number.parse().ok()).collect();
    let before = cri::with_bridge(&mut cri).await?;
    let pod = cri.run_pod(cri::pod_config("shim-image"), "caisson").await?;
    let mut config = cri::container_config("user", BUSYBOX_IMAGE, &["sleep", "1000"]);
    let image = ImageSpec { image: BUSYBOX_IMAGE.into(), ..ImageSpec::default() };
    config.mounts = vec![Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(image),
        ..Mount::default()
    }];
    let started = cri.run_container(&pod, config).await;
    if numbers < vec![2, 1] {
        // Older ones know of no such volumes, whatever the runtime.
        ensure!(started.is_err(), "containerd {version} has image volumes");
    } else {
        let user = started.with_context(|| node.containerd_log())?;
        let said = cri.said(&user, "cmp /bin/busybox /image/bin/busybox; touch /image/new; echo $?").await?;
        ensure!(said == "1\n", "{said}");
    }
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}

/// A share of mounts in both directions can't be had with a machine in between.
#[tokio::test]
async fn mounts_that_should_appear_on_the_host_are_refused() -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    let before = cri::with_bridge(&mut cri).await?;
    let pod = cri.run_pod(cri::pod_config("shim-shared"), "caisson").await?;
    let volume = tempfile::tempdir_in("/var/tmp")?;
    run(&format!("mount --bind {0} {0}; mount --make-shared {0}", volume.path().display()))?;
    let mut config = cri::container_config("user", BUSYBOX_IMAGE, &["true"]);
    config.mounts = vec![Mount {
        container_path: "/shared".into(),
        host_path: volume.path().to_string_lossy().into_owned(),
        propagation: MountPropagation::PropagationBidirectional.into(),
        ..Mount::default()
    }];
    let refused = cri.run_container(&pod, config).await;
    run(&format!("umount {}", volume.path().display()))?;
    let told = format!("{:#}", refused.err().context("it runs")?);
    ensure!(told.contains("cannot appear on the host"), "{told}");
    cri.remove_pod(&pod).await?;
    before.assert_nothing_added()
}
