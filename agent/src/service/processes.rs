//! The processes of containers as the protocol sees them: their streams, and an exit that waits for the output.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_protocol::limits::{DRAIN_TIMEOUT, MAX_CONTAINERS, MAX_EXECS};
use caisson_protocol::v1::{ExitStatus, OutOfMemory, ProcessExit, StreamIds, StreamSelection, event};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tonic::Status;

use crate::container::{Event, Exit as Ended, Stdio};
use crate::reaper;
use crate::state::{State, lock};
use crate::streams::{self, Exit, Fd, Finish, Port};
use crate::task;

/// How long the streams of what was removed may still hand over what they have.
const LINGER: Duration = Duration::from_secs(1);

/// A container's id and a process's in it, empty for its init.
type Key = (String, String);

/// All processes that were not forgotten. Clones share one table.
#[derive(Clone)]
pub(super) struct Processes {
    state: Arc<State>,
    table: Arc<Mutex<HashMap<Key, Process>>>,
}

struct Process {
    exit: Exit,
    status: watch::Sender<Option<ExitStatus>>,
    close: Arc<Notify>,
    pumps: Vec<AbortHandle>,
}

/// Pumps of a process that may yet fail to be prepared.
#[derive(Default)]
struct Pumps(Vec<AbortHandle>);

impl Drop for Pumps {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// The streams of a process that is about to be made.
pub(super) struct Streams {
    pub(super) stdio: Stdio,
    pub(super) ids: StreamIds,
    terminal: Option<(Port, Finish)>,
}

impl Processes {
    pub(super) fn new(state: Arc<State>) -> Processes {
        Processes { state, table: Arc::default() }
    }

    /// Registers a process before it is made, so that its exit can not come too early.
    pub(super) fn prepare(
        &self,
        container: &str,
        process: &str,
        selection: &StreamSelection,
        terminal: bool,
    ) -> Result<Streams, Status> {
        let mut table = lock(&self.table);
        let key = (container.to_owned(), process.to_owned());
        if table.contains_key(&key) {
            return Err(Status::already_exists(format!("{container} {process} exists")));
        }
        room(&table, container, process)?;
        let (close, registry) = (Arc::new(Notify::new()), &self.state.streams);
        let mut streams = Streams { stdio: Stdio::default(), ids: StreamIds::default(), terminal: None };
        let mut pumps = Pumps::default();
        let exit = if terminal {
            let (exit, mut finishes) = Exit::new(1);
            let port = registry.open();
            streams.ids.terminal = port.id();
            streams.terminal = finishes.pop().map(|finish| (port, finish));
            exit
        } else {
            let outputs = [selection.stdout, selection.stderr];
            let (exit, mut finishes) = Exit::new(outputs.iter().filter(|&&wanted| wanted).count());
            if selection.stdin {
                let (theirs, ours) = pipe()?;
                let port = registry.open();
                streams.ids.stdin = port.id();
                streams.stdio.stdin = Some(theirs);
                pumps.0.push(task::spawn(streams::feed(port, fd(ours)?, close.clone())).abort_handle());
            }
            for (wanted, id, end) in [
                (selection.stdout, &mut streams.ids.stdout, &mut streams.stdio.stdout),
                (selection.stderr, &mut streams.ids.stderr, &mut streams.stdio.stderr),
            ] {
                if wanted && let Some(finish) = finishes.pop() {
                    let (ours, theirs) = pipe()?;
                    let port = registry.open();
                    *id = port.id();
                    *end = Some(theirs);
                    let source = Arc::new(fd(ours)?);
                    pumps.0.push(task::spawn(streams::drain(port, source, finish)).abort_handle());
                }
            }
            exit
        };
        let pumps = std::mem::take(&mut pumps.0);
        table.insert(key, Process { exit, status: watch::Sender::new(None), close, pumps });
        Ok(streams)
    }

    /// The process was made; `console` is its terminal.
    pub(super) fn made(
        &self,
        container: &str,
        process: &str,
        terminal: Option<(Port, Finish)>,
        console: Option<OwnedFd>,
    ) -> Result<(), Status> {
        if let (Some((port, finish)), Some(console)) = (terminal, console) {
            let pump = task::spawn(streams::terminal(port, Arc::new(fd(console)?), finish));
            if let Some(process) = lock(&self.table).get_mut(&(container.to_owned(), process.to_owned())) {
                process.pumps.push(pump.abort_handle());
            }
        }
        Ok(())
    }

    /// Forgets a process: it was removed, or could not be made.
    pub(super) fn forget(&self, container: &str, process: &str) {
        let removed = lock(&self.table).remove(&(container.to_owned(), process.to_owned()));
        removed.into_iter().for_each(Process::end);
    }

    /// Forgets all processes of a container.
    pub(super) fn forget_all(&self, container: &str) {
        let mut table = lock(&self.table);
        let removed: Vec<_> = table.extract_if(|key, _| key.0 == container).collect();
        removed.into_iter().for_each(|(_, process)| process.end());
    }

    /// Closes stdin after what has arrived; none is fine.
    pub(super) fn close_stdin(&self, container: &str, process: &str) -> Result<(), Status> {
        self.get(container, process, |process| process.close.notify_one())
    }

    /// The status, if the process has ended and its output was handed over.
    pub(super) fn status(&self, container: &str, process: &str) -> Option<ExitStatus> {
        self.get(container, process, |process| *process.status.borrow()).ok().flatten()
    }

