//! The containers and what can be done with them.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::cgroup::{Cgroup, Stats};
use super::init::wire::{self, ContainerSetup, ExecSetup, Setup};
use super::process::{Launch, Process};
use super::seccomp::{self, Filter};
use super::{Config, CreateRequest, Created, Error, Event, ExecRequest, Exit, Info, ProcessInfo, State};
use super::{init, sys, validate};
use crate::oci::{self, NamespaceKind};
use crate::reaper::Reaper;
use crate::task;

/// How long processes may take to die of SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Processes of a container that are started at a time: a fraction of the agent's workers, so that one container does
/// not hold them all.
const TURNS: usize = 4;

/// The containers of this guest. Clones share them.
#[derive(Clone, Debug)]
pub struct Runtime {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    reaper: Reaper,
    /// The helper program on a read-only mount of its own: a container that opens a process's `/proc/<pid>/exe` can
    /// not write to what it finds there.
    helper: OwnedFd,
    events: mpsc::UnboundedSender<Event>,
    containers: Mutex<HashMap<String, Slot>>,
}

/// An id that is taken.
#[derive(Clone, Debug)]
enum Slot {
    /// Being made or removed.
    Busy,
    Ready(Arc<Container>),
}

/// A container.
#[derive(Debug)]
struct Container {
    id: String,
    spec: oci::Spec,
    cgroup: Arc<Cgroup>,
    filter: Option<Filter>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    paused: Mutex<bool>,
    kills: Mutex<u64>,
    /// Whether it was removed. Held while that is tried: whoever comes second must not touch a new container of the
    /// same id.
    removed: tokio::sync::Mutex<bool>,
    /// For starts of processes, each of which blocks a worker, for as long as a container likes that stops them.
    turns: Arc<Semaphore>,
}

/// Frees an id that is being worked on, unless it was put back.
struct Claim<'a> {
    runtime: &'a Inner,
    id: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut containers = lock(&self.runtime.containers);
        if matches!(containers.get(&self.id), Some(Slot::Busy)) {
            containers.remove(&self.id);
        }
    }
}

/// Frees an exec's id that is being worked on, unless there is a process.
struct ExecClaim<'a> {
    container: &'a Container,
    id: &'a str,
}

impl Drop for ExecClaim<'_> {
    fn drop(&mut self) {
        let mut execs = lock(&self.container.execs);
        if matches!(execs.get(self.id), Some(None)) {
            execs.remove(self.id);
        }
    }
}

