//! Child processes that end with xtask, whatever ends it.

use std::{
    ffi::OsStr,
    fs::File,
    io::{IsTerminal, Write, stderr},
    os::{fd::RawFd, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{prctl, signal::Signal},
};

/// How much of a failed command's log is shown.
const LOG_TAIL_LINES: usize = 40;

/// How often a long step says that it is still running when nobody watches it on a terminal.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(60);

/// Whether each long command tells of its progress.
static TELLS_PROGRESS: AtomicBool = AtomicBool::new(true);

/// Says whether each long command tells of its progress: not where one line tells of several that go on side by side.
pub(crate) fn tell_progress(tells: bool) {
    TELLS_PROGRESS.store(tells, Ordering::Relaxed);
}

/// Whether each long command tells of its progress.
pub(crate) fn tells_progress() -> bool {
    TELLS_PROGRESS.load(Ordering::Relaxed)
}

/// A command that receives `signal` when xtask dies.
///
/// The kernel ties this to the *thread* that starts the command: start it from one that lives as long as the command
/// is wanted.
pub(crate) fn dies_with_us(program: impl AsRef<OsStr>, signal: Signal) -> Command {
    let mut command = Command::new(program);
    let parent = nix::unistd::getpid();
    let arrange = move || {
        prctl::set_pdeathsig(signal)?;
        // The parent may have died before the line above.
        if nix::unistd::getppid() != parent {
            return Err(nix::errno::Errno::ESRCH.into());
        }
        Ok(())
    };
    // SAFETY: the closure makes two system calls and allocates nothing, so it is safe between fork and exec.
    unsafe { command.pre_exec(arrange) };
    command
}

/// Lets `command` inherit a descriptor, under the same number, that is close-on-exec in xtask itself.
///
/// The descriptor must stay open until the command is started.
pub(crate) fn inherit(command: &mut Command, fd: RawFd) {
    let clear = move || {
        // SAFETY: the caller keeps the descriptor open until the command is started, so it is open in the new process.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(())
    };
    // SAFETY: the closure makes one system call and allocates nothing, so it is safe between fork and exec.
    unsafe { command.pre_exec(clear) };
}

/// A command in PID and mount namespaces of its own: when xtask dies, everything that the command started dies, and
/// everything that it mounted is gone.
///
/// Without root it gets a user namespace too, in which it stays who it is.
pub(crate) fn contained(program: impl AsRef<OsStr>) -> Command {
    let mut command = dies_with_us("unshare", Signal::SIGKILL);
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-current-user"]);
    }
    command.args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL", "--"]);
    command.arg(program);
    command
}

/// Runs a command to its end and fails if it does.
///
/// # Errors
/// When it can't be started or exits with anything but 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", describe(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", describe(command));
    }
    Ok(())
}

/// Runs a command to its end and returns what it wrote to its standard output.
///
/// # Errors
/// When it can't be started or exits with anything but 0; the error holds what it wrote to its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {}", describe(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}\n{}", describe(command), output.status, said.trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a long command with its output in a log file, and shows that it is still at it.
///
/// # Errors
/// When it can't be started or exits with anything but 0; the end of the log is shown then.
pub(crate) fn run_logged(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let errors = file.try_clone().context("duplicating the log's descriptor")?;
    command.stdin(Stdio::null()).stdout(file).stderr(errors);
    let progress = Progress::start(what);
    let status = command.status().with_context(|| format!("starting {}", describe(command)))?;
    let elapsed = progress.finish();
    if !status.success() {
        let log_text = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = log_text.lines().collect();
        for line in &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..] {
            eprintln!("    {line}");
        }
        bail!("{what} failed after {} ({status}); the whole log is {}", clock(elapsed), log.display());
    }
    Ok(())
}

/// Waits for a child until `deadline`, and kills it then.
///
/// # Errors
/// When the child can't be waited for.
pub(crate) fn wait_until(child: &mut Child, deadline: Instant) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().context("waiting for a child")? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            // It may have ended by itself just now, which is what is wanted.
            let _ = child.kill();
            return child.wait().context("waiting for a child");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A line on standard error that says what is being done and for how long.
pub(crate) struct Progress {
    what: String,
    started: Instant,
    stop: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
}

