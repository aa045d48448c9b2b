//! Root file systems that a snapshotter keeps on block devices: the guest has them as disks, and mounts them itself.

use anyhow::{Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    ctr::{Ctr, Output},
    leaks::Holdings,
    node::Node,
};

fn run(ctr: &Ctr, runtime: &str, script: &str) -> Result<Output> {
    let snapshotter = ["run", "--rm", "--snapshotter", "blockfile", "--runtime", runtime];
    ctr.try_run(&[&snapshotter[..], &[BUSYBOX_IMAGE, "shim-disk", "sh", "-c", script]].concat())
}

/// containerd's snapshotter `blockfile` has each layer as an image of a file system, for a loop device.
#[test]
fn a_root_file_system_on_an_image_is_the_machines_disk() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    // The first one unpacks the image for this snapshotter.
    let script = "touch /new /bin/newer && ls -l /bin/busybox | cut -c 1-10; df -k / | awk 'END { print ($2 > 8000) }'";
    let theirs = run(&ctr, "io.containerd.runc.v2", script)?;
    ensure!(theirs.code == 0, "{theirs:?}\n{}", node.containerd_log());
    let before = Holdings::now()?;
    let ours = run(&ctr, "io.containerd.caisson.v2", script)?;
    ensure!(ours == theirs, "{ours:?}, and with runc {theirs:?}\n{}", node.containerd_log());
    let root = run(&ctr, "io.containerd.caisson.v2", "grep ' / ' /proc/mounts; exit 3")?;
    ensure!(
        root.code == 3 && root.stdout.starts_with("/dev/vd") && root.stdout.contains(" ext4 rw"),
        "{root:?}"
    );
    before.assert_nothing_added()
}
