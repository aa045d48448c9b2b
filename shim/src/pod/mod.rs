//! A pod: one machine, and the containers in it.
//!
//! | module | owns |
//! |---|---|
//! | [`sandbox`] | what is made for the pod as a whole, and its end |
//! | [`host`] | the part of it that is on the host: directory, control group, share, network |
//! | [`size`] | how large it is, as its containers come, go and change |
//! | [`container`] | a container: its files, its configuration, its verbs |
//! | [`disks`] | disks that come and go while the machine runs |
//! | [`volumes`] | volumes that the guest has in place of the host's |
//! | [`process`] | the life of a process as containerd sees it |
//! | [`spec`] | the configuration of a container, rewritten for the guest |
//! | [`bare`], [`cri`] | a pod of the sandbox API, and what CRI says of it |
//! | [`error`] | why something was not done |
//!
//! The pause container of a sandbox is answered for and never run: its process "runs" for as long as the machine does,
//! and to kill it is to end the machine. A plain container is a pod of its own.

pub mod bare;
pub mod container;
pub mod cri;
pub mod disks;
pub mod error;
pub mod host;
pub mod process;
pub mod sandbox;
pub mod size;
pub mod spec;
pub mod volumes;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use caisson_protocol::v1;
use tokio::sync::watch;
use tokio::time::timeout;

use self::container::{Container, NewContainer};
pub use self::error::PodError;
use self::process::{Exit, Process, Status};
use self::sandbox::Sandbox;
use self::spec::SandboxSpec;
use crate::bundle::{Role, Spec};
use crate::config::ConfigFiles;
use crate::events::{Event, Events};
use crate::id::Id;
use crate::log::one_line;
use crate::machine::MachineError;
use crate::share::Mount;

/// How long a shim with nothing to do waits for containerd to end it, once that has said that it is done.
const FORGOTTEN: Duration = Duration::from_secs(5);
/// Between two attempts to follow the guest's events.
const HEAR_AGAIN: Duration = Duration::from_secs(5);

/// What a pod is known by and made with.
#[derive(Debug)]
pub struct Settings {
    /// containerd's namespace.
    pub namespace: Id,
    /// The id of the pod's sandbox, or of its only container.
    pub id: Id,
    /// Where pods have their directories.
    pub root: PathBuf,
    /// Where the configuration is. It is read when the pod is made.
    pub config: ConfigFiles,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    settings: Arc<Settings>,
    events: Events,
    /// Held while the machine comes or goes.
    sandbox: tokio::sync::Mutex<Option<Arc<Sandbox>>>,
    containers: Mutex<HashMap<String, Entry>>,
    bare: bare::Bare,
    /// containerd was done with the pod while something of it was still on its way.
    dismissed: AtomicBool,
    /// Becomes true when the shim has nothing more to do.
    finished: watch::Sender<bool>,
}

/// A container's id is taken while it is being made.
#[derive(Clone, Debug)]
enum Entry {
    Making,
    Ready(Arc<Container>),
}

impl Pod {
    /// A pod that nothing was made for yet.
    pub fn new(settings: Settings, events: Events) -> Pod {
        Pod {
            settings: Arc::new(settings),
            events,
            sandbox: tokio::sync::Mutex::new(None),
            containers: Mutex::default(),
            bare: bare::Bare::default(),
            dismissed: AtomicBool::new(false),
            finished: watch::Sender::new(false),
        }
    }

    /// Makes a container; the pod's first one brings the machine.
    ///
    /// # Errors
    /// When it can't be made; nothing of it is left then.
    pub async fn create(self: &Arc<Self>, new: NewContainer) -> Result<u32, PodError> {
        let id: Id = new.id.parse().map_err(|error| PodError::Invalid(format!("id: {error}")))?;
        let spec = Spec::read(&new.bundle)?;
        let role = spec.role()?;
        let claim = Claim::new(self, &new.id)?;
        let first = role != Role::Member(self.settings.id.clone());
        let sandbox = if first {
            if id != self.settings.id {
                return Err(PodError::Invalid(format!("{id} does not belong to pod {}", self.settings.id)));
            }
            self.bring_up(spec::sandbox(&spec)?, new.rootfs.clone()).await?
        } else {
            self.sandbox().await?
        };
        let made = match role {
            Role::Sandbox => Ok(Container::pause(new, sandbox.clone())),
            Role::Alone | Role::Member(_) => Container::create(new, id, spec, !first, sandbox.clone()).await,
        };
        let container = match made {
            Ok(container) => Arc::new(container),
            Err(error) => {
                if first {
                    self.tear_down().await;
                }
                return Err(error);
            }
        };
        let pid = sandbox.machine().pid();
        self.events.emit(Event::Create {
            container: container.id().to_owned(),
            bundle: container.bundle().to_owned(),
            stdio: container.init().stdio.clone(),
            pid,
        });
        self.follow(&container, container.init().clone());
        claim.keep(container);
        Ok(pid)
    }