impl Progress {
    /// Starts the line.
    pub(crate) fn start(what: &str) -> Self {
        let started = Instant::now();
        if !tells_progress() {
            return Self { what: what.to_owned(), started, stop: None };
        }
        let (stop, stopped) = mpsc::channel::<()>();
        let label = what.to_owned();
        let tty = stderr().is_terminal();
        let period = if tty { Duration::from_secs(1) } else { HEARTBEAT };
        if !tty {
            eprintln!("==> {label} ...");
        }
        let ticker = thread::spawn(move || {
            loop {
                if tty {
                    eprint!("\r==> {label} ... {}", clock(started.elapsed()));
                    let _ = stderr().flush();
                }
                if stopped.recv_timeout(period) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                if !tty {
                    eprintln!("    ... {label}: {}", clock(started.elapsed()));
                }
            }
        });
        Self { what: what.to_owned(), started, stop: Some((stop, ticker)) }
    }

    /// Ends the line and returns how long it took.
    pub(crate) fn finish(mut self) -> Duration {
        self.end()
    }

    fn end(&mut self) -> Duration {
        let elapsed = self.started.elapsed();
        if let Some((stop, ticker)) = self.stop.take() {
            drop(stop);
            // A ticker that panicked has nothing left to show.
            let _ = ticker.join();
            let back = if stderr().is_terminal() { "\r" } else { "" };
            eprintln!("{back}==> {}: {}", self.what, clock(elapsed));
        }
        elapsed
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// A duration as people read it on a wall: `7.3 s` or `12:05`.
pub(crate) fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        return format!("{:.1} s", duration.as_secs_f64());
    }
    format!("{}:{:02} min", seconds / 60, seconds % 60)
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_an_error_with_what_it_said() {
        let error =
            output(Command::new("sh").args(["-c", "echo no good >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("no good") && error.contains('3'), "{error}");
    }

    #[test]
    fn an_inherited_descriptor_is_open_in_the_child_and_others_are_not() {
        use std::os::fd::AsRawFd;
        let (shown, hidden) =
            (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let mut command = Command::new("find");
        command.args(["/proc/self/fd", "-printf", "%l\n"]);
        inherit(&mut command, shown.as_file().as_raw_fd());
        let listing = output(&mut command).unwrap();
        let has = |file: &tempfile::NamedTempFile| listing.contains(file.path().to_str().unwrap());
        assert!(has(&shown) && !has(&hidden), "{listing}");
    }

    #[test]
    fn durations_read_like_a_clock() {
        assert_eq!(clock(Duration::from_millis(7_300)), "7.3 s");
        assert_eq!(clock(Duration::from_secs(725)), "12:05 min");
    }

    #[test]
    fn a_child_that_never_ends_is_killed_at_the_deadline() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let status = wait_until(&mut child, Instant::now() + Duration::from_millis(50)).unwrap();
        assert!(!status.success());
    }

    /// Tells this test binary, started again by the test below, to be the xtask that is killed.
    const KILLED: &str = "XTASK_TEST_KILLED";

    #[test]
    fn nothing_survives_a_killed_xtask() {
        if let Ok(seconds) = std::env::var(KILLED) {
            // A tool that starts another, as make does.
            let script = format!("sleep {seconds} & sleep {seconds}; true");
            run(contained("sh").args(["-c", &script])).unwrap();
            return;
        }
        // So many seconds that no other process sleeps for the same.
        let seconds = format!("{}", 1_000_000 + std::process::id());
        let mut xtask = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "proc::tests::nothing_survives_a_killed_xtask", "--nocapture"])
            .env(KILLED, &seconds)
            .spawn()
            .unwrap();
        eventually("the tools run", || sleepers(&seconds) >= 2);
        xtask.kill().unwrap();
        xtask.wait().unwrap();
        eventually("the tools are gone", || sleepers(&seconds) == 0);
    }

    fn sleepers(seconds: &str) -> usize {
        let wanted = format!("sleep\0{seconds}\0");
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter(|entry| std::fs::read_to_string(entry.path().join("cmdline")).is_ok_and(|c| c == wanted))
            .count()
    }

    fn eventually(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(Instant::now() < deadline, "not in 10 s: {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
