//! Linux guests in our own VMM: its process, its control connection and its console.

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_vmm_api::{
    config::{FileSource, MachineConfig},
    control::{Client, protocol::RestoreCommand},
};
use nix::sys::{
    signal::Signal,
    socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt},
    time::{TimeVal, TimeValLike},
};

use crate::{guest::Initramfs, node::Product};

/// How long a guest may take for anything in a slow testbed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Files of a guest: its initramfs, disks and snapshots.
pub struct Workshop {
    directory: tempfile::TempDir,
}

impl Workshop {
    /// A directory for a guest whose init runs `script` in busybox's shell, after mounting what is usual.
    ///
    /// # Errors
    /// When the initramfs cannot be made.
    pub fn new(script: &str) -> Result<Self> {
        Self::with_programs(script, &[])
    }

    /// As [`new`](Self::new), with programs of the testbed that the guest finds as `/host/NAME`.
    ///
    /// # Errors
    /// When the initramfs cannot be made.
    pub fn with_programs(script: &str, programs: &[(&Path, &str)]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let init = format!(
            "/bin/busybox --install -s /bin\n\
             mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
             {script}\n\
             reboot -f\n"
        );
        let initramfs = Initramfs::new()?;
        initramfs.busybox(&init)?;
        for (program, name) in programs {
            initramfs.program(program, &format!("host/{name}"))?;
        }
        initramfs.write(&directory.path().join("initramfs"))?;
        Ok(Self { directory })
    }

    /// A path in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A machine that boots the guest with one processor and 128 MiB; `more` is appended to its file.
    ///
    /// # Errors
    /// When `more` does not fit a machine file.
    pub fn config(&self, more: &str) -> Result<MachineConfig> {
        let kernel = Product::Kernel.path()?;
        let initramfs = self.path("initramfs");
        let text = format!(
            "kernel.image = {kernel:?}\nkernel.initramfs = {initramfs:?}\n\
             kernel.command_line = 'console=ttyS0 quiet loglevel=4'\n\
             console.rate = 16777216\nmemory.size_mib = 128\n{more}"
        );
        parse(&text)
    }

    /// A file of `len` bytes that begins with `content`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn disk(&self, name: &str, content: &str, len: u64) -> Result<PathBuf> {
        let path = self.path(name);
        let mut file = File::create(&path)?;
        file.write_all(content.as_bytes())?;
        file.set_len(len)?;
        Ok(path)
    }
}

/// Reads a machine file's text; TOML does without quotes what JSON needs them for, and has nested keys.
fn parse(text: &str) -> Result<MachineConfig> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("machine.toml");
    std::fs::write(&path, text)?;
    Ok(MachineConfig::from_file(&path)?)
}

/// A VMM process under control.
pub struct Vmm {
    child: Child,
    /// The control connection.
    pub client: Client,
    console: Receiver<String>,
    /// Every line that the console has shown so far.
    pub transcript: Vec<String>,
    console_writer: OwnedFd,
}

impl Vmm {
    /// Starts a process without a machine.
    ///
    /// # Errors
    /// When the binary is missing.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// Starts a process without a machine in a jail: descriptors are all that it can be given.
    ///
    /// # Errors
    /// When the binary is missing.
    pub fn start_jailed() -> Result<Self> {
        Self::start_with(&["--jail", "/dev/null"])
    }

    /// As [`start_jailed`](Self::start_jailed), with a description of the jail.
    ///
    /// # Errors
    /// When the binary is missing.
    pub fn start_jailed_with(jail: &str, workshop: &Workshop) -> Result<Self> {
        let file = workshop.path("jail.toml");
        std::fs::write(&file, jail)?;
        Self::start_with(&["--jail", &file.to_string_lossy()])
    }

