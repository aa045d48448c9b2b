//! Linux guests booted by QEMU: the yardstick for our own VMM, and the proof that the machine's KVM is real.

use std::{
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::ctr::{self, Output};

/// How a guest went.
#[derive(Debug)]
pub struct Boot {
    /// What it wrote to its serial console.
    pub console: String,
    /// From the start of QEMU to its end. In a testbed with virtual time, a nanosecond is an instruction.
    pub elapsed: Duration,
}

/// Boots a kernel with an initramfs in QEMU's `microvm` machine on KVM, and waits until it ends.
///
/// The guest ends it by a reset (`-no-reboot`): the kernel has neither ACPI nor a keyboard controller to power off by.
///
/// # Errors
/// When QEMU or `timeout` is missing, or the guest is still running at the end of `limit`.
pub fn boot_in_qemu(kernel: &Path, initramfs: &Path, limit: Duration) -> Result<Boot> {
    let started = Instant::now();
    let mut command = Command::new("timeout");
    command.arg(limit.as_secs().to_string()).arg("qemu-system-x86_64");
    command.args(["-M", "microvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=on", "-cpu", "host"]);
    command.args([
        "-accel",
        "kvm",
        "-m",
        "128M",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]);
    command.args(["-display", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    command.args(["-append", "console=ttyS0 panic=-1 reboot=t rdinit=/init"]);
    let Output { code, stdout, stderr } = ctr::run(command.stdin(Stdio::null()))?;
    ensure!(code == 0, "QEMU exited with {code}: {stderr}\n{stdout}");
    Ok(Boot { console: stdout, elapsed: started.elapsed() })
}

/// Makes an initramfs of busybox and one shell script as `/init`, by the machine's own `busybox` and `cpio`.
///
/// # Errors
/// When a tool is missing or the file can't be written.
pub fn busybox_initramfs(init: &str, output: &Path) -> Result<()> {
    let tree = tempfile::tempdir().context("making a directory")?;
    let bin = tree.path().join("bin");
    for directory in ["bin", "dev", "proc", "sys"] {
        std::fs::create_dir(tree.path().join(directory))?;
    }
    std::fs::copy("/bin/busybox", bin.join("busybox")).context("copying the static busybox")?;
    std::os::unix::fs::symlink("busybox", bin.join("sh"))?;
    let path = tree.path().join("init");
    std::fs::write(&path, format!("#!/bin/sh\n{init}"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;

    let mut cpio = Command::new("sh")
        .args(["-c", "find . | cpio --quiet --create --format=newc --owner=0:0"])
        .current_dir(tree.path())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting cpio")?;
    let mut archive = Vec::new();
    cpio.stdout.take().context("no pipe from cpio")?.read_to_end(&mut archive)?;
    ensure!(cpio.wait()?.success(), "cpio failed");
    std::fs::write(output, archive).with_context(|| format!("writing {}", output.display()))
}
