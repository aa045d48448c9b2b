//! Our runtime through `ctr`: a plain container is a pod of one, in a machine of its own.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{containerd::BUSYBOX_IMAGE, ctr::Ctr, leaks::Holdings, node::Node};

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
    ensure!(hello == "hello" && said.stderr == "oops\n", "{said:?}");
    let ours = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(kernel != ours.trim(), "the container runs on the host's kernel {kernel}");
    before.assert_nothing_added()
}
