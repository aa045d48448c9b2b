//! What is made for a pod as a whole: its directory and record, its share, its machine, the sandbox in the guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use caisson_protocol::client::with_deadline;
use caisson_protocol::limits::MAX_MESSAGE;
use caisson_protocol::v1::{self, containers_client::ContainersClient};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::Settings;
use super::disks::RawDisks;
use super::error::PodError;
use super::host::{HostSide, Made};
use super::size::PodSize;
use super::spec::SandboxSpec;
use super::volumes::Volumes;
use crate::config::Config;
use crate::id::Id;
use crate::journal::Journal;
use crate::log::one_line;
use crate::machine::{Machine, Origin, Plan, SHARE_TAG};
use crate::oom_score;
use crate::phases::Phases;
use crate::share::{Mount, Share};
use crate::sizing::{Change, Demand, Limits};
use crate::template::{self, Found, Template, build};

/// The storage in the guest that is the share.
const SHARE: &str = "share";
/// The storage in the guest that is the pod's shared memory.
const SHM: &str = "shm";
/// Its size in bytes: what containerd gives the sandboxes of other runtimes.
const SHM_SIZE: u64 = 64 << 20;
const SHM_MODE: u32 = 0o1777;
/// How long the agent may take to make the pod.
const CREATE: std::time::Duration = std::time::Duration::from_secs(60);

/// A pod that is up.
#[derive(Debug)]
pub struct Sandbox {
    machine: Machine,
    /// Held while it changes.
    size: tokio::sync::Mutex<PodSize>,
    share: Arc<Share>,
    /// Taken at the end, when it is undone.
    host: Mutex<Option<HostSide>>,
    /// Taken when that begins: what is made from then on would be in no record.
    journal: Arc<Mutex<Option<Journal>>>,
    names: v1::CreateSandboxResponse,
    /// Where the host has the pod's own files, if nobody else has made them.
    files: Option<PathBuf>,
    /// Where the guest's agent has its storages.
    storages: String,
    raw_disks: RawDisks,
    volumes: Volumes,
    /// The least of its containers', so far.
    oom_score: Mutex<Option<i32>>,
    /// Leads connections to the pod's loopback into the guest.
    forwarding: Option<JoinHandle<()>>,
}

