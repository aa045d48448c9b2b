//! One guest under either VMM, and what it says on its console.

use std::{
    fs,
    io::{ErrorKind, Read},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, poll};

use super::{
    control::Control,
    guest::MARK,
    memory::{self, Memory},
    report::{CAISSON, QEMU},
    share::{self, Share},
    vsock::GUEST_CID,
};

/// The guest's address at the end of its cable, and ours.
pub(super) const GUEST_MAC: &str = "02:00:00:00:00:02";

/// Which VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vmm {
    /// Ours.
    Caisson,
    /// QEMU's `microvm` machine.
    Qemu,
}

impl Vmm {
    /// Both, in the order of the table's columns.
    pub(super) const ALL: [Self; 2] = [Self::Caisson, Self::Qemu];

    /// Its name in the results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Caisson => CAISSON,
            Self::Qemu => QEMU,
        }
    }
}

/// What runs: 1 processor and 128 MiB.
#[derive(Clone, Debug)]
pub(super) struct Guest<'a> {
    /// Where `caisson-vmm` is, and where the machine file may be written.
    pub(super) directory: &'a Path,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// A disk.
    pub(super) disk: Option<PathBuf>,
    /// A directory that our VMM shares and a disk with the same content for QEMU, see [`share`](super::share).
    pub(super) share: Option<Share>,
    /// An attached tap device, as an inheritable descriptor.
    pub(super) tap: Option<i32>,
    /// A vsock device; where our own VMM's unix sockets are.
    pub(super) vsock: Option<PathBuf>,
    /// In our VMM's jail.
    pub(super) jailed: bool,
}

/// What both kernels are told: nothing that they would say is waited for.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=0 8250.nr_uarts=1 panic=-1";

/// How long a guest may say nothing, in milliseconds of the testbed's time.
const SILENCE: u16 = 30_000;

/// How long the host is left alone before a start.
const REST: Duration = Duration::from_millis(200);

/// A machine that runs. Dropping it ends it.
pub(super) struct Running {
    child: Child,
    started: Instant,
    console: std::process::ChildStdout,
    heard: Vec<u8>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest<'_> {
    /// Starts it; the clock starts right before.
    pub(super) fn start(&self, vmm: Vmm) -> Result<Running> {
        let mut command = match vmm {
            Vmm::Caisson => self.caisson()?,
            Vmm::Qemu => self.qemu(),
        };
        command.stdin(Stdio::null());
        spawn(command).with_context(|| format!("starting {}", vmm.name()))
    }

    /// Starts it in our VMM, with a control connection.
    pub(super) fn start_controlled(&self) -> Result<(Running, Control)> {
        let (control, theirs) = Control::pair()?;
        let mut command = self.caisson()?;
        command.args(["--control-fd", "0"]).stdin(theirs);
        Ok((spawn(command)?, control))
    }

    /// Starts our VMM without a machine.
    pub(super) fn start_empty(&self) -> Result<(Running, Control)> {
        let (control, theirs) = Control::pair()?;
        let mut command = Command::new(self.directory.join("caisson-vmm"));
        command.args(["--control-fd", "0"]).stdin(theirs);
        Ok((spawn(command)?, control))
    }