impl Runtime {
    /// A runtime without containers. Makes its control group. [`Event`]s go to `events`; none is ever dropped.
    ///
    /// # Errors
    /// When the control group or the helper program is out of reach.
    pub fn new(
        config: Config,
        reaper: Reaper,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<Runtime, Error> {
        let path = CString::new(config.helper.as_os_str().as_bytes())
            .map_err(|_| Error::invalid("helper", "contains a null byte"))?;
        let helper = sys::open_tree(None, &path, sys::OPEN_TREE_CLONE)
            .and_then(|tree| {
                sys::mount_setattr(tree.as_fd(), false, &sys::MountAttr::set(libc::MOUNT_ATTR_RDONLY))?;
                Ok(tree)
            })
            .map_err(Error::system("make a read-only mount of the helper program"))?;
        Cgroup::prepare_parent(&config.cgroup)?;
        let inner = Inner { config, reaper, helper, events, containers: Mutex::default() };
        Ok(Runtime { inner: Arc::new(inner) })
    }

    /// Makes a container up to the point where its process waits to be started.
    ///
    /// # Errors
    /// [`Error::Exists`], or what is wrong with the specification; nothing is left behind.
    pub async fn create(&self, request: CreateRequest) -> Result<Created, Error> {
        self.blocking(move |inner| inner.create(request)).await
    }

    /// Lets a created container's process run.
    ///
    /// # Errors
    /// [`Error::State`] when it runs or has ended already, [`Error::Exec`] when its program can not be executed.
    pub async fn start(&self, id: &str) -> Result<(), Error> {
        let container = self.inner.container(id)?;
        let _turn = container.turn().await?;
        self.blocking(move |_| container.init.start(&container.id)).await
    }

    /// Starts a process in a running container.
    ///
    /// # Errors
    /// [`Error::State`] unless the container runs, [`Error::Exists`], or what is wrong with the process.
    pub async fn exec(&self, request: ExecRequest) -> Result<Created, Error> {
        let container = self.inner.container(&request.container)?;
        let _turn = container.turn().await?;
        self.blocking(move |inner| inner.exec(&container, request)).await
    }

    /// Sends a signal to the init process (`process` empty) or an exec, or to `all` processes of the container.
    ///
    /// # Errors
    /// [`Error::NoProcess`] when it, or for `all` the init process, has ended.
    pub async fn signal(&self, id: &str, process: &str, signal: i32, all: bool) -> Result<(), Error> {
        let container = self.inner.container(id)?;
        if !(1..=64).contains(&signal) {
            return Err(Error::invalid("signal", format!("{signal} is not between 1 and 64")));
        }
        if !all {
            return container.process(process)?.signal(id, signal);
        }
        // What outlived the init process is killed by whoever saw its end.
        if container.init.exit().is_some() {
            return Err(no_process(id, ""));
        }
        self.blocking(move |_| container.cgroup.signal_all(signal)).await
    }

    /// Returns when the process has ended, at once if it has.
    ///
    /// # Errors
    /// [`Error::NoContainer`] or [`Error::NoProcess`].
    pub async fn wait(&self, id: &str, process: &str) -> Result<Exit, Error> {
        let process = self.inner.container(id)?.process(process)?;
        process.wait().await
    }

    /// Forgets an ended exec.
    ///
    /// # Errors
    /// [`Error::State`] while it runs.
    pub fn delete_exec(&self, id: &str, exec: &str) -> Result<(), Error> {
        let container = self.inner.container(id)?;
        let mut execs = lock(&container.execs);
        let process = execs.get(exec).and_then(Option::as_ref).ok_or_else(|| no_process(id, exec))?;
        if process.exit().is_none() {
            return Err(Error::State { id: exec.to_owned(), actual: State::Running });
        }
        execs.remove(exec);
        Ok(())
    }

    /// Removes an ended container; with `force`, kills it first.
    ///
    /// # Errors
    /// [`Error::State`] unless it has ended or was never started, or `force` is set.
    pub async fn remove(&self, id: &str, force: bool) -> Result<(), Error> {
        let container = self.inner.container(id)?;
        let runtime = self.clone();
        // As one piece, even if this call is cancelled.
        let removed = task::detached(async move { runtime.remove_once(container, force).await }).await;
        removed.map_err(|panicked| Error::system("run a task")(panicked.into()))?
    }

    async fn remove_once(&self, container: Arc<Container>, force: bool) -> Result<(), Error> {
        let mut removed = container.removed.lock().await;
        if *removed {
            return Err(Error::NoContainer(container.id.clone()));
        }
        let state = container.state();
        if !force && matches!(state, State::Running | State::Paused) {
            return Err(Error::State { id: container.id.clone(), actual: state });
        }
        self.blocking({
            let container = container.clone();
            move |_| container.cgroup.kill()
        })
        .await?;
        let gone = async {
            container.init.wait().await?;
            container.cgroup.wait_empty().await
        };
        tokio::time::timeout(KILL_TIMEOUT, gone)
            .await
            .map_err(|_| Error::system("wait for killed processes")(io::ErrorKind::TimedOut.into()))??;
        self.blocking({
            let container = container.clone();
            move |inner| {
                container.cgroup.remove()?;
                lock(&inner.containers).remove(&container.id);
                Ok(())
            }
        })
        .await?;
        *removed = true;
        Ok(())
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// [`Error::NoTerminal`].
    pub fn resize(&self, id: &str, process: &str, width: u16, height: u16) -> Result<(), Error> {
        self.inner.container(id)?.process(process)?.resize(width, height)
    }

    /// Changes a container's limits; what is absent stays. Device rules can not be changed.
    ///
    /// # Errors
    /// The member at fault.
    pub async fn update(&self, id: &str, resources: oci::Resources) -> Result<(), Error> {
        let container = self.inner.container(id)?;
        self.blocking(move |_| {
            validate::resources(&resources)?;
            if !resources.devices.is_empty() {
                return Err(Error::unsupported("linux.resources.devices", "device rules do not change"));
            }
            container.cgroup.apply(&resources)
        })
        .await
    }

    /// Freezes all processes of a running container; returns when they are.
    ///
    /// # Errors
    /// [`Error::State`] unless it runs.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        self.freeze(id, true).await
    }

    /// Undoes [`Runtime::pause`].
    ///
    /// # Errors
    /// [`Error::State`] unless it is paused.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        self.freeze(id, false).await
    }