    fn start_with(arguments: &[&str]) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = Command::new(Product::Vmm.path()?)
            .args(["--control-fd", "0", "--log-level", "info"])
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .spawn()
            .context("starting caisson-vmm")?;
        setsockopt(&ours, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().try_into()?))?;
        let (reader, console_writer) = std::io::pipe()?;
        let (lines, console) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        let transcript = Vec::new();
        Ok(Self {
            child,
            client: Client::new(ours),
            console,
            transcript,
            console_writer: console_writer.into(),
        })
    }

    /// Starts a process, makes the machine and boots it.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn boot(config: MachineConfig) -> Result<Self> {
        Self::boot_with(config, &[])
    }

    /// As [`boot`](Self::boot), with descriptors that the configuration names as `fd:1` and so on.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn boot_with(mut config: MachineConfig, descriptors: &[BorrowedFd<'_>]) -> Result<Self> {
        let mut vmm = Self::start()?;
        config.console.output = Some(FileSource::Descriptor(0));
        let console = vmm.console_writer.try_clone()?;
        let descriptors: Vec<_> =
            std::iter::once(console.as_fd()).chain(descriptors.iter().copied()).collect();
        vmm.client.create(config, &descriptors)?;
        vmm.client.boot()?;
        Ok(vmm)
    }

    /// Boots in a jail. The kernel and the initramfs are handed over as descriptors.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn boot_jailed(config: MachineConfig, workshop: &Workshop) -> Result<Self> {
        let mut vmm = Self::start_jailed()?;
        vmm.boot_in_jail(config, workshop)?;
        Ok(vmm)
    }

    /// Boots a process that was started in a jail.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn boot_in_jail(&mut self, mut config: MachineConfig, workshop: &Workshop) -> Result<()> {
        let console = self.console_writer.try_clone()?;
        let (kernel, initramfs) =
            (File::open(Product::Kernel.path()?)?, File::open(workshop.path("initramfs"))?);
        config.console.output = Some(FileSource::Descriptor(0));
        config.kernel.image = FileSource::Descriptor(1);
        config.kernel.initramfs = Some(FileSource::Descriptor(2));
        self.client.create(config, &[console.as_fd(), kernel.as_fd(), initramfs.as_fd()])?;
        self.client.boot()?;
        Ok(())
    }

    /// Starts a process and restores a machine in it, paused.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn restore(mut command: RestoreCommand) -> Result<Self> {
        let mut vmm = Self::start()?;
        command.console.output = Some(FileSource::Descriptor(0));
        let console = vmm.console_writer.try_clone()?;
        vmm.client.restore(command, &[console.as_fd()])?;
        Ok(vmm)
    }

    /// The console's end that a machine writes to.
    ///
    /// # Errors
    /// When this process is out of descriptors.
    pub fn console(&self) -> Result<OwnedFd> {
        Ok(self.console_writer.try_clone()?)
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line with `text` on the console and returns it.
    ///
    /// # Errors
    /// When it does not come in time; the error has the console's last lines.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.expect_within(text, PATIENCE)
    }

    /// As [`expect`](Self::expect), with patience of the caller's choice.
    ///
    /// # Errors
    /// When it does not come in time; the error has the console's last lines.
    pub fn expect_within(&mut self, text: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        // What the process wrote before it ended may still be on its way when its end is seen.
        let mut ended: Option<ExitStatus> = None;
        loop {
            match self.console.recv_timeout(Duration::from_secs(1)) {
                Ok(line) => {
                    self.transcript.push(line.clone());
                    if line.contains(text) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(status) = ended {
                        let why = if status.signal() == Some(Signal::SIGSYS as i32) {
                            refused_call()
                        } else {
                            None
                        };
                        let why = why.unwrap_or_default();
                        bail!(
                            "the VMM ended ({status}) without {text:?} on the console: {why}\n{}",
                            self.tail()
                        );
                    }
                    ensure!(Instant::now() < deadline, "no {text:?} on the console:\n{}", self.tail());
                    ended = self.child.try_wait().context("looking after the VMM")?;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("console closed before {text:?}:\n{}", self.tail())
                }
            }
        }
    }

    /// How the process ended, if it has.
    ///
    /// # Errors
    /// As waitpid(2).
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("looking after the VMM")
    }

    /// The console's last lines.
    #[must_use]
    pub fn tail(&self) -> String {
        let from = self.transcript.len().saturating_sub(40);
        self.transcript.get(from..).unwrap_or_default().join("\n")
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("caisson-vmm did not end; console:\n{}", self.tail())
    }
}

/// What the kernel said of the last system call that a filter killed.
fn refused_call() -> Option<String> {
    let log = Command::new("dmesg").output().ok()?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    log.lines().rfind(|line| line.contains("type=1326")).map(str::to_owned)
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `caisson-vmm` with a machine file's text, in a jail or not, and returns its exit code and standard
/// error.
///
/// # Errors
/// When it cannot be started.
pub fn run_machine_file(text: &str, directory: &Path, jailed: bool) -> Result<(i32, String)> {
    let path = directory.join("machine.toml");
    std::fs::write(&path, text)?;
    run_to_end(["--config".as_ref(), path.as_os_str()], jailed)
}

/// Runs `caisson-vmm` with arguments, in a jail or not, and returns its exit code and standard error.
///
/// # Errors
/// When it cannot be started, or does not end within a minute.
pub fn run_to_end<'a>(arguments: impl IntoIterator<Item = &'a OsStr>, jailed: bool) -> Result<(i32, String)> {
    let mut command = Command::new("timeout");
    command.arg("60").arg(Product::Vmm.path()?).args(arguments).stdin(Stdio::null());
    if jailed {
        // An empty file: the jail as it is by default.
        command.args(["--jail", "/dev/null"]);
    }
    let output = command.output()?;
    let code = output.status.code().context("killed by a signal")?;
    ensure!(code != 124, "still running");
    Ok((code, String::from_utf8_lossy(&output.stderr).into_owned()))
}
