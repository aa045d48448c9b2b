//! Events on their way to containerd, in order.
//!
//! They go to the ttrpc socket that containerd names when it starts the shim. While containerd is away they wait, and
//! are sent when it is back.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::{self, Message, well_known_types::any::Any};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::invocation::UNIX;
use crate::streams::Stdio;
use crate::wire;

/// Events that wait for containerd. All but those of memory shortage answer to something that containerd asked for, so
/// their number is bounded by what it did not take yet.
const QUEUE: usize = 8192;
/// Beyond this, events that a guest can bring about at will are left out.
const QUEUE_FOR_GUESTS: usize = 1024;
/// How long one delivery may take.
const DELIVERY: Duration = Duration::from_secs(5);
/// Between attempts: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Something that happened to a task.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in containerd's API.
pub enum Event {
    /// A container was made; its process waits to be started.
    Create {
        container: String,
        bundle: String,
        stdio: Stdio,
        pid: u32,
    },
    Start {
        container: String,
        pid: u32,
    },
    ExecAdded {
        container: String,
        exec: String,
    },
    ExecStarted {
        container: String,
        exec: String,
        pid: u32,
    },
    /// `exec` is empty for the container's own process.
    Exit {
        container: String,
        exec: String,
        pid: u32,
        status: u32,
        at: SystemTime,
    },
    Delete {
        container: String,
        exec: String,
        pid: u32,
        status: u32,
        at: SystemTime,
    },
    OutOfMemory {
        container: String,
    },
    Paused {
        container: String,
    },
    Resumed {
        container: String,
    },
}

/// Where events are put. Clones share the queue.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<Item>,
}

/// The queue's other end, to be ended in order.
#[derive(Debug)]
pub struct Publisher {
    queue: mpsc::Sender<Item>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
enum Item {
    Event(Event, SystemTime),
    End,
}

impl Events {
    /// Begins to deliver to containerd's ttrpc socket at `address`; with an empty one, events go nowhere.
    pub fn publish(address: &str, namespace: &str) -> (Events, Publisher) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let delivery =
            Delivery { address: socket_address(address), namespace: namespace.to_owned(), client: None };
        let task = tokio::spawn(delivery.run(waiting));
        (Events { queue: queue.clone() }, Publisher { queue, task })
    }

    /// Puts an event behind those that wait. Never waits itself.
    pub fn emit(&self, event: Event) {
        let guests = matches!(event, Event::OutOfMemory { .. });
        let waiting = self.queue.max_capacity().saturating_sub(self.queue.capacity());
        if guests && waiting >= QUEUE_FOR_GUESTS {
            return;
        }
        if self.queue.try_send(Item::Event(event, SystemTime::now())).is_err() {
            tracing::error!("containerd takes no events: one is lost");
        }
    }
}

impl Publisher {
    /// Delivers what waits, for as long as `limit` at most, and ends.
    pub async fn close(self, limit: Duration) {
        let Publisher { queue, task } = self;
        let flushed = async {
            // A queue that is closed has no task behind it any more.
            let _ = queue.send(Item::End).await;
            let _ = task.await;
        };
        if timeout(limit, flushed).await.is_err() {
            tracing::warn!("containerd does not take the last events");
        }
    }
}

/// The task behind the queue.
struct Delivery {
    address: String,
    namespace: String,
    client: Option<EventsClient>,
}

impl Delivery {
    async fn run(mut self, mut waiting: mpsc::Receiver<Item>) {
        while let Some(Item::Event(event, at)) = waiting.recv().await {
            if self.address.is_empty() {
                continue;
            }
            match envelope(&event, at, &self.namespace) {
                Ok(envelope) => self.insist(envelope).await,
                Err(error) => tracing::error!(%error, ?event, "an event that can't be encoded is lost"),
            }
        }
    }

    /// Until it succeeds, or is refused for what it is: giving up is for whoever waits for the end.
    async fn insist(&mut self, envelope: Envelope) {
        let (mut pause, most) = RETRY;
        let request =
            ForwardRequest { envelope: protobuf::MessageField::some(envelope), ..ForwardRequest::default() };
        let mut told = false;
        while let Err(error) = self.try_once(&request).await {
            if let ttrpc::Error::RpcStatus(status) = &error
                && status.code() == ttrpc::Code::INVALID_ARGUMENT
            {
                tracing::error!(%error, "an event that containerd refuses is lost");
                return;
            }
            // A connection that failed once is of no use.
            self.client = None;
            if !told {
                tracing::warn!(%error, "containerd does not take an event, trying again");
                told = true;
            }
            sleep(pause).await;
            pause = (pause * 2).min(most);
        }
    }