    async fn freeze(&self, id: &str, freeze: bool) -> Result<(), Error> {
        let container = self.inner.container(id)?;
        let state = container.state();
        let wanted = if freeze { State::Running } else { State::Paused };
        if state != wanted {
            return Err(Error::State { id: id.to_owned(), actual: state });
        }
        let done = container.cgroup.freeze(freeze).await;
        // A container that could not be frozen in time must not be left half frozen.
        if freeze && done.is_err() {
            let _ = container.cgroup.freeze(false).await;
        }
        done?;
        *lock(&container.paused) = freeze;
        Ok(())
    }

    /// A container's use of resources.
    ///
    /// # Errors
    /// [`Error::NoContainer`], or when the control group can not be read.
    pub fn stats(&self, id: &str) -> Result<Stats, Error> {
        self.inner.container(id)?.cgroup.stats()
    }

    /// A container's processes, by ascending pid.
    ///
    /// # Errors
    /// [`Error::NoContainer`], or when the control group can not be read.
    pub fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        let container = self.inner.container(id)?;
        let mut known = HashMap::from([(container.init.pid(), String::new())]);
        for (exec, process) in lock(&container.execs).iter() {
            if let Some(process) = process {
                known.insert(process.pid(), exec.clone());
            }
        }
        let mut pids = container.cgroup.processes()?;
        pids.sort_unstable();
        Ok(pids.into_iter().map(|pid| ProcessInfo { pid, exec: known.get(&pid).cloned() }).collect())
    }

    /// All containers, by id.
    pub fn list(&self) -> Vec<Info> {
        let containers: Vec<_> = lock(&self.inner.containers)
            .values()
            .filter_map(|slot| match slot {
                Slot::Ready(container) => Some(container.clone()),
                Slot::Busy => None,
            })
            .collect();
        let mut infos: Vec<_> = containers.iter().map(|container| container.info()).collect();
        infos.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        infos
    }

    /// The container's root directory as its init process sees it, for file transfers: paths are to be resolved
    /// beneath it with `openat2(2)`, RESOLVE_IN_ROOT and RESOLVE_NO_MAGICLINKS.
    ///
    /// # Errors
    /// [`Error::State`] when the container has ended.
    pub fn root(&self, id: &str) -> Result<OwnedFd, Error> {
        let container = self.inner.container(id)?;
        let stopped = || Error::State { id: id.to_owned(), actual: State::Stopped };
        // The agent's own procfs, and a process that can not have been reaped and replaced while it has no exit.
        let root = File::open(format!("/proc/{}/root", container.init.pid())).map_err(|_| stopped())?;
        if container.init.exit().is_some() {
            return Err(stopped());
        }
        Ok(root.into())
    }

    /// The helper program, to be executed by its descriptor: nobody who finds it can write to it.
    pub(crate) fn helper(&self) -> BorrowedFd<'_> {
        self.inner.helper.as_fd()
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Inner>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = self.inner.clone();
        let done = task::blocking(move || work(&inner)).await;
        done.map_err(|panicked| Error::system("run a task")(panicked.into()))?
    }
}