impl Sandbox {
    /// Makes all of it. `rootfs` is the root file system of the pod's first container.
    ///
    /// # Errors
    /// When any of it fails; nothing of it is left then.
    pub async fn create(
        settings: &Arc<Settings>,
        wanted: SandboxSpec,
        rootfs: Vec<Mount>,
    ) -> Result<Sandbox, PodError> {
        let mut phases = Phases::begin();
        let config = Config::read(&settings.config)?.for_pod(&wanted.annotations)?;
        let limits = wanted.limits.apply(Limits::default());
        let limits = Change::of_annotations(&wanted.annotations)?.apply(limits);
        let mut size = PodSize::new(config.sizing, Demand::new(limits))?;
        // containerd's ids have no slash.
        let tenant =
            format!("{}/{}", settings.namespace, wanted.kubernetes_namespace.as_deref().unwrap_or(""));
        let has_files = !wanted.files.is_empty();
        let (for_host, wanted_there) = (settings.clone(), wanted.clone());
        phases.done("configuration");
        let make = move || HostSide::make(&for_host, &wanted_there, &rootfs, phases);
        let (host, made) = tokio::task::spawn_blocking(make).await??;
        let Made { share, ids, network, mut journal, mut phases } = made;
        let (mut cards, mut description, mut loopback) = (Vec::new(), None, None);
        if let Some(attached) = network {
            for what in &attached.description.left_out {
                tracing::info!(what, "of the pod's network the guest goes without this");
            }
            (cards, description, loopback) = (attached.cards, Some(attached.description), attached.loopback);
        }
        let (template, missing) = find_template(&config, &size, tenant).await;
        let started = async {
            let shape = template.as_ref().map_or(size.shape(), |template| template.shape);
            let plan = Plan {
                programs: &config.machine,
                shape: size.shape(),
                share: Some(share.path().to_owned()),
                ids,
                cards,
                directory: host.path(),
                socket: host.short_path("vsock"),
                socket_record: host.path().join("vsock"),
            };
            let (machine, origin) = Machine::start(plan, template, &mut journal, &mut phases).await?;
            let shape = if origin == Origin::Template { shape } else { size.shape() };
            let mut request = request(settings, wanted, shape.boot.vcpus);
            request.network = description.as_ref().map(Into::into);
            let mut agent = machine.agent().sandbox();
            let created = async {
                let names = machine.answer(agent.create_sandbox(with_deadline(request, CREATE))).await?;
                phases.done("sandbox");
                size.start_from(&machine, shape).await?;
                phases.done("size");
                Ok(names)
            };
            match created.await {
                Ok(names) => {
                    tracing::info!(%phases, pid = machine.pid(), ?origin, "the pod is up");
                    Ok((machine, names))
                }
                Err(error) => {
                    machine.kill();
                    machine.ended().await;
                    Err(error)
                }
            }
        };
        match started.await {
            Ok((machine, names)) => {
                if let Some(request) = missing {
                    make_template(request).await;
                }
                Ok(Sandbox {
                    forwarding: loopback.and_then(|loopback| loopback.forward(machine.agent().clone()).ok()),
                    storages: format!("{}/storage", machine.agent().version().root),
                    machine,
                    files: has_files.then(|| host.path().to_owned()),
                    size: tokio::sync::Mutex::new(size),
                    share: Arc::new(share),
                    host: Mutex::new(Some(host)),
                    journal: Arc::new(Mutex::new(Some(journal))),
                    names,
                    raw_disks: RawDisks::default(),
                    volumes: Volumes::default(),
                    oom_score: Mutex::new(None),
                })
            }
            Err(error) => {
                if let Err(left) = undo(host).await {
                    tracing::error!(error = one_line(&left), "something of the pod is left");
                }
                Err(error)
            }
        }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Where the host has the pod's own files (host name, hosts, resolver), if nobody else has made them.
    pub fn files(&self) -> Option<&Path> {
        self.files.as_deref()
    }

    /// Whether what was made for the pod is undone, or is being undone.
    pub fn is_destroyed(&self) -> bool {
        self.host.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// The pod's size, to be changed by the one who holds it.
    pub async fn size(&self) -> tokio::sync::MutexGuard<'_, PodSize> {
        self.size.lock().await
    }

    /// The pod's namespaces in the guest.
    pub fn names(&self) -> &v1::CreateSandboxResponse {
        &self.names
    }

    /// Its disks that containers have raw.
    pub fn raw_disks(&self) -> &RawDisks {
        &self.raw_disks
    }

    /// Its volumes that the guest has of its own.
    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// A client for containers.
    pub fn containers(&self) -> ContainersClient<Channel> {
        self.machine.agent().containers().max_decoding_message_size(MAX_MESSAGE)
    }

    /// Has the kernel spare the machine as much as a container of the pod, or more for another's sake.
    pub fn spare_as_much_as(&self, oom_score: i32) {
        let mut least = self.oom_score.lock().unwrap_or_else(PoisonError::into_inner);
        if least.is_some_and(|least| least <= oom_score) {
            return;
        }
        match oom_score::set_with_children(self.machine.pid(), oom_score) {
            Ok(()) => *least = Some(oom_score),
            Err(error) => tracing::warn!(%error, oom_score, "set the machine's oom_score_adj"),
        }
    }

    /// Where something in the share is in the guest.
    pub fn guest_path(&self, relative: &str) -> String {
        format!("{}/{relative}", self.guest_storage(SHARE))
    }

    /// Where a storage is in the guest.
    pub fn guest_storage(&self, id: &str) -> String {
        format!("{}/{id}", self.storages)
    }

    /// A part of a directory in the share, from which no link leads.
    pub fn shared_part(&self, directory: &str, path: String) -> v1::Part {
        v1::Part { storage_id: SHARE.into(), root: directory.to_owned(), path, ..v1::Part::default() }
    }

    /// The parts of the share that a container alone has, for the guest to let go of.
    pub fn only_of(&self, container: &Id) -> Vec<v1::Part> {
        let paths = self.share.only_of(container);
        let names = paths.iter().map(|path| path.to_string_lossy().into_owned());
        names.map(|root| v1::Part { storage_id: SHARE.into(), root, ..v1::Part::default() }).collect()
    }

    /// Where the pod's shared memory is in the guest.
    pub fn guest_shm(&self) -> String {
        self.guest_storage(SHM)
    }

    /// Changes the share, on a thread that may wait for file systems.
    ///
    /// # Errors
    /// Those of `change`, and when the pod is being undone.
    pub async fn with_share<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Share, &mut Journal) -> Result<T, PodError> + Send + 'static,
    ) -> Result<T, PodError> {
        let (share, journal) = (self.share.clone(), self.journal.clone());
        let changed = tokio::task::spawn_blocking(move || {
            match &mut *journal.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(journal) => change(&share, journal),
                None => Err(PodError::State("the pod is being removed".to_owned())),
            }
        });
        changed.await?
    }

    /// What all of the pod costs the host.
    ///
    /// # Errors
    /// When the control group can't be read.
    pub fn stats(&self) -> Result<v1::StatsResponse, PodError> {
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        match host.as_ref().and_then(HostSide::cgroup) {
            Some(cgroup) => Ok(cgroup.stats()?),
            None => Ok(v1::StatsResponse::default()),
        }
    }

    /// Ends the machine in order and undoes everything that was made for the pod. A second time it does nothing.
    ///
    /// # Errors
    /// When something is left, which the record then still holds.
    pub async fn destroy(&self) -> Result<(), PodError> {
        if let Some(forwarding) = &self.forwarding {
            forwarding.abort();
        }
        self.machine.stop().await;
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(host) = host else { return Ok(()) };
        let journal = self.journal.clone();
        // What is just being made is in the record before that is undone.
        let closed = move || drop(journal.lock().unwrap_or_else(PoisonError::into_inner).take());
        tokio::task::spawn_blocking(closed).await?;
        undo(host).await
    }
}

