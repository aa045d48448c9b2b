//! `cargo xtask demo`: what the project does so far, shown and not told.
//!
//! Boots a Linux guest with our VMM on KVM and prints what the guest saw. Every line comes from the run itself.

use std::{fs, path::Path, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::{
    host::Host,
    initramfs::Archive,
    kernel::{self, KernelArgs},
    products,
    testbed::{MachineArgs, Variant, exec, root},
};

/// What runs as PID 1 in the demo's guest.
const GUEST_INIT: &str = "\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
echo \"demo: user space on Linux $($b uname -r), $($b cut -d' ' -f1 /proc/uptime) s after the kernel's start\"
echo \"demo: $($b nproc) processor(s), $($b awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB of memory\"
echo \"demo: clock source $($b cat /sys/devices/system/clocksource/clocksource0/current_clocksource)\"
$b reboot -f
";

/// What runs beside the guest, on the machine with KVM: `sh -c` with the binaries, the machine file, its console, and
/// what a millisecond is there.
const SCRIPT: &str = "\
: >\"$3\"
start=$(date +%s%N)
timeout 120 \"$1/caisson-vmm\" --config \"$2\"
code=$?
end=$(date +%s%N)
cat \"$3\"
grep -q '^demo: user space' \"$3\" || { echo \"the guest did not reach user space; caisson-vmm exited with $code\"; exit 1; }
echo \"host: caisson-vmm ran for $(( (end - start) / 1000000 )) $4, from its start to the guest's end, and exited with $code\"
";

/// Options of `cargo xtask demo`.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct DemoArgs {
    /// Run on this host, whose KVM must have hardware virtualization, instead of in the testbed.
    #[arg(long)]
    direct: bool,
}

/// Builds what the demo needs and runs it.
///
/// # Errors
/// When something can't be built, or the guest does not reach user space.
pub(crate) fn run(host: &Host, args: &DemoArgs) -> Result<ExitCode> {
    let variant = Variant::default();
    let kernel = kernel::build(host, KernelArgs::default())?;
    let binaries = products::build(host)?;
    let bed = root::build(host, variant)?;
    let busybox = bed.root.with_file_name("busybox");

    let directory = host.target.join("xtask/demo");
    fs::create_dir_all(&directory).context("creating the demo's directory")?;
    let initramfs = directory.join("initramfs");
    fs::write(&initramfs, guest_initramfs(&busybox)?).context("writing the demo's initramfs")?;
    let scratch = host.cache.scratch()?;
    let console = if args.direct { scratch.path().join("console") } else { "/scratch/console".into() };
    let there = |path: &Path| if args.direct { Ok(path.to_owned()) } else { exec::inside(host, path) };
    let machine = directory.join("machine.toml");
    fs::write(&machine, machine_file(&there(&kernel)?, &there(&initramfs)?, &console))
        .context("writing the demo's machine file")?;

    let path = |path: &Path| path.to_string_lossy().into_owned();
    let mut command = vec!["sh".to_owned(), "-c".to_owned(), SCRIPT.to_owned(), "sh".to_owned()];
    let unit = if args.direct { "ms" } else { "million instructions (as many ms of virtual time)" };
    command.extend([path(&there(&binaries)?), path(&there(&machine)?), path(&console), unit.to_owned()]);
    // Seconds say nothing on an emulated processor; instructions do.
    let machine = MachineArgs { icount: true, ..MachineArgs::of(variant) };
    let request = exec::ExecArgs {
        machine,
        exchange: None,
        env: Vec::new(),
        timeout: Some(300),
        direct: args.direct,
        command,
    };
    exec::exec(host, &request, exec::standard_error())
}

fn guest_initramfs(busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for directory in ["bin", "dev", "proc", "sys"] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox).context("reading the static busybox")?)?;
    archive.file("init", 0o755, GUEST_INIT.as_bytes())?;
    Ok(archive.finish()?)
}

fn machine_file(kernel: &Path, initramfs: &Path, console: &Path) -> String {
    format!(
        "[kernel]\nimage = {kernel:?}\ninitramfs = {initramfs:?}\ncommand_line = \"quiet\"\n\n\
         [memory]\nsize_mib = 128\n\n[console]\noutput = {console:?}\n"
    )
}
