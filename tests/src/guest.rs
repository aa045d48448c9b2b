//! Linux guests booted by QEMU: the yardstick for our own VMM, and the proof that the machine's KVM is real.

use std::{
    fs::File,
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

/// The files of an initramfs that is being put together.
pub struct Initramfs {
    tree: tempfile::TempDir,
}

impl Initramfs {
    /// One with nothing but the directories that a kernel wants.
    ///
    /// # Errors
    /// When there is no place for it.
    pub fn new() -> Result<Self> {
        let tree = tempfile::tempdir().context("making a directory")?;
        for directory in ["bin", "dev", "proc", "sys"] {
            std::fs::create_dir(tree.path().join(directory))?;
        }
        Ok(Self { tree })
    }

    /// Adds the machine's own static busybox, and a script of its shell as `/init`.
    ///
    /// # Errors
    /// When there is no busybox.
    pub fn busybox(&self, init: &str) -> Result<()> {
        self.copy(Path::new("/bin/busybox"), "bin/busybox")?;
        std::os::unix::fs::symlink("busybox", self.tree.path().join("bin/sh"))?;
        let path = self.tree.path().join("init");
        std::fs::write(&path, format!("#!/bin/sh\n{init}"))?;
        Ok(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?)
    }

    /// Adds a program with the libraries that it is linked with.
    ///
    /// # Errors
    /// When a file is missing.
    pub fn program(&self, program: &Path, name: &str) -> Result<()> {
        copy_program(self.tree.path(), program, name)
    }

    /// Packs it, by the machine's own `cpio`.
    ///
    /// # Errors
    /// When there is none, or the file can't be written.
    pub fn write(self, output: &Path) -> Result<()> {
        let file = File::create(output).with_context(|| format!("creating {}", output.display()))?;
        let status = Command::new("sh")
            .args(["-c", "find . | cpio --quiet --create --format=newc --owner=0:0"])
            .current_dir(self.tree.path())
            .stdout(file)
            .status()
            .context("starting cpio")?;
        ensure!(status.success(), "cpio: {status}");
        Ok(())
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        copy(self.tree.path(), from, to)
    }
}

/// Puts a program with the libraries that it is linked with into a directory that will be somebody's root.
///
/// # Errors
/// When a file is missing.
pub fn copy_program(tree: &Path, program: &Path, name: &str) -> Result<()> {
    copy(tree, program, name)?;
    let libraries = Command::new("ldd").arg(program).output().context("starting ldd")?;
    for word in String::from_utf8_lossy(&libraries.stdout).split_whitespace() {
        if word.starts_with('/') {
            copy(tree, &Path::new(word).canonicalize()?, word)?;
        }
    }
    Ok(())
}

fn copy(tree: &Path, from: &Path, to: &str) -> Result<()> {
    let to = tree.join(to.trim_start_matches('/'));
    std::fs::create_dir_all(to.parent().context("no directory")?)?;
    std::fs::copy(from, &to).with_context(|| format!("copying {}", from.display()))?;
    Ok(std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?)
}

/// Makes an initramfs of busybox and one shell script as `/init`.
///
/// # Errors
/// When a tool is missing or the file can't be written.
pub fn busybox_initramfs(init: &str, output: &Path) -> Result<()> {
    let initramfs = Initramfs::new()?;
    initramfs.busybox(init)?;
    initramfs.write(output)
}