    fn caisson(&self) -> Result<Command> {
        let file = self.directory.join("machine.json");
        let mut machine = serde_json::json!({
            "kernel": {
                "image": self.kernel,
                "initramfs": self.initramfs,
                "command_line": COMMAND_LINE,
            },
            "memory": { "size_mib": 128 },
            "console": { "output": "fd:1" },
        });
        let mut devices = Vec::new();
        if let Some(disk) = &self.disk {
            devices.push(serde_json::json!({ "block": { "files": [disk] } }));
        }
        if let Some(share) = &self.share {
            let options = serde_json::json!({ "tag": share::TAG });
            devices.push(serde_json::json!({ "fs": { "directory": share.directory, "options": options } }));
        }
        if let Some(tap) = self.tap {
            let options = serde_json::json!({ "mac": GUEST_MAC });
            devices.push(serde_json::json!({ "net": { "tap": format!("fd:{tap}"), "options": options } }));
        }
        if let Some(socket) = &self.vsock {
            let options = serde_json::json!({ "guest_cid": GUEST_CID });
            // The socket of the run before may still be there.
            let _ = fs::remove_file(socket);
            devices.push(serde_json::json!({ "vsock": { "socket": socket, "options": options } }));
        }
        if !devices.is_empty() {
            machine["devices"] = devices.into();
        }
        fs::write(&file, machine.to_string()).context("writing the machine file")?;
        let mut command = Command::new(self.directory.join("caisson-vmm"));
        command.arg("--config").arg(file);
        if self.jailed {
            // An empty file: the jail as it is by default.
            command.args(["--jail", "/dev/null"]);
        }
        Ok(command)
    }

    fn qemu(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,x-option-roms=off,isa-serial=on"]);
        command.args(["-accel", "kvm", "-cpu", "host", "-m", "128", "-smp", "1"]);
        // Version 1.0 of VIRTIO, as ours.
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        command.args(["-append", COMMAND_LINE]);
        let share = self.share.as_ref().map(|share| &share.image);
        for (id, disk) in [("disk", self.disk.as_ref()), ("share", share)] {
            if let Some(file) = disk {
                let file = file.display();
                command.arg("-drive").arg(format!("if=none,id={id},format=raw,discard=unmap,file={file}"));
                command.arg("-device").arg(format!("virtio-blk-device,drive={id}"));
            }
        }
        if let Some(tap) = self.tap {
            command.arg("-netdev").arg(format!("tap,id=net,fd={tap}"));
            command.arg("-device").arg(format!("virtio-net-device,netdev=net,mac={GUEST_MAC}"));
        }
        if self.vsock.is_some() {
            command.arg("-device").arg(format!("vhost-vsock-device,guest-cid={GUEST_CID}"));
        }
        command
    }
}

/// Starts `command`; the clock starts right before.
fn spawn(mut command: Command) -> Result<Running> {
    command.stdout(Stdio::piped());
    // What the host still does about the machine before (its namespaces, its memory) is not this one's.
    std::thread::sleep(REST);
    let started = Instant::now();
    let mut child = command.spawn().context("starting a VMM")?;
    let console = child.stdout.take().context("no pipe from the console")?;
    Ok(Running { child, started, console, heard: Vec::new() })
}

impl Running {
    /// How long ago it was started.
    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits for the first mark; milliseconds from the start.
    pub(super) fn mark(&mut self) -> Result<f64> {
        self.until(|heard| heard.contains(&MARK))?;
        Ok(self.started.elapsed().as_secs_f64() * 1000.0)
    }

    /// Waits for a line with `word`, and tells when it came.
    pub(super) fn word(&mut self, word: &str) -> Result<Instant> {
        let wanted = format!("{word}\r\n").into_bytes();
        self.until(|heard| heard.windows(wanted.len()).any(|window| window == wanted))?;
        Ok(Instant::now())
    }

    /// All that the guest has said.
    pub(super) fn heard(&self) -> String {
        String::from_utf8_lossy(&self.heard).into_owned()
    }

    /// What the process holds after a moment's rest.
    pub(super) fn memory(&self) -> Result<Memory> {
        std::thread::sleep(Duration::from_millis(50));
        memory::of(self.child.id())
    }

    fn until(&mut self, done: impl Fn(&[u8]) -> bool) -> Result<()> {
        let mut buffer = [0; 4096];
        while !done(&self.heard) {
            let mut ready = [PollFd::new(self.console.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, SILENCE) {
                Ok(0) => bail!("the guest has gone silent:\n{}", self.heard()),
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error).context("waiting for the console"),
            }
            match self.console.read(&mut buffer) {
                Ok(0) => bail!("the machine ended:\n{}", self.heard()),
                Ok(count) => self.heard.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading the console"),
            }
        }
        Ok(())
    }
}