impl Inner {
    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.containers).get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            _ => Err(Error::NoContainer(id.to_owned())),
        }
    }

    fn create(&self, request: CreateRequest) -> Result<Created, Error> {
        let CreateRequest { id, spec, rootfs, stdio } = request;
        let (mut spec, text) = spec.into_parts();
        validate::id("id", &id)?;
        if let Some(path) = rootfs {
            spec.root.get_or_insert_default().path = path;
        }
        validate::spec(&spec)?;
        let filter = match &spec.linux().seccomp {
            Some(seccomp) => Some(seccomp::compile(seccomp)?),
            None => None,
        };
        let claim = {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&id) {
                return Err(Error::Exists(id));
            }
            containers.insert(id.clone(), Slot::Busy);
            Claim { runtime: self, id: id.clone() }
        };
        let cgroup = Arc::new(Cgroup::create(&self.config.cgroup.join(&id))?);
        let launched = self.launch_first(&spec, text, filter.clone(), stdio, &cgroup);
        let (init, created) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                cgroup.discard();
                return Err(error);
            }
        };
        let container = Arc::new(Container {
            id: id.clone(),
            spec,
            cgroup,
            filter,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: Mutex::new(false),
            kills: Mutex::new(0),
            removed: tokio::sync::Mutex::default(),
            turns: Arc::new(Semaphore::new(TURNS)),
        });
        lock(&self.containers).insert(id, Slot::Ready(container.clone()));
        drop(claim);
        task::spawn(report_exit(
            self.events.clone(),
            container.clone(),
            String::new(),
            container.init.clone(),
        ));
        task::spawn(report_oom(self.events.clone(), container));
        Ok(created)
    }

    fn exec(&self, container: &Arc<Container>, request: ExecRequest) -> Result<Created, Error> {
        let ExecRequest { container: _, id, process, stdio } = request;
        let (process, text) = process.into_parts();
        validate::id("exec_id", &id)?;
        validate::process(&process)?;
        let state = container.state();
        if state != State::Running {
            return Err(Error::State { id: container.id.clone(), actual: state });
        }
        {
            let mut execs = lock(&container.execs);
            if execs.contains_key(&id) {
                return Err(Error::Exists(id));
            }
            execs.insert(id.clone(), None);
        }
        let undo = ExecClaim { container, id: &id };
        let setup = ExecSetup {
            init: container.init.pid(),
            user_namespace: container.spec.linux().namespace(NamespaceKind::User).is_some(),
            time_namespace: container.spec.linux().namespace(NamespaceKind::Time).is_some(),
            personality: init::identity::personality(&container.spec.linux())?,
            process: text,
            filter: container.filter.clone(),
        };
        let setup = Setup { process: Some(wire::Process::Exec(setup)) };
        let launch = Launch { init: Some(container.init.pid()), ..self.launch(&container.cgroup, None) };
        let launched = launch.run(setup, &process, stdio).and_then(|(child, created)| {
            if let Err(error) = child.start(&id) {
                // It may be stopped, and would execute its program some day.
                let _ = child.signal(&container.id, libc::SIGKILL);
                return Err(error);
            }
            Ok((child, created))
        });
        let (child, created) = launched?;
        let child = Arc::new(child);
        lock(&container.execs).insert(id.clone(), Some(child.clone()));
        drop(undo);
        task::spawn(report_exit(self.events.clone(), container.clone(), id, child));
        Ok(created)
    }

    /// Makes a container's first process, and sets the container's limits.
    fn launch_first(
        &self,
        spec: &oci::Spec,
        text: Vec<u8>,
        filter: Option<Filter>,
        stdio: super::Stdio,
        cgroup: &Cgroup,
    ) -> Result<(Process, Created), Error> {
        // Both are names that this process was given as text.
        let name = |path: &Path| path.to_string_lossy().into_owned();
        let rootfs = spec.root.as_ref().map(|root| name(&root.path)).unwrap_or_default();
        let setup = ContainerSetup { cgroup: name(cgroup.path()), rootfs, spec: text, filter };
        let setup = Setup { process: Some(wire::Process::First(setup)) };
        let (process, linux) = (spec.process.clone().unwrap_or_default(), spec.linux());
        let launched = self.launch(cgroup, Some(&linux)).run(setup, &process, stdio)?;
        let resources = linux.resources.clone().unwrap_or_default();
        cgroup.restrict_devices(&resources.devices)?;
        cgroup.apply(&resources)?;
        Ok(launched)
    }

    fn launch<'a>(&'a self, cgroup: &'a Cgroup, linux: Option<&'a oci::Linux>) -> Launch<'a> {
        Launch { helper: self.helper.as_fd(), reaper: &self.reaper, cgroup, init: None, linux }
    }
}

