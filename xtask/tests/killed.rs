//! Real commands, killed midway: nothing of them may stay, and the next run must not trip over anything.
//!
//! `cargo xtask test` runs these with a warm cache, when what the first one needs has been built.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// In the environment of a command under test, and so of all that it starts.
const MARK: &str = "XTASK_KILL_TEST";

/// A command and what the machine held before it.
struct Victim {
    child: Child,
    mark: String,
    before: Held,
}

/// What a killed command could leave on the machine.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    mounts: BTreeSet<String>,
    loop_devices: BTreeSet<String>,
}

impl Held {
    fn now() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect();
        let block = fs::read_dir("/sys/block").unwrap().flatten();
        let bound = block.filter(|device| device.path().join("loop/backing_file").exists());
        let loop_devices = bound.map(|device| device.file_name().to_string_lossy().into_owned()).collect();
        Self { mounts, loop_devices }
    }
}

impl Victim {
    fn start(arguments: &[&str], cache: Option<&Path>) -> Self {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mark = format!("{MARK}={}.{number}", std::process::id());
        let before = Held::now();
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(arguments).env(MARK, mark.split_once('=').unwrap().1);
        if let Some(cache) = cache {
            command.env("XDG_CACHE_HOME", cache);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { child, mark, before }
    }

    /// The command's processes, itself included.
    fn processes(&self) -> Vec<String> {
        let name = |path: &Path| fs::read_to_string(path.join("comm")).unwrap_or_default().trim().to_owned();
        let marked = |path: &Path| {
            let environment = fs::read(path.join("environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == self.mark.as_bytes())
        };
        let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        all.filter(|path| marked(path)).map(|path| name(&path)).collect()
    }

    /// Waits until one of its processes has this name.
    fn await_process(&mut self, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(300);
        while !self.processes().iter().any(|process| process == name) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}) before it started {name}");
            assert!(Instant::now() < deadline, "it has not started {name}: {:?}", self.processes());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills the command alone, and looks whether all else goes with it.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let (processes, held) = (self.processes(), Held::now());
            let added: Vec<_> = held.mounts.difference(&self.before.mounts).collect();
            let loops: Vec<_> = held.loop_devices.difference(&self.before.loop_devices).collect();
            if processes.is_empty() && added.is_empty() && loops.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left: {processes:?}, mounts {added:?}, loops {loops:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[test]
#[ignore = "needs a built testbed; `cargo xtask test` runs it"]
fn a_killed_testbed_leaves_nothing_and_the_next_one_works() {
    let command = ["testbed", "exec", "--", "sleep", "1000"];
    for delay in [0, 300, 3000] {
        let mut victim = Victim::start(&command, None);
        if delay > 0 {
            victim.await_process("qemu-system-x86");
        }
        thread::sleep(Duration::from_millis(delay));
        victim.kill();
    }
    let mut next = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let output = next.args(["testbed", "exec", "--", "sh", "-c", "echo up; exit 3"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!((output.status.code(), &*said), (Some(3), "up\n"), "{output:?}");
}

/// Kills the builds while each of their tools is at work, then checks that the cache holds no entry, as none of them
/// was finished, and that the next run clears away what the killed ones had begun.
#[test]
#[ignore = "downloads packages; `cargo xtask test` runs it"]
fn killed_builds_leave_no_half_built_entries() {
    let cache = tempfile::tempdir().unwrap();
    let own = cache.path().join("caisson");
    let left = || fs::read_dir(own.join("tmp")).into_iter().flatten().count();
    let mut begun = 0;
    for (command, tool) in [
        (&["kernel"][..], "apt-get"),
        (&["kernel"], "make"),
        (&["testbed", "build", "--variant", "trixie"], "mmdebstrap"),
        (&["testbed", "build", "--variant", "trixie"], "dpkg"),
    ] {
        let mut victim = Victim::start(command, Some(cache.path()));
        victim.await_process(tool);
        thread::sleep(Duration::from_millis(500));
        victim.kill();
        // The next one sweeps first.
        begun += left();
        for kind in ["guest-kernel", "testbed-root", "testbed-initramfs"] {
            let entries = fs::read_dir(own.join(kind)).into_iter().flatten().count();
            assert_eq!(entries, 0, "{kind} has an entry after {tool} was killed");
        }
    }
    assert!(begun > 0, "nothing was begun: this test saw nothing");
    // So does any command; this one then fails for want of an agent.
    let mut next = Command::new(env!("CARGO_BIN_EXE_xtask"));
    next.args(["initramfs", "/nonexistent"]).env("XDG_CACHE_HOME", cache.path());
    assert!(!next.output().unwrap().status.success());
    assert_eq!(left(), 0, "the next run does not sweep");
}