/// The template that a pod of this size starts from; or, when it is missing, which one to make.
async fn find_template(
    config: &Config,
    size: &PodSize,
    tenant: String,
) -> (Option<Box<Template>>, Option<build::Request>) {
    let Some(shape) = size.template() else { return (None, None) };
    let for_finding = config.clone();
    let found = tokio::task::spawn_blocking(move || template::find(&for_finding, shape, &tenant)).await;
    match found {
        Ok(Ok(Found::Ready(template))) => (Some(template), None),
        Ok(Ok(Found::None)) => (None, None),
        Ok(Ok(Found::Missing)) => {
            tracing::info!(memory_mib = shape.boot.memory_mib, "there is no template yet: the pod boots");
            let directory = config.template.directory.clone();
            (None, Some(build::Request { programs: config.machine.clone(), directory, shape }))
        }
        Ok(Err(error)) => {
            tracing::warn!(error = one_line(&error), "there is no template: the pod boots");
            (None, None)
        }
        Err(error) => {
            tracing::warn!(%error, "there is no template: the pod boots");
            (None, None)
        }
    }
}

/// For the pods to come. This one does not depend on it.
async fn make_template(request: build::Request) {
    if let Err(error) = build::start(&request).await {
        tracing::warn!(error = one_line(&error), "no template is made");
    }
}

async fn undo(host: HostSide) -> Result<(), PodError> {
    Ok(tokio::task::spawn_blocking(move || host.undo()).await??)
}

fn request(settings: &Settings, wanted: SandboxSpec, vcpus: u8) -> v1::CreateSandboxRequest {
    use v1::storage::Source;
    let share = v1::Storage {
        id: SHARE.into(),
        source: Some(Source::VirtioFs(v1::VirtioFs { tag: SHARE_TAG.into(), dax: false })),
        ..Default::default()
    };
    let shm = v1::Storage {
        id: SHM.into(),
        source: Some(Source::Tmpfs(v1::Tmpfs { size: SHM_SIZE, mode: SHM_MODE, ..Default::default() })),
        options: ["nosuid", "nodev", "noexec"].map(str::to_owned).into(),
        ..Default::default()
    };
    v1::CreateSandboxRequest {
        id: settings.id.to_string(),
        hostname: wanted.hostname,
        domainname: wanted.domainname,
        sysctls: wanted.sysctls.into_iter().collect(),
        share_pid_namespace: true,
        storages: vec![share, shm],
        online_cpus: vcpus.into(),
        ..Default::default()
    }
}