impl Container {
    async fn turn(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.turns.clone().acquire_owned().await.map_err(|_| Error::HelperGone)
    }

    fn process(&self, id: &str) -> Result<Arc<Process>, Error> {
        if id.is_empty() {
            return Ok(self.init.clone());
        }
        lock(&self.execs).get(id).cloned().flatten().ok_or_else(|| no_process(&self.id, id))
    }

    fn state(&self) -> State {
        if self.init.exit().is_some() {
            State::Stopped
        } else if *lock(&self.paused) {
            State::Paused
        } else if self.init.started() {
            State::Running
        } else {
            State::Created
        }
    }

    fn info(&self) -> Info {
        let mut execs: Vec<_> = lock(&self.execs).keys().cloned().collect();
        execs.sort_unstable();
        Info {
            id: self.id.clone(),
            state: self.state(),
            pid: self.init.pid(),
            execs,
            exit: self.init.exit(),
            annotations: self.spec.annotations.clone(),
        }
    }

    /// Reports out-of-memory kills that were not reported yet.
    fn report_kills(&self, events: &mpsc::UnboundedSender<Event>) {
        let mut reported = lock(&self.kills);
        let kills = self.cgroup.oom_kills();
        if kills > *reported {
            *reported = kills;
            let _ = events.send(Event::Oom { container: self.id.clone(), kills });
        }
    }
}

/// Waits for a process's end and reports it.
async fn report_exit(
    events: mpsc::UnboundedSender<Event>,
    container: Arc<Container>,
    id: String,
    process: Arc<Process>,
) {
    let Ok(exit) = process.wait().await else { return };
    if id.is_empty() {
        // Without a PID namespace of its own the container's other processes would outlive it.
        if let Err(error) = container.cgroup.kill() {
            tracing::warn!(container = container.id, %error, "could not kill what a container left");
        }
    }
    container.report_kills(&events);
    let pid = process.pid();
    let _ = events.send(Event::Exit { container: container.id.clone(), process: id, pid, exit });
}

/// Reports out-of-memory kills until the container is gone.
async fn report_oom(events: mpsc::UnboundedSender<Event>, container: Arc<Container>) {
    let weak = Arc::downgrade(&container);
    let Ok(mut watch) = container.cgroup.watch("memory.events") else { return };
    let init = container.init.clone();
    drop(container);
    loop {
        tokio::select! {
            changed = watch.changed() => if changed.is_err() { return },
            _ = init.wait() => return,
        }
        let Some(container) = weak.upgrade() else { return };
        container.report_kills(&events);
    }
}

fn no_process(container: &str, process: &str) -> Error {
    Error::NoProcess { container: container.to_owned(), process: process.to_owned() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every statement leaves these consistent, so a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
