//! A container of a pod, and what containerd can ask of it.

mod make;

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use caisson_protocol::client::{call, with_deadline};
use caisson_protocol::v1;
use serde_json::Value;
use tonic::Code;

use super::disks::{self, Wanted};
use super::error::PodError;
use super::process::{Exit, Process, Status};
use super::sandbox::Sandbox;
use super::spec;
use crate::bundle::Spec;
use crate::id::Id;
use crate::log::one_line;
use crate::machine::AGENT_GONE;
use crate::phases::Phases;
use crate::share::Mount;
use crate::sizing::{Change, Demand};
use crate::streams::{Stdio, Streams};

/// How long the agent may take to make or remove a container.
const LONG: Duration = Duration::from_secs(120);
/// How long it may take to send a signal.
const SIGNAL: Duration = Duration::from_secs(10);
/// How long a container may take to end, with its output, once it was killed. CRI clients wait for two minutes.
const KILLED: Duration = Duration::from_secs(60);
/// The least time between two words of a container's shortage of memory.
const SHORTAGES: Duration = Duration::from_secs(1);
/// The signal that nobody can refuse.
const SIGKILL: u32 = 9;
/// What ends a pause container elsewhere: the first process of a namespace takes no others than it asks for
/// (pid_namespaces(7)), which are SIGINT and SIGTERM.
const ENDS_PAUSE: [u32; 3] = [2, SIGKILL, 15];

/// What a container is made from.
#[derive(Clone, Debug, Default)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// The directory with its `config.json`.
    pub bundle: PathBuf,
    /// What its root file system is mounted from; none when the bundle has it.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub stdio: Stdio,
}

/// What a process that is added to a container is made from.
#[derive(Clone, Debug, Default)]
pub struct NewExec {
    /// Its id among the container's.
    pub id: String,
    /// The OCI specification's `process`, in JSON.
    pub process: Vec<u8>,
    /// Its streams.
    pub stdio: Stdio,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: String,
    sandbox: Arc<Sandbox>,
    /// The one of its share; the pause container has none.
    share: Option<Id>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Exec>>,
    disks: Mutex<Disks>,
    paused: AtomicBool,
    /// When containerd was last told that it is short of memory.
    shortage: Mutex<Option<Instant>>,
}

/// The disks that are plugged for it.
#[derive(Debug, Default)]
struct Disks {
    /// The slot of its root file system's.
    root: Option<u8>,
    /// Those that it has raw.
    raw: Vec<Wanted>,
}

#[derive(Clone, Debug)]
struct Exec {
    process: Arc<Process>,
    spec: Arc<[u8]>,
}

impl Container {
    /// The pause container of a sandbox, which needs nothing made.
    pub fn pause(new: NewContainer, sandbox: Arc<Sandbox>) -> Container {
        Container {
            init: Arc::new(Process::new(&new.id, "", new.stdio)),
            bundle: new.bundle.to_string_lossy().into_owned(),
            id: new.id,
            sandbox,
            share: None,
            execs: Mutex::default(),
            disks: Mutex::default(),
            paused: AtomicBool::new(false),
            shortage: Mutex::default(),
        }
    }

    /// Makes it, up to the point where its process waits to be started.
    ///
    /// # Errors
    /// When any of it fails; nothing of it is left then.
    pub async fn create(
        new: NewContainer,
        id: Id,
        spec: Spec,
        member: bool,
        sandbox: Arc<Sandbox>,
    ) -> Result<Container, PodError> {
        let init = Arc::new(Process::new(&new.id, "", new.stdio.clone()));
        let container = Container {
            init,
            bundle: new.bundle.to_string_lossy().into_owned(),
            id: new.id.clone(),
            sandbox,
            share: Some(id.clone()),
            execs: Mutex::default(),
            disks: Mutex::default(),
            paused: AtomicBool::new(false),
            shortage: Mutex::default(),
        };
        let made = container.make(new, id, spec, member).await;
        if made.is_err()
            && let Err(error) = container.remove().await
        {
            tracing::error!(container = container.id, error = one_line(&error), "undo a container's making");
        }
        made.map(|()| container)
    }

