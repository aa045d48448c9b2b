//! The pod's control group on the host.
//!
//! | module | owns |
//! |---|---|
//! | `path` | the two forms of the specification's `cgroupsPath` |
//! | `layout` | the hierarchies that the node has mounted: version 2, version 1, or both |
//! | `stats` | what a group uses |
//!
//! The group is where the sandbox's specification wants it, below the group that the kubelet has made for the pod and
//! limits. Nothing is limited here: the limits of a pod's containers make its machine as large as it is, and hold inside
//! it. What has to be in the group is all that the pod makes the host do: the shim joins it before it starts the
//! machine, which with all its threads is born in it.
//!
//! A group, and those above it that had to be made for it, are in the [journal](crate::journal) before they are
//! made. A shim that is to undo its own pod has to [leave](Cgroup::leave) first, as the undoing kills whoever is inside.

mod layout;
mod path;
mod stats;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caisson_protocol::v1;

use crate::journal::{Journal, JournalError, Resource};
use layout::{Hierarchy, Kind};

pub use layout::{Layout, is_unified};

/// The file that names a group's members, and takes new ones with all their threads.
const MEMBERS: &str = "cgroup.procs";
/// The file that hands controllers down, in version 2.
const CONTROLLERS_BELOW: &str = "cgroup.subtree_control";
/// What a new group of version 1's cpuset needs from the one above it before anybody can join.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];
/// Others may remove an empty group above ours between our looking and our making one in it; so often in a row not.
const TRIES: usize = 16;

/// Why a pod has no control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It cannot be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A `cgroupsPath` of neither form, or one that leads elsewhere.
    #[error("{0:?} is no path of a control group")]
    Path(String),
    /// The node has none.
    #[error("no control group hierarchy is mounted")]
    NoHierarchy,
    /// The kernel refused.
    #[error("{action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::Io { action, path: path.to_owned(), source }
}

/// A pod's group: one directory in each hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    layout: Layout,
    directories: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the group that a specification's `cgroupsPath` names. One that is there already is taken over.
    ///
    /// # Errors
    /// When the path makes no sense or the kernel refuses; what was made by then is in the journal.
    pub fn make(journal: &mut Journal, layout: &Layout, cgroups_path: &str) -> Result<Cgroup, CgroupError> {
        let path = path::directory(cgroups_path)?;
        let mut directories = Vec::new();
        for hierarchy in &layout.hierarchies {
            make_in(journal, hierarchy, &path)?;
            directories.push(hierarchy.root.join(&path));
        }
        Ok(Cgroup { layout: layout.clone(), directories })
    }

    /// The group's directories, one in each hierarchy.
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Moves a process with all its threads into the group; 0: the calling one. What it starts from then on is in it.
    ///
    /// # Errors
    /// When there is no such process, or the kernel refuses.
    pub fn join(&self, pid: u32) -> Result<(), CgroupError> {
        self.directories.iter().try_for_each(|directory| enter(directory, pid))
    }

    /// Moves the calling process out of the group, to the root of each hierarchy that it is in the group in: the groups
    /// above are to go too, and one of version 2 that hands controllers down may have no members.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn leave(&self) -> Result<(), CgroupError> {
        let own = self.layout.own().map_err(at("read", Path::new("/proc/self/cgroup")))?;
        for (hierarchy, directory) in self.layout.hierarchies.iter().zip(&self.directories) {
            if own.contains(directory) {
                enter(&hierarchy.root, 0)?;
            }
        }
        Ok(())
    }

    /// What the group uses: the shim and the machine, so all that the pod costs.
    ///
    /// # Errors
    /// When a file cannot be read. Controllers that are not there are not in the answer.
    pub fn stats(&self) -> Result<v1::StatsResponse, CgroupError> {
        let mut stats = v1::StatsResponse::default();
        for (hierarchy, directory) in self.layout.hierarchies.iter().zip(&self.directories) {
            match hierarchy.kind {
                Kind::Unified if self.layout.is_unified() => return stats::unified(directory),
                // Beside version 1 it has no controllers that matter, yet counts time: once is enough.
                Kind::Unified => {}
                Kind::Controllers(_) => stats::add(&mut stats, directory)?,
            }
        }
        Ok(stats)
    }
}

impl Layout {
    /// Moves the calling process to the root of each hierarchy, out of whatever group it is in.
    ///
    /// # Errors
    /// [`CgroupError::Io`] when the kernel refuses.
    pub fn leave_for_root(&self) -> Result<(), CgroupError> {
        self.hierarchies.iter().try_for_each(|hierarchy| enter(&hierarchy.root, 0))
    }
}

fn enter(directory: &Path, pid: u32) -> Result<(), CgroupError> {
    let members = directory.join(MEMBERS);
    fs::write(&members, pid.to_string()).map_err(at("write to", &members))
}

/// Makes a group in one hierarchy, with all above it.
fn make_in(journal: &mut Journal, hierarchy: &Hierarchy, path: &Path) -> Result<(), CgroupError> {
    let mut tries = 0;
    loop {
        match make_chain(journal, hierarchy, path) {
            Err(CgroupError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && tries < TRIES =>
            {
                tries += 1;
            }
            result => return result,
        }
    }
}

fn make_chain(journal: &mut Journal, hierarchy: &Hierarchy, path: &Path) -> Result<(), CgroupError> {
    let mut directory = hierarchy.root.clone();
    let mut components = path.components().peekable();
    while let Some(component) = components.next() {
        if hierarchy.kind == Kind::Unified {
            hand_down(&directory);
        }
        let parent = directory.clone();
        directory.push(component);
        let exists = directory.exists();
        if components.peek().is_none() {
            journal.record(Resource::Cgroup(directory.clone()))?;
        } else if !exists {
            journal.record(Resource::CgroupParent(directory.clone()))?;
        }
        if !exists {
            match fs::create_dir(&directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result.map_err(at("make", &directory))?,
            }
        }
        if hierarchy.has("cpuset") {
            inherit_cpuset(&parent, &directory)?;
        }
    }
    Ok(())
}

/// Hands all controllers down from a group, as far as it may: one with members hands down none, and then there is
/// less to be counted below.
fn hand_down(directory: &Path) {
    let available = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        let _ = fs::write(directory.join(CONTROLLERS_BELOW), format!("+{controller}"));
    }
}

/// Gives a new group the processors and memory of the one above.
fn inherit_cpuset(parent: &Path, group: &Path) -> Result<(), CgroupError> {
    for name in CPUSET {
        let (from, to) = (parent.join(name), group.join(name));
        let has = fs::read_to_string(&to).map_err(at("read", &to))?;
        if has.trim().is_empty() {
            let text = fs::read_to_string(&from).map_err(at("read", &from))?;
            fs::write(&to, text.trim()).map_err(at("write to", &to))?;
        }
    }
    Ok(())
}
