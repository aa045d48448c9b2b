//! Our runtime through `ctr`: a plain container is a pod of one, in a machine of its own.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cgroups, containerd::BUSYBOX_IMAGE, ctr::Ctr, events::Events, leaks::Holdings, node::Node, record,
};
use nix::sys::signal::Signal;

const RUNTIME: &str = "io.containerd.caisson.v2";

/// `ctr run --rm` with our runtime.
fn run(ctr: &Ctr, id: &str, options: &[&str], command: &[&str]) -> Result<caisson_e2e::ctr::Output> {
    let mut args = vec!["run", "--rm", "--runtime", RUNTIME];
    args.extend(options);
    args.extend([BUSYBOX_IMAGE, id]);
    args.extend(command);
    ctr.try_run(&args)
}

#[test]
fn a_container_says_hello_from_another_kernel() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let said = run(&ctr, "shim-hello", &[], &["sh", "-c", "echo hello; uname -r; echo oops >&2; exit 7"])?;
    ensure!(said.code == 7, "{said:?}\n{}", node.containerd_log());
    let (hello, kernel) = said.stdout.trim_end().split_once('\n').context("two lines")?;
    // ctr itself may warn of something before.
    ensure!(hello == "hello" && said.stderr.ends_with("oops\n"), "{said:?}");
    let ours = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(kernel != ours.trim(), "the container runs on the host's kernel {kernel}");
    before.assert_nothing_added()
}

/// A container that is started in the background and removed at the end.
struct Background<'a> {
    ctr: &'a Ctr,
    id: &'a str,
}

impl<'a> Background<'a> {
    fn start(ctr: &'a Ctr, id: &'a str, options: &[&str], command: &[&str]) -> Result<Self> {
        let mut args = vec!["run", "--detach", "--runtime", RUNTIME];
        args.extend(options);
        args.extend([BUSYBOX_IMAGE, id]);
        args.extend(command);
        ctr.run(&args)?;
        Ok(Self { ctr, id })
    }

    fn exec(&self, name: &str, script: &str) -> Result<caisson_e2e::ctr::Output> {
        self.ctr.try_run(&["task", "exec", "--exec-id", name, self.id, "sh", "-c", script])
    }

    fn status(&self) -> Result<String> {
        let list = self.ctr.run(&["task", "list"])?;
        let line = list.lines().find(|line| line.starts_with(self.id)).context("the task is not listed")?;
        Ok(line.split_whitespace().last().unwrap_or_default().to_owned())
    }

    fn wait_for(&self, status: &str) -> Result<()> {
        for _ in 0..300 {
            if self.status()? == status {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        anyhow::bail!("{} is {} and not {status}", self.id, self.status()?)
    }

    fn remove(self) -> Result<()> {
        self.ctr.run(&["task", "delete", "--force", self.id])?;
        self.ctr.run(&["container", "delete", self.id])?;
        Ok(())
    }
}

#[test]
fn a_machine_that_stands_still_can_be_killed() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let container = Background::start(&ctr, "shim-still", &[], &["sleep", "1000"])
        .with_context(|| node.containerd_log())?;
    record::send(record::machine("default", "shim-still")?, Signal::SIGSTOP)?;
    ctr.run(&["task", "kill", "--signal", "KILL", "shim-still"])?;
    container.wait_for("STOPPED")?;
    container.remove()?;
    before.assert_nothing_added()
}

#[test]
fn a_running_container_is_asked_paused_measured_and_killed() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let script = "trap 'exit 5' TERM; while :; do sleep 0.1; done";
    let container = Background::start(&ctr, "shim-asked", &["--env", "COLOUR=blue"], &["sh", "-c", script])
        .with_context(|| node.containerd_log())?;
    let said = container.exec("one", "echo $COLOUR; hostname; exit 4")?;
    ensure!(said.code == 4 && said.stdout.starts_with("blue\n"), "{said:?}");
    let refused = container.exec("two", "exec /nonexistent")?;
    ensure!(refused.code != 0, "{refused:?}");
    ctr.run(&["task", "exec", "--detach", "--exec-id", "three", "shim-asked", "sleep", "1000"])?;
    ctr.run(&["task", "kill", "--exec-id", "three", "--signal", "KILL", "shim-asked"])?;
    let left = container.exec("four", "ps | grep -c '[s]leep 1000'; echo up")?;
    ensure!(left.stdout == "0\nup\n", "to kill an exec is not to kill its container: {left:?}");
    ctr.run(&["task", "pause", "shim-asked"])?;
    container.wait_for("PAUSED")?;
    ctr.run(&["task", "resume", "shim-asked"])?;
    container.wait_for("RUNNING")?;
    let metrics = ctr.run(&["task", "metrics", "--format", "json", "shim-asked"])?;
    ensure!(metrics.contains(if cgroups::is_unified() { "usage_usec" } else { "total_rss" }), "{metrics}");
    let checkpoint = ctr.try_run(&["task", "checkpoint", "shim-asked"])?;
    ensure!(checkpoint.code != 0 && checkpoint.stderr.contains("checkpointed"), "{checkpoint:?}");
    ctr.run(&["task", "kill", "--signal", "TERM", "shim-asked"])?;
    container.wait_for("STOPPED")?;
    let again = ctr.try_run(&["task", "kill", "shim-asked"])?;
    ensure!(again.stderr.contains("not found"), "{again:?}");
    container.remove()?;
    before.assert_nothing_added()
}

