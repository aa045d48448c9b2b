//! One thing that was made for a pod, and how it is undone.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::network::{self, NamespaceId, NetworkError};

/// How long a killed process, and a group that loses its last one, may take to go.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// One thing. All paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A directory, removed when it is empty: what else is in it has its own entry, or is not ours to remove.
    Directory(PathBuf),
    /// A file, socket, fifo or link.
    File(PathBuf),
    /// A mount at this place, with all that is mounted on it and below it.
    Mount(PathBuf),
    /// A symbolic link that claims what its name stands for, one of many that others claim by the same means. It is
    /// removed only if it names its owner: recorded before the claim is made, it may have been lost to somebody else.
    Claim {
        /// The link.
        path: PathBuf,
        /// What it points to.
        owner: PathBuf,
    },
    /// A control group's directory (cgroups(7)), with all processes in it.
    Cgroup(PathBuf),
    /// A group above a pod's, which others may use by now: removed when nothing is in it.
    CgroupParent(PathBuf),
    /// An interface that was made in a network namespace.
    Interface {
        /// The namespace.
        namespace: NamespaceId,
        /// The interface's name.
        name: String,
    },
    /// The redirection of all that arrives at an interface, which somebody else made.
    Redirect {
        /// The namespace.
        namespace: NamespaceId,
        /// The interface's name.
        interface: String,
    },
    /// A process. It has an identity only once it exists, so it is recorded while it waits, before it does anything,
    /// for a request on a socket whose other end its maker holds: a maker that dies earlier ends it.
    Process(ProcessId),
}

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of proc_pid_stat(5)).
    pub start_time: u64,
}

/// Why something remains.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
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
    /// A process cannot be killed.
    #[error("kill process {pid}")]
    Kill {
        /// Its number.
        pid: i32,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A part of the network remains.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Something killed is still there after a bounded wait, as processes in uninterruptible sleep are.
    #[error("{0} does not end")]
    Stuck(String),
}

impl ProcessId {
    /// The identity of a process that is there now.
    ///
    /// # Errors
    /// When it is not.
    pub fn of(pid: i32) -> io::Result<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name in parentheses may hold anything, `)` too; behind the last one the fields begin with the third.
        let field = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(22 - 3));
        let start_time = field.and_then(|text| text.parse().ok());
        start_time
            .map(|start_time| ProcessId { pid, start_time })
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "stat has no start time"))
    }

    fn kill(self) -> Result<(), UndoError> {
        let failed = |source: Errno| UndoError::Kill { pid: self.pid, source: source.into() };
        // 0 and below speak of groups of processes, and 1 is init: no record of ours names them. rustix panics on the
        // negative ones, so they are sorted out first.
        let Some(pid) = Some(self.pid).filter(|pid| *pid > 1).and_then(Pid::from_raw) else {
            return Err(failed(Errno::INVAL));
        };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            result => result.map_err(failed)?,
        };
        // The descriptor holds the process that has the number now; compare after opening, not before.
        match ProcessId::of(self.pid) {
            Ok(now) if now == self => {}
            Err(error) if error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(3) => {
                return Err(UndoError::Kill { pid: self.pid, source: error });
            }
            _ => return Ok(()),
        }
        match rustix::process::pidfd_send_signal(&pidfd, Signal::KILL) {
            Err(Errno::SRCH) => return Ok(()),
            result => result.map_err(failed)?,
        }
        let timeout = Timespec::try_from(GONE_WITHIN).map_err(|_| failed(Errno::INVAL))?;
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        match rustix::io::retry_on_intr(|| rustix::event::poll(&mut ended, Some(&timeout))).map_err(failed)? {
            0 => Err(UndoError::Stuck(format!("process {}", self.pid))),
            _ => Ok(()),
        }
    }
}

impl Resource {
    /// What it is, as one word.
    pub fn kind(&self) -> &'static str {
        match self {
            Resource::Directory(_) | Resource::File(_) | Resource::Claim { .. } => "files",
            Resource::Mount(_) => "mounts",
            Resource::Cgroup(_) | Resource::CgroupParent(_) => "cgroup",
            Resource::Interface { .. } | Resource::Redirect { .. } => "network",
            Resource::Process(_) => "processes",
        }
    }

    /// Undoes it. That it is not there, or never was, is success.
    ///
    /// # Errors
    /// When it remains.
    pub fn undo(&self) -> Result<(), UndoError> {
        match self {
            Resource::Directory(path) => gone(fs::remove_dir(path), "remove directory", path),
            Resource::File(path) => gone(fs::remove_file(path), "remove", path),
            Resource::Mount(path) => unmount(path),
            Resource::Claim { path, owner } => give_back(path, owner),
            Resource::Cgroup(path) => remove_cgroup(path),
            Resource::CgroupParent(path) => match fs::remove_dir(path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
                result => gone(result, "remove control group", path),
            },
            Resource::Interface { namespace, name } => {
                network::remove_interface(namespace, name).map_err(UndoError::from)
            }
            Resource::Redirect { namespace, interface } => {
                network::remove_redirect(namespace, interface).map_err(UndoError::from)
            }
            Resource::Process(process) => process.kill(),
        }
    }
}

/// Makes success of the errors that say that a path is not there.
fn gone(result: io::Result<()>, action: &'static str, path: &Path) -> Result<(), UndoError> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(())
        }
        result => result.map_err(|source| UndoError::Io { action, path: path.to_owned(), source }),
    }
}