    /// Returns the status once the process has ended and its output was handed over.
    pub(super) async fn wait(&self, container: &str, process: &str) -> Result<ExitStatus, Status> {
        let mut status = self.get(container, process, |process| process.status.subscribe())?;
        let ended = status.wait_for(Option::is_some).await;
        ended.ok().and_then(|status| *status).ok_or_else(|| not_found(container, process))
    }

    fn get<T>(&self, container: &str, process: &str, what: impl FnOnce(&Process) -> T) -> Result<T, Status> {
        let table = lock(&self.table);
        let key = (container.to_owned(), process.to_owned());
        table.get(&key).map(what).ok_or_else(|| not_found(container, process))
    }

    /// Passes on what the runtime tells, until it is gone.
    pub(super) async fn follow(self, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Oom { container, kills } => {
                    let oom = OutOfMemory { container_id: container, oom_kills: kills };
                    self.state.emit(event::Kind::Oom(oom));
                }
                Event::Exit { container, process, pid, exit } => {
                    let known = lock(&self.table)
                        .get(&(container.clone(), process.clone()))
                        .map(|known| (known.exit.clone(), known.status.clone()));
                    let status = Some(exit_status(&exit));
                    let mut exit = ProcessExit { container_id: container, exec_id: process, pid, status };
                    match known {
                        Some((drain, status)) => {
                            task::spawn(report(self.state.clone(), drain, status, exit));
                        }
                        // Forgotten before its end was noticed, and with it what it had to say.
                        None => {
                            exit.status.iter_mut().for_each(|status| status.output_complete = false);
                            self.state.emit(event::Kind::Exit(exit));
                        }
                    }
                }
            }
        }
    }
}

/// Whether there may be one more container, or one more exec in it.
fn room(table: &HashMap<Key, Process>, container: &str, process: &str) -> Result<(), Status> {
    let (of_its_kind, limit) = if process.is_empty() {
        (table.keys().filter(|key| key.1.is_empty()).count(), MAX_CONTAINERS)
    } else {
        (table.keys().filter(|key| key.0 == container && !key.1.is_empty()).count(), MAX_EXECS)
    };
    if of_its_kind < limit {
        return Ok(());
    }
    Err(Status::resource_exhausted(match process {
        "" => format!("there are {limit} containers already"),
        _ => format!("{container} has {limit} execs already"),
    }))
}

/// Tells an exit after the last byte of the process's output.
async fn report(
    state: Arc<State>,
    mut drain: Exit,
    sender: watch::Sender<Option<ExitStatus>>,
    mut exit: ProcessExit,
) {
    let drained = tokio::time::timeout(DRAIN_TIMEOUT, drain.drained()).await.unwrap_or(false);
    if let Some(status) = &mut exit.status {
        status.output_complete = drained;
    }
    sender.send_replace(exit.status);
    state.emit(event::Kind::Exit(exit));
}

fn exit_status(exit: &Ended) -> ExitStatus {
    let signal = match exit.status {
        reaper::ExitStatus::Exited(_) => 0,
        reaper::ExitStatus::Signaled(signal) => u32::try_from(signal).unwrap_or(0),
    };
    ExitStatus {
        code: u32::try_from(exit.status.code()).unwrap_or(255),
        signal,
        exited_at_ns: nanoseconds(exit.at),
        output_complete: true,
    }
}

fn nanoseconds(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Process {
    /// Streams may hand over what they have for a moment.
    fn end(self) {
        task::spawn(async move {
            tokio::time::sleep(LINGER).await;
            self.pumps.iter().for_each(AbortHandle::abort);
        });
    }
}

impl Streams {
    /// Parts them: what the runtime takes, what the client is told, and the terminal's stream.
    pub(super) fn parts(self) -> (Stdio, StreamIds, Option<(Port, Finish)>) {
        (self.stdio, self.ids, self.terminal)
    }
}

fn not_found(container: &str, process: &str) -> Status {
    Status::not_found(format!("no process {process:?} in container {container:?}"))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Status> {
    pipe2(OFlag::O_CLOEXEC).map_err(|errno| Status::resource_exhausted(format!("make a pipe: {errno}")))
}

fn fd(fd: OwnedFd) -> Result<Fd, Status> {
    Fd::new(fd).map_err(|error| Status::internal(format!("watch a stream: {error}")))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::reaper::Reaper;
    use crate::ring::Ring;

    fn processes() -> Processes {
        let (root, lines) = (std::path::Path::new("/nowhere"), Arc::new(Ring::new(1)));
        Processes::new(Arc::new(State::new(root, false, Reaper::start().unwrap(), lines).unwrap()))
    }

    #[tokio::test]
    async fn there_are_so_many_containers_and_so_many_execs_of_each() {
        let processes = processes();
        let prepare = |container: &str, process: &str| {
            let prepared = processes.prepare(container, process, &StreamSelection::default(), false);
            prepared.map(drop).map_err(|status| status.code())
        };
        for number in 0..MAX_CONTAINERS {
            prepare(&number.to_string(), "").unwrap();
        }
        assert_eq!(prepare("more", ""), Err(Code::ResourceExhausted));
        for number in 0..MAX_EXECS {
            prepare("0", &number.to_string()).unwrap();
        }
        assert_eq!(prepare("0", "more"), Err(Code::ResourceExhausted));
        prepare("1", "another container's").unwrap();
        // What is forgotten makes room.
        processes.forget("0", "7");
        processes.forget("2", "");
        prepare("0", "more").unwrap();
        prepare("more", "").unwrap();
        assert_eq!(prepare("0", "more"), Err(Code::AlreadyExists));
    }
}
