//! A process as containerd sees it: made, started, ended, in this order, each told once.

use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, MutexGuard, watch};

use crate::events::{Event, Events};
use crate::streams::{Stdio, Streams};

/// How long the end of a process is held back for output that nobody takes.
const OUTPUT: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code, or 128 and the signal's number.
    pub code: u32,
    /// When.
    pub at: SystemTime,
}

impl Exit {
    /// That of a process which was killed with its machine.
    pub fn killed() -> Exit {
        Exit { code: 137, at: SystemTime::now() }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It waits to be started.
    Created,
    /// It was started.
    Running,
    /// It has ended.
    Stopped(Exit),
}

/// A container's own process (`exec` empty), or one that was added to it.
#[derive(Debug)]
pub struct Process {
    /// The container.
    pub container: String,
    /// The process among the container's; empty for its own.
    pub exec: String,
    /// Its streams on the host.
    pub stdio: Stdio,
    status: watch::Sender<Status>,
    streams: Mutex<Option<Streams>>,
    /// Held while one step of its life is taken and told, so that no later one is told before it.
    order: Mutex<()>,
}

impl Process {
    /// One that waits to be started.
    pub fn new(container: &str, exec: &str, stdio: Stdio) -> Process {
        Process {
            container: container.to_owned(),
            exec: exec.to_owned(),
            stdio,
            status: watch::Sender::new(Status::Created),
            streams: Mutex::new(None),
            order: Mutex::new(()),
        }
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// How it has ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        match self.status() {
            Status::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut status = self.status.subscribe();
        loop {
            if let Status::Stopped(exit) = *status.borrow_and_update() {
                return exit;
            }
            // The sender is `self`'s.
            if status.changed().await.is_err() {
                return Exit::killed();
            }
        }
    }

    /// Gives it its streams.
    pub async fn attach(&self, streams: Streams) {
        *self.streams.lock().await = Some(streams);
    }

    /// Closes its input behind what was written so far.
    pub async fn close_input(&self) {
        if let Some(streams) = &*self.streams.lock().await {
            streams.close_input();
        }
    }

    /// To be held while it is started: its end is told after that.
    pub async fn starting(&self) -> MutexGuard<'_, ()> {
        self.order.lock().await
    }

    /// It was started; told by the one who holds [`starting`](Self::starting). Returns whether it was waiting for that
    /// until now.
    pub fn started(&self, _held: &MutexGuard<'_, ()>) -> bool {
        self.step_from_created(Status::Running)
    }

    /// It will never run: who waits for its end learns that there is none to wait for, and nobody else is told. Returns
    /// whether it was waiting to be started until now.
    pub fn abandon(&self) -> bool {
        self.step_from_created(Status::Stopped(Exit::killed()))
    }

    fn step_from_created(&self, next: Status) -> bool {
        self.status.send_if_modified(|status| {
            let waits = *status == Status::Created;
            if waits {
                *status = next;
            }
            waits
        })
    }

    /// It has ended: once its output has gone where it belongs, this is told. Only the first end counts.
    ///
    /// What nobody takes in time waits on until the process is forgotten: a containerd that is away comes back for it.
    /// What may only come yet, from others that the process has left with its output, is not waited for.
    pub async fn end(&self, exit: Exit, pid: u32, events: &Events) {
        let streams = self.streams.lock().await.take();
        if let Some(mut streams) = streams
            && !streams.finish(OUTPUT).await
            && streams.is_waiting()
        {
            tracing::warn!(container = self.container, exec = self.exec, "output is not taken, and waits");
            *self.streams.lock().await = Some(streams);
        }
        let _held = self.order.lock().await;
        let first = self.status.send_if_modified(|status| {
            let first = !matches!(status, Status::Stopped(_));
            if first {
                *status = Status::Stopped(exit);
            }
            first
        });
        if first {
            events.emit(Event::Exit {
                container: self.container.clone(),
                exec: self.exec.clone(),
                pid,
                status: exit.code,
                at: exit.at,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::net::unix::pipe;
    use tokio::time::Instant;

    #[tokio::test]
    async fn the_first_end_counts_and_all_who_wait_hear_of_it() {
        let (events, _publisher) = Events::publish("", "n");
        let process = Arc::new(Process::new("c", "", Stdio::default()));
        let waiting = tokio::spawn({
            let process = process.clone();
            async move { process.wait().await }
        });
        let exit = Exit { code: 3, at: SystemTime::now() };
        process.end(exit, 1, &events).await;
        process.end(Exit::killed(), 1, &events).await;
        assert_eq!(waiting.await.unwrap(), exit);
        assert_eq!(process.wait().await, exit);
        let held = process.starting().await;
        assert!(!process.started(&held));
        assert_eq!(process.exit(), Some(exit), "what has ended does not start");
    }

    #[tokio::test]
    async fn one_that_will_never_run_keeps_nobody_waiting() {
        let process = Arc::new(Process::new("c", "e", Stdio::default()));
        let waiting = tokio::spawn({
            let process = process.clone();
            async move { process.wait().await }
        });
        assert!(process.abandon());
        assert_eq!(waiting.await.unwrap(), process.exit().unwrap());
        assert!(!process.abandon());
        let process = Process::new("c", "e", Stdio::default());
        assert!(process.started(&process.starting().await));
        assert!(!process.abandon());
        assert_eq!(process.status(), Status::Running);
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_takes_outlives_the_process_and_does_not_hold_it_up() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("out");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        // Open, and not read from.
        let mut reader = pipe::OpenOptions::new().open_receiver(&fifo).unwrap();
        let (mut guest, shim) = UnixStream::pair().unwrap();
        let (events, _publisher) = Events::publish("", "n");
        let process = Process::new("c", "", Stdio::default());
        process.attach(Streams::of_output(shim, fifo.to_str().unwrap())).await;
        let said = vec![7; 100_000];
        guest.write_all(&said).await.unwrap();
        drop(guest);
        let begin = Instant::now();
        process.end(Exit::killed(), 1, &events).await;
        assert_eq!(begin.elapsed().as_secs(), OUTPUT.as_secs());
        let mut taken = Vec::new();
        reader.read_to_end(&mut taken).await.unwrap();
        assert_eq!(taken, said);
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_may_come_yet_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let (_guest, shim) = UnixStream::pair().unwrap();
        let (events, _publisher) = Events::publish("", "n");
        let process = Process::new("c", "", Stdio::default());
        let file = format!("file://{}/out", directory.path().display());
        process.attach(Streams::of_output(shim, &file)).await;
        process.end(Exit::killed(), 1, &events).await;
        assert!(process.streams.lock().await.is_none());
    }

    #[tokio::test]
    async fn an_end_is_not_told_before_the_start() {
        let (events, _publisher) = Events::publish("", "n");
        let process = Arc::new(Process::new("c", "", Stdio::default()));
        let held = process.starting().await;
        let ending = tokio::spawn({
            let process = process.clone();
            async move { process.end(Exit::killed(), 1, &events).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(process.status(), Status::Created);
        process.started(&held);
        drop(held);
        ending.await.unwrap();
        assert_eq!(process.exit().unwrap().code, 137);
    }
}
