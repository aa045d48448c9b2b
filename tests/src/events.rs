//! What containerd tells of containers' lives, as `ctr events` prints it.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{ctr::Ctr, node::Node};

/// How long an event may be on its way, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// A label of the namespace: to set it is an event of our own making.
const MARK: &str = "caisson.test/listening=yes";

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its topic, such as `/tasks/exit`.
    pub topic: String,
    /// What it says.
    pub body: Value,
}

impl Event {
    /// A line of `ctr events`: a date, a time, an offset and a zone, the namespace, the topic, and JSON.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(7, ' ');
        let topic = words.nth(5)?.to_owned();
        Some(Self { topic, body: serde_json::from_str(words.next()?).ok()? })
    }

    /// A text in it; empty when there is none.
    pub fn text(&self, key: &str) -> &str {
        self.body[key].as_str().unwrap_or_default()
    }

    /// A number in it; 0 when there is none.
    pub fn number(&self, key: &str) -> u64 {
        self.body[key].as_u64().unwrap_or_default()
    }
}

/// Everything that containerd tells from a moment on, in its namespace `default`.
#[derive(Debug)]
pub struct Events {
    ctr: Ctr,
    child: Child,
    lines: Receiver<String>,
    seen: Vec<Event>,
}

impl Events {
    /// Listens, and returns once what happens is heard.
    ///
    /// # Errors
    /// When nothing is heard.
    pub fn listen(node: &Node) -> Result<Self> {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(node.socket()).args(["--namespace", "default", "events"]);
        let mut child = command.stdout(Stdio::piped()).spawn().context("starting ctr events")?;
        let output = child.stdout.take().context("ctr has an output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || forward(output, &sender));
        let mut events = Self { ctr: Ctr::new(node), child, lines, seen: Vec::new() };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            events.mark()?;
            if events.next(Duration::from_millis(300))?.is_some() {
                return Ok(events);
            }
        }
        bail!("containerd's events are not heard")
    }

    /// Waits for one, and returns all until then since the last call, marks left out.
    ///
    /// # Errors
    /// When it does not come; the error lists what came.
    pub fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Vec<Event>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(event) = self.next(left)? else { bail!("it does not come: {:#?}", self.seen) };
            let found = wanted(&event);
            if !event.topic.starts_with("/namespaces/") {
                self.seen.push(event);
            }
            if found {
                return Ok(std::mem::take(&mut self.seen));
            }
        }
    }

    fn mark(&self) -> Result<()> {
        self.ctr.run(&["namespaces", "label", "default", MARK]).map(drop)
    }

    fn next(&mut self, within: Duration) -> Result<Option<Event>> {
        match self.lines.recv_timeout(within) {
            Ok(line) => Event::parse(&line).map(Some).with_context(|| format!("no event: {line:?}")),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("ctr events has ended"),
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(output: ChildStdout, lines: &Sender<String>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if lines.send(line).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line() {
        let line = "2026-11-20 10:00:00.123456789 +0000 UTC default /tasks/exit \
                    {\"container_id\":\"a b\",\"pid\":7}";
        let event = Event::parse(line).expect("an event");
        assert_eq!((event.topic.as_str(), event.text("container_id")), ("/tasks/exit", "a b"));
        assert_eq!((event.number("pid"), event.number("exit_status")), (7, 0));
        assert!(Event::parse("2026-11-20").is_none());
    }
}
