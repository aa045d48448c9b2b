//! The main job, shown: pods in machines of their own, through containerd. Every line comes from the run itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::SERVERS_IMAGE,
    cost::{self, Times, timed},
    cri::{self, Cri, Pod},
    ctr::{self, Ctr},
    leaks::Holdings,
    node::{Node, Product},
};

/// How long redis may take to answer, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What both sides are asked, as a title and a line for the shell.
const QUESTIONS: [(&str, &str); 6] = [
    ("kernel", "uname -r"),
    ("processors", "grep -c ^processor /proc/cpuinfo"),
    ("memory, MiB", "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo"),
    ("processes in sight", "ls /proc | grep -c '^[0-9]'"),
    ("/dev/kvm", "[ -e /dev/kvm ] && echo there || echo absent"),
    ("containerd's socket", "ls /run/containerd/*.ttrpc $CAISSON_CONTAINERD/*.sock 2>/dev/null | wc -l"),
];

/// Runs pods, prints what they and the host see, removes them.
///
/// # Errors
/// When a pod fails, or leaves something behind.
pub(crate) async fn run() -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    println!("containerd: {}", Ctr::new(&node).run(&["--version"])?.trim());
    let images = Ctr::at(node.socket(), "k8s.io");
    import_servers(&images)?;

    // runc first: it makes the bridge, which stays for as long as containerd.
    let warm = cost::a_pods_life(&mut cri, "warm", "runc").await?;
    drop(warm);
    let before = Holdings::now()?;
    let runc = cost::a_pods_life(&mut cri, "beside", "runc").await?;

    println!("\n== a pod with a shell, through the handler `caisson`");
    let (shell_pod, shell, times) = cost::start_pod(&mut cri, "shell", "caisson").await?;
    print_times(&times, &runc);
    print_phases(&node.containerd_log());
    print_views(&mut cri, &shell).await?;

    println!("\n== a pod with redis");
    let (redis_pod, address) = redis(&mut cri).await?;
    let image = MountedImage::new(&images)?;
    wait_for_redis(&image, &address)?;
    for words in [&["SET", "greeting", "hello from a machine of its own"][..], &["GET", "greeting"]] {
        println!("redis-cli -h {address} {}: {}", words.join(" "), image.redis_cli(&address, words)?.trim());
    }
    let version = image.redis_cli(&address, &["INFO", "server"])?;
    for line in version.lines().filter(|line| line.starts_with("redis_version") || line.starts_with("os:")) {
        println!("redis says {}", line.trim());
    }
    image.unmount()?;

    println!("\n== memory of both pods (proportional set size)");
    for (process, kib) in cost::pss_kib()? {
        println!("{process:28} {:>5} MiB", kib.div_ceil(1024));
    }

    println!("\n== removed");
    for pod in [&shell_pod, &redis_pod] {
        cri.remove_pod(pod).await?;
    }
    before.assert_nothing_added()?;
    println!(
        "no process, mount, cgroup, link, qdisc, namespace, block device, socket, id range or directory of theirs is left"
    );
    Ok(())
}

fn import_servers(images: &Ctr) -> Result<()> {
    let archive = Product::Images.path()?.join("servers.tar");
    images.run(&["images".as_ref(), "import".as_ref(), archive.as_os_str()])?;
    Ok(())
}

fn print_times(caisson: &Times, runc: &Times) {
    println!("{:20} {:>10} {:>10}", "", "caisson", "runc");
    for ((call, ours), (_, theirs)) in caisson.0.iter().zip(&runc.0) {
        println!("{call:20} {:>7.0} ms {:>7.0} ms", millis(*ours), millis(*theirs));
    }
    let (ours, theirs) = (caisson.until_started(), runc.until_started());
    println!("{:20} {:>7.0} ms {:>7.0} ms", "until started", millis(ours), millis(theirs));
}

/// Where the time of the pod's machine goes, which is most of `run_pod_sandbox`.
fn print_phases(log: &str) {
    println!("of run_pod_sandbox, in caisson's shim:");
    for (phase, time) in cost::phases(log, timed::START).last().into_iter().flatten() {
        println!("  {phase:18} {time:>7.1} ms");
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What the container sees beside what this machine sees.
async fn print_views(cri: &mut Cri, container: &str) -> Result<()> {
    println!("{:20} {:>24} {:>24}", "", "in the container", "outside");
    for (title, line) in QUESTIONS {
        let inside = cri.exec(container, &["sh", "-c", line]).await?;
        let inside = String::from_utf8_lossy(&inside.stdout).trim().to_owned();
        let outside = ctr::run(Command::new("sh").args(["-c", line]))?;
        println!("{title:20} {inside:>24} {:>24}", outside.stdout.trim());
    }
    Ok(())
}

/// A pod that serves redis, and its address.
async fn redis(cri: &mut Cri) -> Result<(Pod, String)> {
    let pod = cri.run_pod(cri::pod_config("redis"), "caisson").await?;
    let command = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    cri.run_container(&pod, cri::container_config("redis", SERVERS_IMAGE, &command)).await?;
    let address = cri.pod_status(&pod).await?.network.map(|network| network.ip).unwrap_or_default();
    ensure!(!address.is_empty(), "the pod has no address");
    Ok((pod, address))
}

fn wait_for_redis(image: &MountedImage, address: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match image.redis_cli(address, &["PING"]) {
            Ok(answer) if answer.trim() == "PONG" => return Ok(()),
            Ok(answer) if Instant::now() > deadline => anyhow::bail!("redis said {answer:?}"),
            Err(error) if Instant::now() > deadline => return Err(error.context("redis did not answer")),
            _ => std::thread::sleep(Duration::from_millis(300)),
        }
    }
}

/// The servers' image, mounted on this machine for its redis-cli.
struct MountedImage<'a> {
    images: &'a Ctr,
    at: PathBuf,
}

impl<'a> MountedImage<'a> {
    fn new(images: &'a Ctr) -> Result<Self> {
        let at = std::env::temp_dir().join("servers");
        fs::create_dir_all(&at).with_context(|| format!("making {}", at.display()))?;
        images.run(&["images".as_ref(), "mount".as_ref(), SERVERS_IMAGE.as_ref(), at.as_os_str()])?;
        Ok(Self { images, at })
    }

    fn redis_cli(&self, address: &str, words: &[&str]) -> Result<String> {
        let mut command = Command::new("chroot");
        command.arg(&self.at).args(["redis-cli", "-h", address]).args(words);
        let output = ctr::run(&mut command)?;
        ensure!(output.code == 0, "redis-cli exited with {}: {}", output.code, output.stderr.trim());
        Ok(output.stdout)
    }

    fn unmount(self) -> Result<()> {
        let at: &Path = &self.at;
        self.images.run(&["images".as_ref(), "unmount".as_ref(), "--rm".as_ref(), at.as_os_str()])?;
        fs::remove_dir(at).with_context(|| format!("removing {}", at.display()))
    }
}
