//! A container of a pod, and what containerd can ask of it.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use caisson_protocol::client::{call, with_deadline};
use caisson_protocol::v1;
use serde_json::Value;
use tonic::Code;

use super::disks::{self, Wanted};
use super::error::PodError;
use super::process::{Exit, Process, Status};
use super::sandbox::Sandbox;
use super::spec::{self, Bind, GuestSpec, Place};
use super::volumes::StandIn;
use crate::bundle::Spec;
use crate::id::Id;
use crate::journal::Journal;
use crate::log::one_line;
use crate::machine::AGENT_GONE;
use crate::phases::Phases;
use crate::share::{Disk, Mount, Share};
use crate::sizing::{Change, Demand, Limits};
use crate::streams::{Stdio, Streams};

/// How long the agent may take to make or remove a container.
const LONG: Duration = Duration::from_secs(120);
/// How long it may take to send a signal.
const SIGNAL: Duration = Duration::from_secs(10);
/// How long a container may take to end, with its output, once it was killed. CRI clients wait for two minutes.
const KILLED: Duration = Duration::from_secs(60);
/// The signal that nobody can refuse.
const SIGKILL: u32 = 9;

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
}

/// The disks that are plugged for it.
#[derive(Debug, Default)]
struct Disks {
    /// The slot of its root file system's.
    root: Option<u8>,
    /// Those that it has raw.
    raw: Vec<Wanted>,
}

