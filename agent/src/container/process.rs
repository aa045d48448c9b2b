//! A process of a container, from the agent's side: launched through the helper, started, signalled, awaited.

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio as ChildStdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::Pid;
use tokio::sync::{oneshot, watch};

use super::cgroup::Cgroup;
use super::init::wire::{self, Answer, Order, Setup, Word};
use super::{Created, Error, Exit, State, Stdio, init, sys, validate};
use crate::oci;
use crate::process::lower_limits;
use crate::reaper::{ExitStatus, Reaper};

/// Bound on each step of the helper; generous, as the guest may be starved of CPU.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);

/// A process of a container.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    /// Present until the process is started.
    gate: Mutex<Option<UnixStream>>,
}

impl Process {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Whether it was told to start.
    pub(super) fn started(&self) -> bool {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Lets the process execute its program; returns when it does.
    pub(super) fn start(&self, id: &str) -> Result<(), Error> {
        let taken = self.gate.lock().unwrap_or_else(PoisonError::into_inner).take();
        let actual = if self.exit().is_some() { State::Stopped } else { State::Running };
        let Some(gate) = taken.filter(|_| actual == State::Running) else {
            return Err(Error::State { id: id.to_owned(), actual });
        };
        let mut channel = Channel { stream: gate };
        channel.order(Order::START)?;
        match channel.answer()? {
            // The helper's end is close-on-exec.
            None => Ok(()),
            Some((Word::Failed(failure), _)) => Err(failure.into()),
            Some(_) => Err(Error::HelperGone),
        }
    }

    pub(super) fn signal(&self, container: &str, signal: i32) -> Result<(), Error> {
        sys::pidfd_send_signal(self.pidfd.as_fd(), signal).map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => {
                Error::NoProcess { container: container.to_owned(), process: self.pid.to_string() }
            }
            _ => Error::system("send a signal")(source),
        })
    }

    pub(super) async fn wait(&self) -> Result<Exit, Error> {
        let mut exit = self.exit.clone();
        let exit = exit.wait_for(Option::is_some).await.map_err(|_| Error::HelperGone)?;
        exit.ok_or(Error::HelperGone)
    }

    pub(super) fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        let terminal = self.terminal.as_ref().ok_or(Error::NoTerminal)?;
        sys::resize(terminal.as_fd(), width, height).map_err(Error::system("resize the terminal"))
    }
}

/// What it takes to launch a process.
pub(super) struct Launch<'a> {
    pub(super) helper: BorrowedFd<'a>,
    pub(super) reaper: &'a Reaper,
    pub(super) cgroup: &'a Cgroup,
    /// The first process of the container that it is an exec of.
    pub(super) init: Option<u32>,
    /// Of the container whose first process it is.
    pub(super) linux: Option<&'a oci::Linux>,
}

impl Launch<'_> {
    /// Makes a process up to the point where it waits to be started. On an error nothing of it is left.
    pub(super) fn run(
        self,
        setup: Setup,
        process: &oci::Process,
        stdio: Stdio,
    ) -> Result<(Process, Created), Error> {
        let hold = self.reaper.hold();
        let (ours, theirs) = UnixStream::pair().map_err(Error::system("make a socket pair"))?;
        ours.set_read_timeout(Some(HELPER_TIMEOUT)).map_err(Error::system("bound the helper's time"))?;
        let helper = self.spawn(&theirs, stdio)?;
        drop(theirs);
        let helper = Victim(Some(pid_number(helper)?));
        let helper_pid = helper.0.unwrap_or_default();
        // In the control group before it does anything on the container's behalf.
        self.cgroup.add(helper_pid, self.init)?;
        let mut channel = Channel { stream: ours };
        channel.send(&setup)?;
        let mut child = Victim(None);
        let terminal = loop {
            match channel.answer()?.ok_or(Error::HelperGone)? {
                (Word::Failed(failure), _) => return Err(failure.into()),
                (Word::Unshared(()), _) => {
                    self.linux.map_or(Ok(()), |linux| configure_namespaces(helper_pid, linux))?
                }
                (Word::Forked(pid), _) => child.0 = Some(pid),
                (Word::Ready(()), terminal) => break terminal,
            }
            channel.order(Order::CONTINUE)?;
        };
        let pid = child.0.ok_or(Error::HelperGone)?;
        let pidfd = sys::pidfd_open(pid).map_err(|_| Error::HelperGone)?;
        set_attributes(pid, process)?;
        let status = hold.watch(Pid::from_raw(i32::try_from(pid).map_err(|_| Error::HelperGone)?));
        let (sender, exit) = watch::channel(None);
        tokio::runtime::Handle::current().spawn(collect(status, sender));
        child.0 = None;
        let master = match &terminal {
            Some(fd) => Some(fd.try_clone().map_err(Error::system("duplicate the terminal"))?),
            None => None,
        };
        let gate = Mutex::new(Some(channel.stream));
        Ok((Process { pid, pidfd, terminal: master, exit, gate }, Created { pid, terminal }))
    }

    /// Executes the helper: its streams are the process's, descriptor 3 is the socket, nothing else is open.
    #[allow(clippy::zombie_processes)] // The reaper collects it.
    fn spawn(&self, socket: &UnixStream, stdio: Stdio) -> Result<u32, Error> {
        let stream = |fd: Option<OwnedFd>| fd.map_or_else(ChildStdio::null, ChildStdio::from);
        let mut command = Command::new(format!("/proc/self/fd/{}", self.helper.as_raw_fd()));
        command.arg0(init::ARGV0).env_clear().current_dir("/");
        command.stdin(stream(stdio.stdin)).stdout(stream(stdio.stdout)).stderr(stream(stdio.stderr));
        let socket = socket.as_raw_fd();
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe { command.pre_exec(move || place_socket(socket).and_then(|()| lower_limits())) };
        let child = command.spawn().map_err(Error::system("execute the helper"))?;
        Ok(child.id())
    }
}

