//! Whatever dies, and whenever: nothing of a pod is left, and containerd is told the truth.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{containerd::BUSYBOX_IMAGE, ctr::Ctr, leaks::Holdings, node::Node};

const RUNTIME: &str = "io.containerd.caisson.v2";

/// Resets the failpoint, however the test ends.
struct Armed<'a>(&'a Node);

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        // A test that fails has its own message.
        let _ = self.0.set_failpoint(None);
    }
}

/// The shim dies after each line of its record in turn, as the thing in it is about to be made, until a container gets
/// through: each time containerd's clean-up finds all of it by the record alone.
#[test]
fn a_shim_that_dies_at_any_step_leaves_nothing() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let armed = Armed(&node);
    for lines in 1..60 {
        node.set_failpoint(Some(lines))?;
        let id = format!("shim-dies-{lines}");
        let said =
            ctr.try_run(&["run", "--rm", "--runtime", RUNTIME, BUSYBOX_IMAGE, &id, "echo", "through"])?;
        let through = said.stdout == "through\n";
        // ctr does not remove what it could not start.
        let _ = ctr.try_run(&["task", "delete", "--force", &id])?;
        let _ = ctr.try_run(&["container", "delete", &id])?;
        before.assert_nothing_added().with_context(|| format!("after {lines} lines; {said:?}"))?;
        if through {
            ensure!(lines > 10, "a pod of {lines} lines only");
            drop(armed);
            return Ok(());
        }
        ensure!(said.code != 0, "{said:?}");
    }
    anyhow::bail!("it never gets through\n{}", node.containerd_log())
}
