//! The ground that every other test stands on: is this machine one on which the rest can be known to work?

use std::{
    path::Path,
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{cgroups, guest, leaks::Holdings, node::Product};

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
fn control_groups_are_of_the_version_that_was_asked_for() -> Result<()> {
    let asked = std::fs::read_to_string("/proc/cmdline")?;
    ensure!(cgroups::is_unified() != asked.contains("caisson.cgroup=v1"), "not as in {asked:?}");
    let own = cgroups::of(Path::new("/proc/self"))?;
    let memory = Path::new("/sys/fs/cgroup/memory");
    ensure!(cgroups::is_unified() != own.iter().any(|group| group.starts_with(memory)), "{own:?}");
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

/// Runs a shell's line.
fn shell(line: &str) -> Result<()> {
    let status = Command::new("sh").args(["-ec", line]).status().context("starting sh")?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

/// One of everything that a pod could leave behind.
struct Leak(Child);

impl Leak {
    fn new(disk: &Path) -> Result<Self> {
        let process = Command::new("sleep").arg("1000").spawn().context("starting sleep")?;
        // From here on the end of this value removes what is there.
        let leak = Self(process);
        std::fs::write(disk, [0; 4096])?;
        shell(&format!("losetup --find {}", disk.display()))?;
        shell("mkdir -p /run/caisson/e2e-leak && mount -t tmpfs leak /run/caisson/e2e-leak")?;
        shell("mkdir -p /sys/fs/cgroup/e2e-leak/below")?;
        // Not by `ip netns` and no dummy: the first of either leaves more than itself.
        shell("mkdir -p /run/netns && touch /run/netns/e2e-leak && unshare --net=/run/netns/e2e-leak true")?;
        shell("ip link add e2e-leak type bridge")?;
        Ok(leak)
    }
}

impl Drop for Leak {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
        for undo in [
            "losetup --detach-all",
            "umount /run/caisson/e2e-leak",
            "rmdir /run/caisson/e2e-leak",
            "rmdir --ignore-fail-on-non-empty /run/caisson",
            "rmdir /sys/fs/cgroup/e2e-leak/below /sys/fs/cgroup/e2e-leak",
            "umount /run/netns/e2e-leak",
            "rm /run/netns/e2e-leak",
            "ip link del e2e-leak",
        ] {
            // What is missing then fails the comparison at the test's end.
            let _ = shell(undo);
        }
    }
}

#[test]
fn what_a_test_leaves_behind_is_seen() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let before = Holdings::now()?;
    let leak = Leak::new(&directory.path().join("disk"))?;
    let Err(error) = before.assert_nothing_added() else {
        anyhow::bail!("nothing was seen");
    };
    let seen = error.to_string();
    for what in [
        "1 process(es) sleep",
        "mount /run/caisson/e2e-leak",
        "cgroup /sys/fs/cgroup/e2e-leak",
        "cgroup /sys/fs/cgroup/e2e-leak/below",
        "network link e2e-leak",
        "network namespace e2e-leak",
        "block device loop",
        "pod directory /run/caisson/e2e-leak",
    ] {
        ensure!(seen.contains(what), "{what} was not seen: {seen}");
    }
    drop(leak);
    before.assert_nothing_added()
}