fn place_socket(socket: RawFd) -> io::Result<()> {
    // SAFETY: plain descriptor calls; descriptor 3, if open, is a close-on-exec one of the agent that is not needed
    // any more, except `socket` itself.
    let result = unsafe {
        if socket == wire::SOCKET {
            libc::fcntl(socket, libc::F_SETFD, 0)
        } else {
            libc::dup2(socket, wire::SOCKET)
        }
    };
    sys::check(result.into())?;
    Ok(())
}

/// A process that must not survive a failure.
struct Victim(Option<u32>);

impl Drop for Victim {
    fn drop(&mut self) {
        // The hold keeps its pid from being reused; the helper itself ends when its socket does, or has ended.
        if let Some(pid) = self.0.and_then(|pid| i32::try_from(pid).ok()) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn pid_number(pid: u32) -> Result<u32, Error> {
    if pid > 0 { Ok(pid) } else { Err(Error::HelperGone) }
}

async fn collect(status: oneshot::Receiver<ExitStatus>, sender: watch::Sender<Option<Exit>>) {
    if let Ok(status) = status.await {
        let _ = sender.send(Some(Exit { status, at: SystemTime::now() }));
    }
}

/// Writes what only a process outside the new namespaces may write.
fn configure_namespaces(pid: u32, linux: &oci::Linux) -> Result<(), Error> {
    let write = |field: &str, file: &str, text: String| {
        fs::write(format!("/proc/{pid}/{file}"), text).map_err(Error::apply(field, format!("write {file}")))
    };
    if linux.creates(oci::NamespaceKind::User) {
        write("linux.uidMappings", "uid_map", id_map(&linux.uid_mappings))?;
        write("linux.gidMappings", "gid_map", id_map(&linux.gid_mappings))?;
    }
    if linux.creates(oci::NamespaceKind::Time) && !linux.time_offsets.is_empty() {
        let lines = linux.time_offsets.iter();
        let lines = lines.map(|(clock, offset)| format!("{clock} {} {}\n", offset.secs, offset.nanosecs));
        write("linux.timeOffsets", "timens_offsets", lines.collect())?;
    }
    Ok(())
}

/// Lines of uid_map or gid_map, user_namespaces(7).
pub(super) fn id_map(mappings: &[oci::IdMapping]) -> String {
    mappings.iter().map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.size)).collect()
}

/// Sets, from outside, attributes that take privileges which the process does not have any more.
fn set_attributes(pid: u32, process: &oci::Process) -> Result<(), Error> {
    for (index, limit) in process.rlimits.iter().enumerate() {
        let field = format!("process.rlimits[{index}]");
        let resource = validate::rlimit(&field, limit)?;
        sys::prlimit(pid, resource, limit.soft, limit.hard).map_err(Error::apply(field, "set the limit"))?;
    }
    if let Some(adjustment) = process.oom_score_adj {
        fs::write(format!("/proc/{pid}/oom_score_adj"), adjustment.to_string())
            .map_err(Error::apply("process.oomScoreAdj", "write oom_score_adj"))?;
    }
    if let Some(priority) = &process.io_priority {
        let value = validate::io_priority(priority)?;
        sys::ioprio_set(pid, value).map_err(Error::apply("process.ioPriority", "set the priority"))?;
    }
    if let Some(scheduler) = &process.scheduler {
        let attr = validate::scheduler(scheduler)?;
        sys::sched_setattr(pid, &attr).map_err(Error::apply("process.scheduler", "set the policy"))?;
    }
    Ok(())
}

/// The agent's end of the conversation with a helper.
struct Channel {
    stream: UnixStream,
}

impl Channel {
    fn send(&mut self, message: &impl prost::Message) -> Result<(), Error> {
        wire::send(&mut self.stream, message).map_err(Error::system("write to the helper"))
    }

    fn order(&mut self, order: Order) -> Result<(), Error> {
        self.send(&order)
    }

    /// The helper's next answer with the descriptor that came along; `None` when it closed its end.
    fn answer(&mut self) -> Result<Option<(Word, Option<OwnedFd>)>, Error> {
        let failed = || Error::system("read from the helper");
        let mut byte = [0_u8; 1];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut descriptor = None;
        // The first byte carries the descriptor, so that the rest can be read plainly.
        let length = {
            let mut buffers = [IoSliceMut::new(&mut byte)];
            let fd = self.stream.as_raw_fd();
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = loop {
                match recvmsg::<UnixAddr>(fd, &mut buffers, Some(&mut space), flags) {
                    Err(nix::errno::Errno::EINTR) => {}
                    // Killed before it had read everything.
                    Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                    other => break other.map_err(|errno| failed()(errno.into()))?,
                }
            };
            for control in message.cmsgs().map_err(|errno| failed()(errno.into()))? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    for fd in fds {
                        // SAFETY: the kernel has just installed this descriptor for us.
                        descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
            }
            message.bytes
        };
        if length == 0 {
            return Ok(None);
        }
        let answer: Answer = wire::receive(&mut self.stream).map_err(failed())?;
        Ok(Some((answer.word.ok_or(Error::HelperGone)?, descriptor)))
    }
}
