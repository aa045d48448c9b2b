//! The machine: QEMU, started so that it cannot outlive xtask, with its disks and shares and three ports.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, PipeReader, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{MachineArgs, monitor::Monitor, root::Testbed};
use crate::{host::Host, proc};

/// The size of the scratch disk. It is sparse.
const SCRATCH_SIZE: u64 = 32 << 30;

/// A processor with SVM that QEMU can emulate; what it can't is switched off so that it does not warn of it.
const CPU: &str = "EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";

/// The kernel's command line. The clock needs no watchdog and the emulated processor no mitigations. The kernel boots on
/// one processor, since most of its patching of itself happens then; init.sh starts the others.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr tsc=nowatchdog clocksource=tsc \
                       random.trust_cpu=on apparmor=0 maxcpus=1 no_timer_check";

/// A century is no limit.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How long a machine may say nothing before it is taken for lost. It says that it is alive every ten seconds of its
/// own time, unless it counts instructions.
const SILENCE: Duration = Duration::from_secs(150);

/// A directory of the host that the machine sees.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    /// The name of its mount tag.
    pub(crate) tag: String,
    /// Where it is on the host.
    pub(crate) host: PathBuf,
    /// Whether the machine may write to it.
    pub(crate) writable: bool,
}

/// A machine that has reached user space and waits for its command.
pub(crate) struct Machine {
    qemu: Child,
    control: UnixStream,
    monitor: Monitor,
    events: Receiver<Event>,
    /// How long it may say nothing.
    patience: Duration,
    pumps: Vec<JoinHandle<()>>,
    console: PathBuf,
}

/// What the machine says on its control port.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// It is set up; the rest of the line describes it.
    Ready(String),
    /// The command runs, and the machine with it.
    Alive,
    /// The command ended with this code.
    Exit(u8),
}

impl Event {
    fn parse(line: &str) -> Option<Self> {
        match line.trim_end().split_once(' ') {
            Some(("ready", what)) => Some(Self::Ready(what.to_owned())),
            Some(("exit", code)) => code.parse().ok().map(Self::Exit),
            None if line.trim_end() == "alive" => Some(Self::Alive),
            _ => None,
        }
    }
}

/// Where bytes go as they come.
pub(crate) type Sink = Arc<Mutex<dyn Write + Send>>;

/// How the command's input and output reach the caller.
#[derive(Clone)]
pub(crate) enum Terminal {
    /// Standard output goes to the caller's as it comes, and standard error to this.
    Streams(Sink),
    /// The caller's terminal is the machine's console.
    Shell,
}

impl Machine {
    /// Starts QEMU and waits until the machine is set up. One that does not get there within `limit` is ended.
    ///
    /// # Errors
    /// When QEMU can't be started, or the machine ends or hangs while it boots: [`BootFailed`] then.
    pub(crate) fn boot(
        host: &Host,
        bed: &Testbed,
        args: &MachineArgs,
        (shares, terminal): (&[Share], Terminal),
        (console, limit): (&Path, Duration),
    ) -> Result<Self> {
        let scratch = scratch_disk(host)?;
        let (control, theirs) = UnixStream::pair().context("making a socket pair")?;
        let (stdout, stdout_end) = io::pipe().context("making a pipe")?;
        let (stderr, stderr_end) = io::pipe().context("making a pipe")?;

        let mut qemu = qemu(bed, args, console);
        // QEMU's throw-away layer over the root goes to a file without a name, beside the cache and not in /tmp.
        qemu.env("TMPDIR", host.cache.root());
        qemu.arg("-drive")
            .arg(format!("{DISK},id=scratch,snapshot=off,file=/proc/self/fd/{}", scratch.as_raw_fd()));
        qemu.args(["-device", "virtio-blk-pci,drive=scratch"]);
        for (name, fd) in [("stdout", stdout_end.as_raw_fd()), ("stderr", stderr_end.as_raw_fd())] {
            qemu.arg("-chardev").arg(format!("file,id={name},path=/proc/self/fd/{fd}"));
            qemu.arg("-device").arg(format!("virtserialport,chardev={name},name=caisson.{name}"));
            proc::inherit(&mut qemu, fd);
        }
        qemu.arg("-chardev").arg(format!("socket,id=control,fd={}", theirs.as_raw_fd()));
        qemu.args(["-device", "virtserialport,chardev=control,name=caisson.control"]);
        proc::inherit(&mut qemu, scratch.as_raw_fd());
        proc::inherit(&mut qemu, theirs.as_raw_fd());
        let (monitor, monitor_end) = Monitor::of(&mut qemu)?;
        let shell = matches!(terminal, Terminal::Shell);
        let errors: Sink = match terminal {
            Terminal::Shell => {
                qemu.args(["-chardev", "stdio,id=tty,signal=off", "-device", "virtconsole,chardev=tty"]);
                Arc::new(Mutex::new(io::stderr()))
            }
            Terminal::Streams(errors) => {
                qemu.stdin(Stdio::null());
                errors
            }
        };
        for (number, share) in shares.iter().enumerate() {
            let mode = if share.writable { "" } else { ",readonly=on" };
            let path = share.host.display();
            qemu.arg("-fsdev");
            qemu.arg(format!("local,id=fs{number},path={path},security_model=none,multidevs=remap{mode}"));
            qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev=fs{number},mount_tag={}", share.tag));
        }
        let child = qemu.spawn().context("starting qemu-system-x86_64")?;
        drop((stdout_end, stderr_end, theirs, scratch, monitor_end));

        let pumps = vec![pump(stdout, Arc::new(Mutex::new(io::stdout()))), pump(stderr, errors)];
        let events = listen(control.try_clone().context("duplicating the control socket")?);
        // Nobody knows how long ten seconds take when they are counted in instructions.
        let patience = if args.icount || shell { FOREVER } else { SILENCE };
        let console = console.to_owned();
        let mut machine = Self { qemu: child, control, monitor, events, patience, pumps, console };
        machine.wait_ready(limit)?;
        Ok(machine)
    }

    fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        match self.events.recv_timeout(limit) {
            Ok(Event::Ready(what)) => {
                eprintln!("==> testbed: {what}");
                Ok(())
            }
            Ok(event) => bail!("the testbed said {event:?} before it was ready"),
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("was not up within {}", proc::clock(limit));
                Err(BootFailed { what, console: self.console_tail() }.into())
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(BootFailed { what: "ended".to_owned(), console: self.console_tail() }.into())
            }
        }
    }

    /// Lets the command run and waits for its end.
    ///
    /// # Errors
    /// When the machine ends before its command or says nothing any more: [`Lost`] then; and when the command is still
    /// running at the end of `limit`: [`TimedOut`].
    pub(crate) fn run(mut self, limit: Option<Duration>) -> Result<u8> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("reading the clock")?;
        writeln!(self.control, "go {}", now.as_secs()).context("telling the testbed to go")?;
        let limit = limit.unwrap_or(FOREVER);
        let started = Instant::now();
        loop {
            let rest = limit.saturating_sub(started.elapsed());
            match self.events.recv_timeout(rest.min(self.patience)) {
                Ok(Event::Alive) => {}
                Ok(Event::Exit(code)) => {
                    self.end();
                    return Ok(code);
                }
                Ok(event) => bail!("the testbed said {event:?} while its command ran"),
                Err(RecvTimeoutError::Timeout) if started.elapsed() >= limit => {
                    return Err(TimedOut { limit }.into());
                }
                Err(RecvTimeoutError::Timeout) => return Err(self.silent().into()),
                Err(RecvTimeoutError::Disconnected) => {
                    let deadline = Instant::now() + Duration::from_secs(5);
                    let status = proc::wait_until(&mut self.qemu, deadline)?;
                    let what = format!("ended before its command (QEMU: {status})");
                    return Err(Lost { what, state: self.console_tail() }.into());
                }
            }
        }
    }

    /// Asks a machine that says nothing where it is.
    fn silent(&mut self) -> Lost {
        let registers = self.monitor.where_it_is();
        let what = format!("has said nothing for {}", proc::clock(self.patience));
        Lost { what, state: format!("its registers, twice:\n{registers}\n{}", self.console_tail()) }
    }

    /// Ends QEMU, and waits until everything that the command wrote has been passed on.
    fn end(&mut self) {
        // It may have ended already. Its disks are thrown away and its shares have no cache: nothing is lost.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
    }

    fn console_tail(&self) -> String {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        format!("its console's end:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// A boot that hung or crashed. Emulated multiprocessors do that now and then (a processor may miss that another has
/// patched the code it runs); it is tried again.
#[derive(Debug, thiserror::Error)]
#[error("the booting testbed {what}; {console}")]
pub(crate) struct BootFailed {
    what: String,
    console: String,
}

/// A machine that ended or hung while its command ran.
#[derive(Debug, thiserror::Error)]
#[error("the testbed {what}; {state}")]
pub(crate) struct Lost {
    what: String,
    state: String,
}

/// A command that did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("the command was still running after {}", proc::clock(*limit))]
pub(crate) struct TimedOut {
    limit: Duration,
}

/// What all disks have in common: they are thrown away, so nothing is ever flushed.
const DISK: &str = "if=none,format=raw,cache=unsafe,aio=threads,discard=unmap";

fn qemu(bed: &Testbed, args: &MachineArgs, console: &Path) -> Command {
    let mut qemu = bed.qemu.command();
    let (threads, cpus) = if args.icount { ("single", 1) } else { ("multi", args.cpus) };
    let mut cmdline = CMDLINE.to_owned();
    if args.icount {
        qemu.args(["-icount", "shift=0"]);
        cmdline.push_str(" caisson.icount");
    }
    for more in args.variant.words().into_iter().chain(args.append.as_deref()) {
        cmdline.push(' ');
        cmdline.push_str(more);
    }
    qemu.args(["-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-cpu", CPU]);
    qemu.arg("-accel").arg(format!("tcg,thread={threads},tb-size=1024"));
    qemu.arg("-m").arg(&args.memory).arg("-smp").arg(cpus.to_string());
    qemu.arg("-kernel").arg(&bed.kernel).arg("-initrd").arg(&bed.initramfs).arg("-append").arg(cmdline);
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    qemu.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    // A network that leads nowhere: tests that would need the world outside fail here as they would elsewhere.
    qemu.args(["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile="]);
    qemu.arg("-drive").arg(format!("{DISK},id=root,snapshot=on,file={}", bed.root.display()));
    qemu.args(["-device", "virtio-blk-pci,drive=root"]);
    qemu
}

/// A formatted disk in a file without a name: it is gone when QEMU is.
fn scratch_disk(host: &Host) -> Result<File> {
    let file = tempfile::tempfile_in(host.cache.root()).context("making the scratch disk")?;
    file.set_len(SCRATCH_SIZE).context("sizing the scratch disk")?;
    let mut format = proc::dies_with_us("mke2fs", Signal::SIGKILL);
    format.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1"]);
    format.arg(format!("/proc/self/fd/{}", file.as_raw_fd()));
    proc::inherit(&mut format, file.as_raw_fd());
    proc::run(&mut format)?;
    Ok(file)
}

/// Passes on what comes out of a pipe as it comes.
fn pump(mut from: PipeReader, to: Sink) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(count @ 1..) = io::Read::read(&mut from, &mut buffer) {
            // A caller that has closed its end is not told anything; the command still runs to its end.
            let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
        }
    })
}