/// Where the mounts of a container come from that are not new ones.
#[derive(Debug, Default)]
struct StandIns {
    /// From the host.
    shared: Vec<Bind>,
    /// From parts of what the guest has.
    parts: Vec<v1::Storage>,
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
        }
    }

    /// Shares its files, makes it in the guest up to the point where its process waits to be started, and connects its
    /// streams.
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
        };
        let made = container.make(new, id, spec, member).await;
        if made.is_err()
            && let Err(error) = container.remove().await
        {
            tracing::error!(container = container.id, error = one_line(&error), "undo a container's making");
        }
        made.map(|()| container)
    }

    async fn make(&self, new: NewContainer, id: Id, spec: Spec, member: bool) -> Result<(), PodError> {
        let mut phases = Phases::begin();
        let limits = spec::limits(&spec.config).apply(Limits::default());
        let oom_score = spec.config.pointer("/process/oomScoreAdj").and_then(Value::as_i64);
        let name = spec.name().unwrap_or(&new.id);
        let add = |demand: &mut Demand| demand.add(name, &new.id, limits);
        self.sandbox.size().await.grow(self.sandbox.machine(), add).await?;
        phases.done("size");
        let (root, shm) = (self.sandbox.guest_path(&format!("{id}/rootfs")), self.sandbox.guest_shm());
        let (names, files) = (self.sandbox.names(), self.sandbox.files());
        let place = Place { member, root: &root, shm: &shm, files, names };
        let rootfs =
            if new.rootfs.is_empty() { vec![bundled_root(&new.bundle, &spec.config)] } else { new.rootfs };
        let mut guest = spec::container(spec.config, &place)?;
        let root_disk = self.plug_root(&rootfs).await?;
        self.plug_devices(&mut guest).await?;
        let StandIns { shared: binds, mut parts } = self.stand_ins(&id, &mut guest).await?;
        let shared_root = root_disk.is_none().then_some(rootfs);
        let share_id = id.clone();
        let add = move |share: &Share, journal: &mut Journal| {
            if let Some(rootfs) = shared_root {
                share.add_rootfs(journal, &share_id, &rootfs)?;
            }
            let mut placed = Vec::new();
            for bind in &binds {
                placed.push((bind.index, share.add_volume(journal, &share_id, &bind.volume)?));
            }
            Ok(placed)
        };
        for (index, placed) in self.sandbox.with_share(add).await? {
            let path = placed.path.to_string_lossy();
            match placed.part {
                None => guest.set_source(index, &self.sandbox.guest_path(&path)),
                Some(part) => {
                    let part = self.sandbox.shared_part(&path, part);
                    parts.push(self.part_storage(&id, &mut guest, index, part));
                }
            }
        }
        phases.done("share");
        let request = v1::CreateContainerRequest {
            id: new.id,
            spec: serde_json::to_vec(&guest.spec).map_err(spec::SpecError::from)?,
            rootfs_storage: root_disk.as_ref().map(|storage| storage.id.clone()).unwrap_or_default(),
            storages: root_disk.into_iter().chain(parts).collect(),
            streams: Some(new.stdio.selection()),
        };
        let mut containers = self.sandbox.containers();
        let made = self.answer(containers.create_container(with_deadline(request, LONG))).await?;
        phases.done("guest");
        self.attach(&self.init, made.streams).await?;
        phases.done("streams");
        if let Some(oom_score) = oom_score.and_then(|value| i32::try_from(value).ok()) {
            self.sandbox.spare_as_much_as(oom_score);
        }
        tracing::info!(container = self.id, %phases, "created");
        Ok(())
    }

    /// Gives the machine the disk that its root file system is on, if that is so; the guest then mounts it.
    async fn plug_root(&self, rootfs: &[Mount]) -> Result<Option<v1::Storage>, PodError> {
        let mounts = rootfs.to_owned();
        let Some(disk) = tokio::task::spawn_blocking(move || Disk::of(&mounts)).await?? else {
            return Ok(None);
        };
        let slot = disks::plug(self.sandbox.machine(), &disk.file, disk.device()).await?;
        self.disks().root = Some(slot);
        Ok(Some(disk.storage(&format!("root-{slot}"), slot.into())))
    }

    /// Gives the machine the block devices that it has raw.
    async fn plug_devices(&self, guest: &mut GuestSpec) -> Result<(), PodError> {
        let mut devices = Vec::new();
        for (index, wanted) in guest.block_devices() {
            let number = self.sandbox.raw_disks().take(self.sandbox.machine(), wanted).await?;
            self.disks().raw.push(wanted);
            devices.push((index, wanted, number));
        }
        guest.renumber(&devices);
        Ok(())
    }

    /// Has the guest's own volumes take the place of the host's where that is better.
    async fn stand_ins(&self, id: &Id, guest: &mut GuestSpec) -> Result<StandIns, PodError> {
        let mut found = StandIns::default();
        let (machine, volumes) = (self.sandbox.machine(), self.sandbox.volumes());
        for bind in std::mem::take(&mut guest.binds) {
            if let Some(files) = self.sandbox.files()
                && let Ok(name) = bind.volume.source.strip_prefix(files)
            {
                let copies = volumes.files(machine, files).await?;
                guest.set_source(bind.index, &format!("{copies}/{}", name.display()));
                continue;
            }
            match volumes.stand_in(machine, &bind.volume).await? {
                Some(StandIn::Directory(path)) => guest.set_source(bind.index, &path),
                Some(StandIn::HugePages(size)) => guest.set_huge_pages(bind.index, size),
                Some(StandIn::Part(part)) => {
                    found.parts.push(self.part_storage(id, guest, bind.index, part));
                }
                None => found.shared.push(bind),
            }
        }
        Ok(found)
    }

    /// A storage of a part of what the guest has, from which a mount comes.
    fn part_storage(&self, id: &Id, guest: &mut GuestSpec, index: usize, part: v1::Part) -> v1::Storage {
        let storage = v1::Storage {
            id: format!("part-{index}-{id}"),
            source: Some(v1::storage::Source::Part(part)),
            ..v1::Storage::default()
        };
        guest.set_source(index, &self.sandbox.guest_storage(&storage.id));
        storage
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
    /// When the id is taken, or this is a container that never runs.
    pub fn add_exec(&self, new: NewExec) -> Result<(), PodError> {
        self.runs_something()?;
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
        let made = self.answer(self.sandbox.containers().exec(with_deadline(request, LONG))).await?;
        let attached = self.attach(process, made.streams).await;
        if attached.is_err() {
            self.kill_exec(&process.exec).await;
        }
        attached
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
            // There is no process to choose its answer: whatever ends others ends the pod.
            let sandbox = self.sandbox.clone();
            tokio::spawn(async move { sandbox.machine().stop().await });
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
            self.answer(self.sandbox.containers().update_container(call(request))).await?;
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
        self.sandbox.size().await.release(&self.id);
        if !self.sandbox.machine().has_ended() {
            let request = v1::RemoveContainerRequest { container_id: self.id.clone(), force: true };
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
        self.unplug_all().await?;
        self.sandbox.with_share(move |share, journal| Ok(share.remove(journal, &id)?)).await
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
        let request = v1::DeleteExecRequest { container_id: self.id.clone(), exec_id: exec.to_owned() };
        // The container may be gone by now, or the machine.
        let _ = self.answer(self.sandbox.containers().delete_exec(call(request))).await;
    }

    async fn kill_exec(&self, exec: &str) {
        let container_id = self.id.clone();
        let request =
            v1::SignalRequest { container_id, exec_id: exec.to_owned(), signal: SIGKILL, all: false };
        // It may have ended by itself.
        let _ = self.answer(self.sandbox.containers().signal(call(request))).await;
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

/// The root file system of a bundle that was not given mounts: the directory that `root.path` names, absolute or in
/// the bundle.
fn bundled_root(bundle: &Path, config: &Value) -> Mount {
    let path = config.pointer("/root/path").and_then(Value::as_str).unwrap_or("rootfs");
    Mount {
        kind: "bind".into(),
        source: bundle.join(path).to_string_lossy().into_owned(),
        target: String::new(),
        options: vec!["rbind".into(), "rw".into()],
    }
}