    async fn try_once(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match &self.client {
            Some(client) => client,
            None => self.client.insert(EventsClient::new(Client::connect(&self.address).await?)),
        };
        client.forward(ttrpc::context::with_duration(DELIVERY), request).await.map(|_| ())
    }
}

/// containerd names a plain path; ttrpc wants to know what kind of socket it is.
fn socket_address(address: &str) -> String {
    if address.is_empty() || address.starts_with(UNIX) {
        address.to_owned()
    } else {
        format!("{UNIX}{address}")
    }
}

/// A topic, and the type and bytes of its message.
type Encoded = (&'static str, &'static str, Vec<u8>);

fn envelope(event: &Event, at: SystemTime, namespace: &str) -> protobuf::Result<Envelope> {
    let (topic, name, value) = encode(event)?;
    let any = Any { type_url: format!("containerd.events.{name}"), value, ..Any::default() };
    Ok(Envelope {
        timestamp: protobuf::MessageField::some(wire::timestamp(at)),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: protobuf::MessageField::some(any),
        ..Envelope::default()
    })
}

fn encode(event: &Event) -> protobuf::Result<Encoded> {
    Ok(match event.clone() {
        Event::Create { container, bundle, stdio, pid } => {
            let io = TaskIO {
                stdin: stdio.stdin,
                stdout: stdio.stdout,
                stderr: stdio.stderr,
                terminal: stdio.terminal,
                ..TaskIO::default()
            };
            let io = protobuf::MessageField::some(io);
            let message = TaskCreate { container_id: container, bundle, io, pid, ..TaskCreate::default() };
            (topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate", message.write_to_bytes()?)
        }
        Event::Start { container, pid } => {
            let message = TaskStart { container_id: container, pid, ..TaskStart::default() };
            (topics::TASK_START_EVENT_TOPIC, "TaskStart", message.write_to_bytes()?)
        }
        Event::ExecAdded { container, exec } => {
            let message =
                TaskExecAdded { container_id: container, exec_id: exec, ..TaskExecAdded::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded", message.write_to_bytes()?)
        }
        Event::ExecStarted { container, exec, pid } => {
            let message =
                TaskExecStarted { container_id: container, exec_id: exec, pid, ..TaskExecStarted::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted", message.write_to_bytes()?)
        }
        Event::Exit { container, exec, pid, status, at } => {
            let message = TaskExit {
                // containerd names the container's own process after it here.
                id: if exec.is_empty() { container.clone() } else { exec },
                container_id: container,
                pid,
                exit_status: status,
                exited_at: protobuf::MessageField::some(wire::timestamp(at)),
                ..TaskExit::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, "TaskExit", message.write_to_bytes()?)
        }
        Event::Delete { container, exec, pid, status, at } => {
            let message = TaskDelete {
                container_id: container,
                id: exec,
                pid,
                exit_status: status,
                exited_at: protobuf::MessageField::some(wire::timestamp(at)),
                ..TaskDelete::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete", message.write_to_bytes()?)
        }
        Event::OutOfMemory { container } => {
            let message = TaskOOM { container_id: container, ..TaskOOM::default() };
            (topics::TASK_OOM_EVENT_TOPIC, "TaskOOM", message.write_to_bytes()?)
        }
        Event::Paused { container } => {
            let message = TaskPaused { container_id: container, ..TaskPaused::default() };
            (topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused", message.write_to_bytes()?)
        }
        Event::Resumed { container } => {
            let message = TaskResumed { container_id: container, ..TaskResumed::default() };
            (topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed", message.write_to_bytes()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_names_the_process_as_containerd_does() {
        let exit = |exec: &str| {
            let event = Event::Exit {
                container: "c".into(),
                exec: exec.into(),
                pid: 7,
                status: 137,
                at: SystemTime::UNIX_EPOCH,
            };
            let (topic, _, bytes) = encode(&event).unwrap();
            assert_eq!(topic, "/tasks/exit");
            TaskExit::parse_from_bytes(&bytes).unwrap()
        };
        assert_eq!(exit("").id, "c");
        assert_eq!(exit("e").id, "e");
        assert_eq!(exit("e").exit_status, 137);
    }

    #[tokio::test]
    async fn without_an_address_events_go_nowhere_and_the_end_is_at_once() {
        let (events, publisher) = Events::publish("", "default");
        events.emit(Event::Paused { container: "c".into() });
        publisher.close(Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn a_containerd_that_stays_away_does_not_hold_up_the_end() {
        let (events, publisher) = Events::publish("/nonexistent/ttrpc", "default");
        events.emit(Event::Paused { container: "c".into() });
        let begin = std::time::Instant::now();
        publisher.close(Duration::from_millis(200)).await;
        assert!(begin.elapsed() < Duration::from_secs(3));
    }
}
