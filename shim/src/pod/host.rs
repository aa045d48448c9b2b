//! What is made for a pod on the host, but for its machine: directory and record, control group, share, network.
//!
//! All of it blocks on the file system and on the kernel: not for an executor's threads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::spec::SandboxSpec;
use super::{PodError, Settings};
use crate::cgroup::{Cgroup, Layout};
use crate::directory::{DirectoryError, PodDirectory};
use crate::journal::{Journal, ProcessId, Resource};
use crate::log::one_line;
use crate::network::{self, Attached};
use crate::phases::Phases;
use crate::share::{self, IdRange, Mount, Owners, Share};

/// In the pod's directory: the process that owns it, for whoever has to end that.
pub const OWNER: &str = "shim";
/// In the pod's directory: where mounts are tried out.
const PROBE: &str = "probe";
/// Who has which host ids, for all pods of the node. Not among the pods' directories, as it stays.
pub const IDS: &str = "/run/caisson-ids";

/// The pod's side of the host.
#[derive(Debug)]
pub struct HostSide {
    directory: PodDirectory,
    cgroup: Option<Cgroup>,
}

/// What a machine is to be connected with.
#[derive(Debug)]
pub struct Made {
    /// Where files are shared.
    pub share: Share,
    /// The host ids that the machine's process has to itself; none when the host's own owners are shown.
    pub ids: Option<IdRange>,
    /// Its network cards, and what the guest is to be told of them.
    pub network: Option<Attached>,
    /// The pod's record.
    pub journal: Journal,
    /// How long each part took, and what was before.
    pub phases: Phases,
}

impl HostSide {
    /// Makes all of it, for a pod whose first container has this root file system. This process joins the pod's control
    /// group.
    ///
    /// # Errors
    /// When any of it fails; nothing is left then.
    pub fn make(
        settings: &Settings,
        wanted: &SandboxSpec,
        rootfs: &[Mount],
        phases: Phases,
    ) -> Result<(HostSide, Made), PodError> {
        let directory = PodDirectory::create(&settings.root, &settings.namespace, &settings.id)?;
        let mut host = HostSide { directory, cgroup: None };
        match host.fill(wanted, rootfs, phases) {
            Ok(made) => Ok((host, made)),
            Err(error) => {
                if let Err(left) = host.undo() {
                    tracing::error!(error = one_line(&PodError::from(left)), "something of the pod is left");
                }
                Err(error)
            }
        }
    }

    fn fill(&mut self, wanted: &SandboxSpec, rootfs: &[Mount], mut phases: Phases) -> Result<Made, PodError> {
        let mut journal = self.directory.journal()?;
        let path = self.directory.path().to_owned();
        write_owner(&path, &mut journal)?;
        for (name, text) in &wanted.files {
            write_file(&path.join(name), text, &mut journal)?;
        }
        phases.done("directory");
        if !wanted.cgroups_path.is_empty() {
            let cgroup = Cgroup::make(&mut journal, &Layout::of_host()?, &wanted.cgroups_path)?;
            self.cgroup.insert(cgroup).join(0)?;
        }
        phases.done("cgroup");
        let ids = choose_ids(&path, &mut journal, rootfs)?;
        let share = Share::make(&mut journal, &path, ids.map_or(Owners::Host, Owners::Mapped))?;
        phases.done("share");
        let namespace = wanted.network_namespace.as_deref();
        let network = namespace.map(|namespace| network::attach(&mut journal, namespace)).transpose()?;
        phases.done("network");
        Ok(Made { share, ids, network, journal, phases })
    }

    /// The pod's directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Something in it, by a path that is short and holds within this process.
    pub fn short_path(&self, name: &str) -> PathBuf {
        self.directory.short_path(name)
    }

    /// The pod's control group.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Undoes everything of the record, whoever wrote it there, and removes the directory. This process leaves the pod's
    /// control group.
    ///
    /// # Errors
    /// When something remains, which another try then finds.
    pub fn undo(self) -> Result<(), DirectoryError> {
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = cgroup.leave()
        {
            // Then the group stays, and with it the record.
            tracing::error!(%error, "leave the pod's control group");
        }
        self.directory.clean()
    }
}

/// Ids of its own for the machine, where the pod's files can be shown as theirs.
fn choose_ids(pod: &Path, journal: &mut Journal, rootfs: &[Mount]) -> Result<Option<IdRange>, PodError> {
    let range = IdRange::claim(journal, Path::new(IDS), pod)?;
    // The guest mounts a disk itself.
    if rootfs.is_empty() || share::is_disk(rootfs)? {
        return Ok(Some(range));
    }
    let probe = pod.join(PROBE);
    journal.record(Resource::Directory(probe.clone()))?;
    let made = fs::create_dir(&probe);
    made.map_err(|source| PodError::Io { action: "make", path: probe.clone(), source })?;
    if share::mappable(rootfs, range, &probe)? {
        return Ok(Some(range));
    }
    tracing::warn!("file owners can't be mapped on this node: the machine gets them as the host has them");
    Ok(None)
}

fn write_owner(directory: &Path, journal: &mut Journal) -> Result<(), PodError> {
    let path = directory.join(OWNER);
    let failed = |source| PodError::Io { action: "write", path: path.clone(), source };
    let this = i32::try_from(std::process::id()).map_err(|error| failed(io::Error::other(error)))?;
    let process = ProcessId::of(this).and_then(|process| Ok(serde_json::to_vec(&process)?));
    write_file(&path, &process.map_err(failed)?, journal)
}

fn write_file(path: &Path, text: &[u8], journal: &mut Journal) -> Result<(), PodError> {
    journal.record(Resource::File(path.to_owned()))?;
    let failed = |source| PodError::Io { action: "write", path: path.to_owned(), source };
    fs::write(path, text).map_err(failed)
}
