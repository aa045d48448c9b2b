//! The ground that every other test stands on: is this machine one on which the rest can be known to work?

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use caisson_e2e::{guest, node::Product};

#[test]
fn kvm_is_there() -> Result<()> {
    ensure!(Path::new("/dev/kvm").exists(), "there is no /dev/kvm");
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    ensure!(
        cpus.lines().any(|l| l.starts_with("flags") && l.split(' ').any(|f| f == "svm" || f == "vmx")),
        "the processor has no hardware virtualization"
    );
    Ok(())
}

#[test]
fn guest_kernel_reaches_user_space_on_kvm() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let initramfs = directory.path().join("initramfs");
    let init = "bin/busybox mount -t proc proc /proc\n\
                echo \"user space on $(bin/busybox uname -r) after $(bin/busybox cut -d' ' -f1 /proc/uptime) s\"\n\
                bin/busybox reboot -f\n";
    guest::busybox_initramfs(init, &initramfs)?;
    let boot = guest::boot_in_qemu(&Product::Kernel.path()?, &initramfs, Duration::from_secs(120))?;
    let said = boot.console.lines().find(|line| line.contains("user space on"));
    ensure!(said.is_some(), "the guest's console:\n{}", boot.console);
    println!("{} ({:.2?} in all)", said.unwrap_or_default().trim(), boot.elapsed);
    if std::fs::read_to_string("/proc/cmdline")?.contains("caisson.icount") {
        println!("{} M instructions in all", boot.elapsed.as_millis());
    }
    Ok(())
}