#[test]
fn every_byte_goes_through_both_ways() -> Result<()> {
    let node = Node::ready()?;
    let before = Holdings::now()?;
    let directory = tempfile::tempdir()?;
    let (input, output) = (directory.path().join("in"), directory.path().join("out"));
    let bytes: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&input, &bytes)?;
    let status = std::process::Command::new("timeout")
        .args(["200", "ctr", "--address"])
        .arg(node.socket())
        .args(["run", "--rm", "--runtime", RUNTIME, BUSYBOX_IMAGE, "shim-bytes", "cat"])
        .stdin(std::fs::File::open(&input)?)
        .stdout(std::fs::File::create(&output)?)
        .status()?;
    ensure!(status.success(), "{status}");
    ensure!(std::fs::read(&output)? == bytes, "the bytes are others");
    before.assert_nothing_added()
}

#[test]
fn the_end_of_the_machine_is_the_end_of_the_container() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let container = Background::start(&ctr, "shim-vmm-dies", &[], &["sleep", "1000"])?;
    record::send(record::vmm("default", "shim-vmm-dies")?, Signal::SIGKILL)?;
    container.wait_for("STOPPED")?;
    container.remove()?;
    before.assert_nothing_added()
}

/// containerd sees the connection end, and has the rest removed: nobody has to ask for it.
#[test]
fn a_dead_shim_leaves_nothing_behind() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let mut events = Events::listen(&node)?;
    let container = Background::start(&ctr, "shim-shim-dies", &[], &["sleep", "1000"])?;
    record::send(record::shim("default", "shim-shim-dies")?, Signal::SIGKILL)?;
    let told = events.until(|event| event.topic == "/tasks/delete")?;
    let exit = told.iter().find(|event| event.topic == "/tasks/exit").context("no exit was told")?;
    for event in [exit, told.last().context("the one that was waited for")?] {
        let (id, status) = (event.text("container_id"), event.number("exit_status"));
        ensure!((id, status) == ("shim-shim-dies", 137), "{event:?}");
    }
    let tasks = ctr.run(&["task", "list"])?;
    ensure!(!tasks.contains("shim-shim-dies"), "{tasks}");
    ctr.run(&["container", "delete", container.id])?;
    drop(events);
    before.assert_nothing_added()
}

#[test]
fn a_terminal_is_one() -> Result<()> {
    let node = Node::ready()?;
    let before = Holdings::now()?;
    // script(1) gives ctr the terminal that it wants.
    let command = format!(
        "ctr --address {} run --rm --tty --runtime {RUNTIME} {BUSYBOX_IMAGE} shim-tty sh -c 'tty; exit 6'",
        node.socket().display()
    );
    let output = std::process::Command::new("timeout")
        .args(["100", "script", "--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output()
        .context("starting script")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(6) && said.contains("/dev/"), "{:?}: {said}", output.status);
    before.assert_nothing_added()
}

#[test]
fn what_a_machine_cannot_be_given_is_refused_by_name() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let refused = run(&ctr, "shim-host-net", &["--net-host"], &["true"])?;
    ensure!(refused.code != 0 && refused.stderr.contains("network namespace"), "{refused:?}");
    let missing = run(&ctr, "shim-no-program", &[], &["/nonexistent"])?;
    ensure!(missing.code != 0 && missing.stderr.contains("/nonexistent"), "{missing:?}");
    before.assert_nothing_added()
}