/// Reads the control port until it closes.
fn listen(control: UnixStream) -> Receiver<Event> {
    let (sender, events) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(control).lines().map_while(Result::ok) {
            let Some(event) = Event::parse(&line) else { continue };
            if sender.send(event).is_err() {
                return;
            }
        }
    });
    events
}

/// Boots a machine; a boot that hangs or crashes is tried again with twice the time, three times in all.
///
/// # Errors
/// When the machine can't be booted.
pub(crate) fn boot(
    host: &Host,
    bed: &Testbed,
    args: &MachineArgs,
    shares: &[Share],
    terminal: &Terminal,
) -> Result<Machine> {
    let scratch = host.cache.scratch()?;
    let console = scratch.path().join("console");
    let mut attempt = 0;
    loop {
        let started = Instant::now();
        match Machine::boot(host, bed, args, (shares, terminal.clone()), (&console, args.boot_limit(attempt)))
        {
            Ok(machine) => {
                eprintln!("==> testbed booted in {}", proc::clock(started.elapsed()));
                return Ok(machine);
            }
            Err(error) if error.is::<BootFailed>() && attempt < 2 => {
                eprintln!("==> {error}\n==> trying again");
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_three_things() {
        assert_eq!(Event::parse("ready 6.12 cpus=2"), Some(Event::Ready("6.12 cpus=2".to_owned())));
        assert_eq!(Event::parse("exit 7\n"), Some(Event::Exit(7)));
        assert_eq!(Event::parse("alive\n"), Some(Event::Alive));
        assert_eq!(Event::parse("exit 700"), None);
        assert_eq!(Event::parse("hello"), None);
    }
}