    /// Starts a container's own process, or with `exec` one that was added.
    ///
    /// # Errors
    /// When it was started before, or can't be.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let pid = container.sandbox().machine().pid();
        let held = process.starting().await;
        if process.status() != Status::Created {
            return Err(PodError::State(format!("{id} {exec}: was started already")));
        }
        if let Err(error) = container.start(&process).await {
            if !exec.is_empty() {
                // Its waiters have nothing to wait for. A container's own process ends with the container.
                process.abandon();
            }
            return Err(error);
        }
        if !process.started(&held) {
            // Whoever had it made has lost patience in the meantime, and nobody knows it any more.
            container.discard_exec(exec).await;
            return Err(PodError::NotFound(format!("{id} {exec}: was deleted while it was started")));
        }
        let (container_id, exec_id) = (id.to_owned(), exec.to_owned());
        self.events.emit(if exec.is_empty() {
            Event::Start { container: container_id, pid }
        } else {
            Event::ExecStarted { container: container_id, exec: exec_id, pid }
        });
        drop(held);
        if !exec.is_empty() {
            self.follow(&container, process);
        }
        Ok(pid)
    }

    /// Adds a process to a container, to be started later.
    ///
    /// # Errors
    /// When the id is taken, or the container is none that runs anything.
    pub fn exec(&self, id: &str, exec: container::NewExec) -> Result<(), PodError> {
        let container = self.container(id)?;
        let name = exec.id.clone();
        container.add_exec(exec)?;
        self.events.emit(Event::ExecAdded { container: id.to_owned(), exec: name });
        Ok(())
    }

    /// Forgets a process that has ended, and with a container's own one the container. With the pod's first container
    /// the machine goes.
    ///
    /// # Errors
    /// While it runs.
    pub async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit), PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let pid = container.sandbox().machine().pid();
        if exec.is_empty() {
            // A start that is under way comes first, and whoever else deletes it.
            let _held = process.starting().await;
            self.container(id)?;
            if process.status() == Status::Running {
                return Err(PodError::State(format!("{id}: is running")));
            }
            // Nobody is told of an end without a beginning.
            process.abandon();
            container.remove().await?;
            let exit = process.exit().unwrap_or_else(Exit::killed);
            self.lock().remove(id);
            self.deleted(&process, pid, exit);
            if id == self.settings.id.as_str() {
                self.tear_down().await;
            }
            self.leave_if_dismissed();
            return Ok((pid, exit));
        }
        if process.status() == Status::Running {
            return Err(PodError::State(format!("{id} {exec}: is running")));
        }
        container.remove_exec(exec).await;
        Ok((pid, process.exit().unwrap_or_else(Exit::killed)))
    }

    fn deleted(&self, process: &Process, pid: u32, exit: Exit) {
        self.events.emit(Event::Delete {
            container: process.container.clone(),
            exec: process.exec.clone(),
            pid,
            status: exit.code,
            at: exit.at,
        });
    }

    /// Signals a process, or all of a container's.
    ///
    /// # Errors
    /// When it has ended, and the agent's own.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), PodError> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let finished = || PodError::NotFound(format!("{id} {exec}: process already finished"));
        match process.status() {
            Status::Stopped(_) => return Err(finished()),
            Status::Created if !exec.is_empty() => {
                return Err(PodError::State(format!("{id} {exec}: process not created")));
            }
            Status::Created | Status::Running => {}
        }
        match container.signal(exec, signal, all).await {
            // That was the end of it, too.
            Err(PodError::Machine(MachineError::Gone { .. })) => Err(finished()),
            result => result,
        }
    }

    /// Stops a container's processes from running, or lets them go on.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn set_paused(&self, id: &str, paused: bool) -> Result<(), PodError> {
        self.container(id)?.set_paused(paused).await?;
        let container = id.to_owned();
        self.events.emit(if paused { Event::Paused { container } } else { Event::Resumed { container } });
        Ok(())
    }

    /// A container.
    ///
    /// # Errors
    /// When there is none, or it is still being made.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        match self.lock().get(id) {
            Some(Entry::Ready(container)) => Ok(container.clone()),
            _ => Err(PodError::NotFound(format!("container {id}"))),
        }
    }

    /// The id of the pod's sandbox, or of its only container.
    pub fn id(&self) -> &str {
        self.settings.id.as_str()
    }

    /// What all of the pod costs the host.
    ///
    /// # Errors
    /// When there is none, or its control group can't be read.
    pub async fn sandbox_stats(&self) -> Result<v1::StatsResponse, PodError> {
        self.sandbox().await?.stats()
    }

    /// containerd is done with a container. With nothing left, the shim's work is done, too.
    pub async fn shutdown(&self, now: bool) {
        if !now && (self.bare.is_asked_for() || !self.lock().is_empty()) {
            self.dismissed.store(true, Ordering::Relaxed);
            return;
        }
        self.tear_down().await;
        self.finished.send_replace(true);
    }

    /// A containerd that was killed and came back may have said that it is done before what it had asked for earlier
    /// was: nobody would end the shim then. One that is still there says it again, and sooner than this.
    fn leave_if_dismissed(self: &Arc<Self>) {
        if self.dismissed.load(Ordering::Relaxed) {
            let pod = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(FORGOTTEN).await;
                pod.shutdown(false).await;
            });
        }
    }

    /// Returns once the shim has nothing more to do.
    pub async fn finished(&self) {
        // The sender is `self`'s.
        let _ = self.finished.subscribe().wait_for(|finished| *finished).await;
    }

    async fn sandbox(&self) -> Result<Arc<Sandbox>, PodError> {
        let sandbox = self.sandbox.lock().await.clone();
        sandbox.ok_or_else(|| PodError::State(format!("pod {} is not up", self.settings.id)))
    }

    async fn bring_up(
        self: &Arc<Self>,
        wanted: SandboxSpec,
        rootfs: Vec<Mount>,
    ) -> Result<Arc<Sandbox>, PodError> {
        let mut place = self.sandbox.lock().await;
        if place.is_some() {
            return Err(PodError::Exists(format!("pod {}", self.settings.id)));
        }
        let sandbox = Arc::new(Sandbox::create(&self.settings, wanted, rootfs).await?);
        self.report_memory_shortage(&sandbox);
        *place = Some(sandbox.clone());
        Ok(sandbox)
    }

    async fn tear_down(&self) {
        let mut place = self.sandbox.lock().await;
        if let Some(sandbox) = place.take()
            && let Err(error) = sandbox.destroy().await
        {
            tracing::error!(error = one_line(&error), "something of the pod is left");
        }
    }

    /// Has containerd told of containers that run out of memory, for as long as the machine lives.
    fn report_memory_shortage(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let (pod, sandbox) = (Arc::downgrade(self), sandbox.clone());
        tokio::spawn(async move {
            let mut next = 0;
            loop {
                let Err(status) = hear_of_shortages(&pod, &sandbox, &mut next).await else { return };
                if timeout(HEAR_AGAIN, sandbox.machine().ended()).await.is_ok() {
                    return;
                }
                tracing::warn!(error = ?status.message(), "the guest's events broke off");
            }
        });
    }

    /// The guest's word is good for its own containers: containerd looks the id up among all of the node's.
    fn is_short_of_memory(&self, container: &str) {
        if let Ok(container) = self.container(container)
            && !container.is_pause()
            && container.may_tell_of_shortage()
        {
            self.events.emit(Event::OutOfMemory { container: container.id().to_owned() });
        }
    }

    /// Waits for the end of a process in a task of its own.
    fn follow(self: &Arc<Self>, container: &Arc<Container>, process: Arc<Process>) {
        let (pod, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            let exit = container.outcome(&process).await;
            if container.is_pause() {
                // The sandbox is seen to end after what was in it.
                for other in pod.followed_in_guest() {
                    other.wait().await;
                }
            }
            process.end(exit, container.sandbox().machine().pid(), &pod.events).await;
        });
    }

    /// The processes whose ends are waited for, but the sandbox's own.
    fn followed_in_guest(&self) -> Vec<Arc<Process>> {
        let containers: Vec<_> = self
            .lock()
            .values()
            .filter_map(|entry| match entry {
                Entry::Ready(container) if !container.is_pause() => Some(container.clone()),
                _ => None,
            })
            .collect();
        containers.iter().flat_map(|container| container.followed()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows the guest's events, from `next` on, which is kept up to date. Returns once the pod is gone, and with an error
/// when they break off.
async fn hear_of_shortages(pod: &Weak<Pod>, sandbox: &Sandbox, next: &mut u64) -> Result<(), tonic::Status> {
    let mut agent = sandbox.machine().agent().agent();
    // If those are gone, it is to be the ones from then on.
    let from_sequence = std::mem::take(next);
    let request = v1::EventsRequest { from_sequence, ..v1::EventsRequest::default() };
    let mut stream = agent.events(request).await?.into_inner();
    *next = from_sequence;
    while let Some(event) = stream.message().await? {
        *next = event.sequence.saturating_add(1);
        let Some(pod) = pod.upgrade() else { return Ok(()) };
        if let Some(v1::event::Kind::Oom(oom)) = event.kind {
            pod.is_short_of_memory(&oom.container_id);
        }
    }
    Err(tonic::Status::unavailable("they came to an end"))
}

/// An id that is taken for a container in the making, and free again if nothing comes of it.
struct Claim {
    pod: Arc<Pod>,
    id: Option<String>,
}

impl Claim {
    fn new(pod: &Arc<Pod>, id: &str) -> Result<Claim, PodError> {
        let mut containers = pod.lock();
        if containers.contains_key(id) {
            return Err(PodError::Exists(format!("container {id}")));
        }
        containers.insert(id.to_owned(), Entry::Making);
        Ok(Claim { pod: pod.clone(), id: Some(id.to_owned()) })
    }

    fn keep(mut self, container: Arc<Container>) {
        if let Some(id) = self.id.take() {
            self.pod.lock().insert(id, Entry::Ready(container));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.pod.lock().remove(&id);
            self.pod.leave_if_dismissed();
        }
    }
}