    async fn attach(&self, process: &Process, ids: Option<v1::StreamIds>) -> Result<(), PodError> {
        let ids = ids.unwrap_or_default();
        let streams = Streams::connect(self.sandbox.machine().agent(), &ids, &process.stdio).await?;
        process.attach(streams).await;
        Ok(())
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory of its bundle.
    pub fn bundle(&self) -> &str {
        &self.bundle
    }

    /// What it shares with the pod's others.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Its own process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Whether it is the sandbox's, which never runs.
    pub fn is_pause(&self) -> bool {
        self.share.is_none()
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Whether containerd is to be told, once more, that it is short of memory: a guest can say so as often as it likes,
    /// and containerd writes down each time that it hears of it.
    pub fn may_tell_of_shortage(&self) -> bool {
        let mut told = self.shortage.lock().unwrap_or_else(PoisonError::into_inner);
        let may = told.is_none_or(|told| told.elapsed() >= SHORTAGES);
        if may {
            *told = Some(Instant::now());
        }
        may
    }

    /// One of its processes; its own with an empty `exec`.
    ///
    /// # Errors
    /// When there is none.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, PodError> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        let found = self.execs().get(exec).map(|exec| exec.process.clone());
        found.ok_or_else(|| PodError::NotFound(format!("process {exec} of container {}", self.id)))
    }

    /// Its processes whose ends are waited for.
    pub fn followed(&self) -> Vec<Arc<Process>> {
        let running = |exec: &Exec| exec.process.status() != Status::Created;
        let execs = self.execs();
        let execs = execs.values().filter(|exec| running(exec)).map(|exec| exec.process.clone());
        std::iter::once(self.init.clone()).chain(execs).collect()
    }

    /// Adds a process, to be started later.
    ///
    /// # Errors
    /// When the id is taken, or this is a container that never runs, or does not now.
    pub fn add_exec(&self, new: NewExec) -> Result<(), PodError> {
        self.runs_something()?;
        if self.is_paused() || self.init.exit().is_some() {
            let state = if self.is_paused() { "paused" } else { "stopped" };
            return Err(PodError::State(format!("{}: cannot exec in a {state} state", self.id)));
        }
        let mut process: Value = serde_json::from_slice(&new.process)
            .map_err(|error| PodError::Invalid(format!("the process: {error}")))?;
        if let Some(process) = process.as_object_mut() {
            spec::process(process);
        }
        let spec = process.to_string().into_bytes().into();
        let process = Arc::new(Process::new(&self.id, &new.id, new.stdio));
        let mut execs = self.execs();
        if execs.contains_key(&new.id) {
            return Err(PodError::Exists(format!("process {} of container {}", new.id, self.id)));
        }
        execs.insert(new.id, Exec { process, spec });
        Ok(())
    }

    /// Lets its own process run, or makes one that was added.
    ///
    /// # Errors
    /// The agent's own, or when the streams can't be connected.
    pub async fn start(&self, process: &Process) -> Result<(), PodError> {
        if self.is_pause() {
            return Ok(());
        }
        if process.exec.is_empty() {
            let mut phases = Phases::begin();
            let request = v1::StartContainerRequest { container_id: self.id.clone() };
            self.answer(self.sandbox.containers().start_container(with_deadline(request, LONG))).await?;
            phases.done("guest");
            tracing::info!(container = self.id, %phases, "started");
            return Ok(());
        }
        let spec = self.execs().get(&process.exec).map(|exec| exec.spec.clone());
        let request = v1::ExecRequest {
            container_id: self.id.clone(),
            exec_id: process.exec.clone(),
            process: spec.map(|spec| spec.to_vec()).unwrap_or_default(),
            streams: Some(process.stdio.selection()),
        };
        let made = match self.answer(self.sandbox.containers().exec(with_deadline(request, LONG))).await {
            Ok(made) => self.attach(process, made.streams).await,
            // It may still be made.
            Err(error) if error.code() == Code::DeadlineExceeded => Err(error),
            Err(error) => return Err(error),
        };
        if made.is_err() {
            self.discard_exec(&process.exec).await;
        }
        made
    }

    /// How a process ends: waits until it has.
    pub async fn outcome(&self, process: &Process) -> Exit {
        let machine = self.sandbox.machine();
        if self.is_pause() {
            machine.ended().await;
            return Exit::killed();
        }
        let request = v1::WaitRequest { container_id: self.id.clone(), exec_id: process.exec.clone() };
        let mut containers = self.sandbox.containers();
        let waited = tokio::select! {
            waited = containers.wait(request) => waited,
            () = machine.ended() => return Exit::killed(),
        };
        let error = match waited {
            Ok(reply) => {
                let status = reply.into_inner().status.unwrap_or_default();
                if !status.output_complete {
                    tracing::warn!(container = self.id, exec = process.exec, "output was not taken in time");
                }
                return Exit { code: status.code, at: SystemTime::now() };
            }
            Err(error) => error,
        };
        if error.code() != Code::NotFound {
            // A guest whose agent is gone can't be talked to any more: it is about to end, or is made to.
            if tokio::time::timeout(AGENT_GONE, machine.ended()).await.is_err() {
                tracing::error!(
                    error = error.message(),
                    "the agent does not answer any more: ending the machine"
                );
                machine.kill();
            }
        }
        Exit::killed()
    }

    /// Signals a process, or all. A guest that does not end a container which is killed is ended itself.
    ///
    /// # Errors
    /// When it has ended, and the agent's own.
    pub async fn signal(&self, exec: &str, signal: u32, all: bool) -> Result<(), PodError> {
        if self.is_pause() {
            if ENDS_PAUSE.contains(&signal) {
                let sandbox = self.sandbox.clone();
                tokio::spawn(async move { sandbox.machine().stop().await });
            }
            return Ok(());
        }
        let own = exec.is_empty();
        // containerd's clients ask for all with every kill, one of an added process included, which stands for itself.
        let all = all && own;
        let request =
            v1::SignalRequest { container_id: self.id.clone(), exec_id: exec.to_owned(), signal, all };
        let kills = own && signal == SIGKILL;
        if kills {
            self.see_to_the_end();
        }
        match self.answer(self.sandbox.containers().signal(with_deadline(request, SIGNAL))).await {
            Err(error) if kills && error.code() == Code::DeadlineExceeded => {
                tracing::error!(
                    container = self.id,
                    "the guest does not kill its container: ending the machine"
                );
                self.sandbox.machine().kill();
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Ends the machine if the container, which is being killed, does not end.
    fn see_to_the_end(&self) {
        let (init, sandbox) = (self.init.clone(), self.sandbox.clone());
        tokio::spawn(async move {
            if tokio::time::timeout(KILLED, init.wait()).await.is_err() {
                tracing::error!(
                    container = init.container,
                    "was killed and has not ended: ending the machine"
                );
                sandbox.machine().kill();
            }
        });
    }

    /// Stops its processes from running, or lets them go on.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn set_paused(&self, paused: bool) -> Result<(), PodError> {
        self.runs_something()?;
        let container_id = self.id.clone();
        let mut containers = self.sandbox.containers();
        if paused {
            self.answer(containers.pause_container(call(v1::PauseContainerRequest { container_id }))).await?;
        } else {
            self.answer(containers.resume_container(call(v1::ResumeContainerRequest { container_id })))
                .await?;
        }
        self.paused.store(paused, Ordering::Relaxed);
        Ok(())
    }

    /// Sets the size of a process's terminal, if it has one.
    ///
    /// # Errors
    /// When there is no such process, and the agent's own.
    pub async fn resize(&self, exec: &str, width: u32, height: u32) -> Result<(), PodError> {
        if !self.process(exec)?.stdio.terminal {
            // Clients tell the size of their own terminal, whatever the process has.
            return Ok(());
        }
        let request = v1::ResizeTerminalRequest {
            container_id: self.id.clone(),
            exec_id: exec.to_owned(),
            width,
            height,
        };
        self.runs_something()?;
        self.answer(self.sandbox.containers().resize_terminal(call(request))).await?;
        Ok(())
    }

    /// Sets its limits, as the OCI specification's `linux.resources` in JSON has them, and makes the machine as large
    /// as the pod's limits then are. Those of the sandbox may also come as its annotations.
    ///
    /// # Errors
    /// The agent's own, and when the machine can't be made of that size.
    pub async fn update(
        &self,
        resources: &[u8],
        annotations: &HashMap<String, String>,
    ) -> Result<(), PodError> {
        let mut resources: Value = match resources {
            [] => Value::Null,
            text => serde_json::from_slice(text)
                .map_err(|error| PodError::Invalid(format!("resources: {error}")))?,
        };
        let change = Change::of_resources(Some(&resources));
        let machine = self.sandbox.machine();
        let mut size = self.sandbox.size().await;
        if self.is_pause() {
            let told = Change::of_annotations(annotations)?;
            let change = |demand: &mut Demand| {
                demand.change_sandbox(change);
                demand.change_sandbox(told);
            };
            return size.change(machine, change, async { Ok(()) }).await;
        }
        spec::resources(Some(&mut resources));
        if let Some(resources) = resources.as_object_mut() {
            // containerd repeats all of the container's resources. The rules for devices are among them, and never change.
            resources.remove("devices");
        }
        let request = v1::UpdateContainerRequest {
            container_id: self.id.clone(),
            resources: resources.to_string().into_bytes(),
        };
        let inside = async {
            // Without any, there is nothing to be changed inside.
            if !resources.is_null() {
                self.answer(self.sandbox.containers().update_container(call(request))).await?;
            }
            Ok(())
        };
        size.change(machine, |demand| demand.change(&self.id, change), inside).await
    }

    /// What it uses; for the pause container, what all of the pod costs the host.
    ///
    /// # Errors
    /// The agent's own.
    pub async fn stats(&self) -> Result<v1::StatsResponse, PodError> {
        if self.is_pause() {
            return self.sandbox.stats();
        }
        let request = v1::StatsRequest { container_id: self.id.clone() };
        self.answer(self.sandbox.containers().stats(call(request))).await
    }

    async fn answer<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, PodError> {
        Ok(self.sandbox.machine().answer(call).await?)
    }

    /// Takes it out of the guest, and its files out of the share. None of it need be there.
    ///
    /// # Errors
    /// When something remains.
    pub async fn remove(&self) -> Result<(), PodError> {
        let Some(id) = self.share.clone() else { return Ok(()) };
        if self.sandbox.is_destroyed() {
            // That took everything of its containers along.
            return Ok(());
        }
        let mut phases = Phases::begin();
        self.sandbox.size().await.release(&self.id);
        phases.done("size");
        if !self.sandbox.machine().has_ended() {
            let request = v1::RemoveContainerRequest {
                container_id: self.id.clone(),
                force: true,
                released: self.sandbox.only_of(&id),
            };
            let mut containers = self.sandbox.containers();
            match self.answer(containers.remove_container(with_deadline(request, LONG))).await {
                Err(error) if error.code() == Code::NotFound => {}
                // With the machine gone, so is the container.
                Err(_) if self.sandbox.machine().has_ended() => {}
                result => {
                    result?;
                }
            }
        }
        phases.done("guest");
        self.unplug_all().await?;
        phases.done("disks");
        let removed =
            match self.sandbox.with_share(move |share, journal| Ok(share.remove(journal, &id)?)).await {
                Err(_) if self.sandbox.is_destroyed() => Ok(()),
                result => result,
            };
        phases.done("share");
        tracing::info!(container = self.id, %phases, "removed");
        removed
    }

    /// Gives its disks back; what fails is tried again by the next call.
    async fn unplug_all(&self) -> Result<(), PodError> {
        let machine = self.sandbox.machine();
        let root = self.disks().root;
        if let Some(slot) = root {
            disks::unplug(machine, slot).await?;
            self.disks().root = None;
        }
        loop {
            let Some(wanted) = self.disks().raw.last().copied() else { return Ok(()) };
            self.sandbox.raw_disks().release(machine, wanted).await?;
            self.disks().raw.pop();
        }
    }

    fn disks(&self) -> MutexGuard<'_, Disks> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a process that has ended or was never started.
    pub async fn remove_exec(&self, exec: &str) {
        let Some(removed) = self.execs().remove(exec) else { return };
        if removed.process.abandon() {
            return;
        }
        self.forget_exec(exec).await;
    }

    async fn forget_exec(&self, exec: &str) {
        let request = v1::DeleteExecRequest { container_id: self.id.clone(), exec_id: exec.to_owned() };
        // The container may be gone by now, or the machine.
        let _ = self.answer(self.sandbox.containers().delete_exec(call(request))).await;
    }

    /// Rids the guest of an added process that nobody is to have, however far it has come there.
    pub async fn discard_exec(&self, exec: &str) {
        let mut containers = self.sandbox.containers();
        let (container_id, exec_id) = (self.id.clone(), exec.to_owned());
        let kill = v1::SignalRequest { container_id, exec_id, signal: SIGKILL, all: false };
        // Each may find that it is gone, with its container or the machine.
        let _ = self.answer(containers.signal(with_deadline(kill, SIGNAL))).await;
        let end = v1::WaitRequest { container_id: self.id.clone(), exec_id: exec.to_owned() };
        let _ = self.answer(containers.wait(with_deadline(end, KILLED))).await;
        self.forget_exec(exec).await;
    }

    fn runs_something(&self) -> Result<(), PodError> {
        if self.is_pause() {
            let why = format!("{}: the sandbox's container is answered for and runs no process", self.id);
            return Err(PodError::Unimplemented(why));
        }
        Ok(())
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