/// Removes a claim, if it is `owner`'s. Nobody else removes it meanwhile, and none but its owner could make it anew.
fn give_back(path: &Path, owner: &Path) -> Result<(), UndoError> {
    match fs::read_link(path) {
        Ok(target) if target == owner => gone(fs::remove_file(path), "remove", path)?,
        // Not a link: nobody's claim.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(()),
        other => gone(other.map(drop), "read", path)?,
    }
    // The last one takes the directory with it, and so does one who died between the directory and the claim.
    let _ = path.parent().map(fs::remove_dir);
    Ok(())
}

/// Detaches every mount that was stacked at `path`, with what is mounted below. A file system that a process still has
/// open, as the file server of a machine may until its guest forgets the last file, ends when that is closed: to wait for
/// it would let the guest delay every removal.
fn unmount(path: &Path) -> Result<(), UndoError> {
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more).
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => return gone(Err(error.into()), "unmount", path),
        }
    }
}

/// Kills all processes of a group until it can be removed. The caller must not be in it.
fn remove_cgroup(path: &Path) -> Result<(), UndoError> {
    let deadline = Instant::now() + GONE_WITHIN;
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
            result => return gone(result, "remove control group", path),
        }
        kill_members(path)?;
        if Instant::now() >= deadline {
            return Err(UndoError::Stuck(format!("what is in control group {path:?}")));
        }
        // Only version 2 tells by an event that a group is empty, so both are asked, at most for GONE_WITHIN.
        thread::sleep(Duration::from_millis(5));
    }
}

/// One round over a group: with `cgroup.kill` where there is one (version 2, Linux 5.14), else one by one.
fn kill_members(group: &Path) -> Result<(), UndoError> {
    let list = group.join("cgroup.procs");
    let text = match fs::read_to_string(&list) {
        Ok(text) => text,
        Err(source) => return gone(Err(source), "read", &list),
    };
    let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    if pids.contains(&rustix::process::getpid().as_raw_nonzero().get()) {
        return Err(UndoError::Stuck(format!("control group {group:?}, which holds its own remover,")));
    }
    // Never created: what is busy may also be a mount point in an ordinary directory.
    let kill = fs::OpenOptions::new().write(true).open(group.join("cgroup.kill"));
    if kill.and_then(|mut file| file.write_all(b"1")).is_ok() {
        return Ok(());
    }
    for process in pids.into_iter().filter_map(|pid| ProcessId::of(pid).ok()) {
        process.kill()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};

    fn sleeper() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id().try_into().unwrap()).unwrap();
        (child, process)
    }

    #[test]
    fn kills_a_process() {
        let (mut child, process) = sleeper();
        Resource::Process(process).undo().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        Resource::Process(process).undo().unwrap();
    }

    #[test]
    fn spares_a_later_process_with_the_same_number() {
        let (mut child, process) = sleeper();
        Resource::Process(ProcessId { start_time: process.start_time - 1, ..process }).undo().unwrap();
        assert!(child.try_wait().unwrap().is_none(), "somebody else's process was killed");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn never_kills_init_or_a_group() {
        for pid in [1, 0, -1, i32::MIN] {
            let process = ProcessId { pid, start_time: 0 };
            assert!(matches!(Resource::Process(process).undo(), Err(UndoError::Kill { .. })), "{pid}");
        }
    }

    #[test]
    fn a_directory_that_is_no_mount_survives_its_unmount() {
        let directory = tempfile::tempdir().unwrap();
        Resource::Mount(directory.path().to_owned()).undo().unwrap();
        assert!(directory.path().exists());
    }

    #[test]
    fn unmounts_all_that_is_stacked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for _ in 0..2 {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("caisson-test", path, "tmpfs", flags, None).unwrap();
        }
        fs::write(path.join("hidden"), "").unwrap();
        Resource::Mount(path.to_owned()).undo().unwrap();
        assert_eq!(fs::read_dir(path).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(path.to_str().unwrap()));
    }

    fn mount_tmpfs(path: &Path) {
        fs::create_dir_all(path).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("caisson-test", path, "tmpfs", flags, None).unwrap();
    }

    #[test]
    fn unmounts_what_is_in_use_and_what_is_below_whatever_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("outer");
        mount_tmpfs(&path);
        mount_tmpfs(&path.join("in ner\\040"));
        mount_tmpfs(&path.join("in ner\\040/most"));
        Resource::Mount(path.clone()).undo().unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);

        mount_tmpfs(&path);
        let used = fs::File::create(path.join("used")).unwrap();
        Resource::Mount(path.clone()).undo().unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        used.metadata().unwrap();
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(!mounts.contains(directory.path().to_str().unwrap()));
    }

    #[test]
    fn removes_a_control_group_with_its_processes() {
        let root = Path::new("/sys/fs/cgroup");
        let version_2 = root.join("cgroup.controllers").exists();
        let parent = if version_2 { root.to_owned() } else { root.join("memory") };
        let group = parent.join(format!("caisson-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        let mut children = [sleeper().0, sleeper().0];
        for child in &children {
            fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        Resource::Cgroup(group.clone()).undo().unwrap();
        assert!(!group.exists());
        for child in &mut children {
            assert_eq!(child.wait().unwrap().signal(), Some(9));
        }
    }

    #[test]
    fn a_line_says_what_it_is() {
        let line = serde_json::to_string(&Resource::Process(ProcessId { pid: 7, start_time: 9 })).unwrap();
        assert_eq!(line, r#"{"process":{"pid":7,"start_time":9}}"#);
    }
}
