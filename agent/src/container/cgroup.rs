//! Control groups (v2): one per container, with everything that is asked of it.
//!
//! - [`limits`]: the specification's resources as file contents.
//! - [`devices`]: device rules as an eBPF program.
//! - [`stats`]: what a control group says about itself.
//! - [`watch`]: waiting for a file to change.

pub mod devices;
pub mod limits;
pub mod stats;
mod watch;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use stats::Stats;

use self::watch::Watch;
use super::{Error, sys};
use crate::init::CGROUP_ROOT;
use crate::oci::Resources;
use crate::oci::resources::DeviceRule;

/// How long freezing may take; a task in an uninterruptible wait can hold it up.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a control group whose last process has just been killed is tried to be removed, and at what distance.
const REMOVE_TRIES: u32 = 200;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// Processes and threads of the machine that containers can not have, or a quarter where there are few.
const RESERVED_PROCESSES: u64 = 512;

/// A container's control group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the group that all containers' groups are to be made in, and hands it every controller there is.
    ///
    /// # Errors
    /// When it can not be made, or `path` is not in a cgroup v2 hierarchy.
    pub fn prepare_parent(path: &Path) -> Result<(), Error> {
        fs::create_dir_all(path).map_err(Error::system("make the control group of all containers"))?;
        if !is_cgroup(path) {
            return Err(Error::invalid(
                "cgroup",
                format!("{} is not in a cgroup v2 hierarchy", path.display()),
            ));
        }
        let mut groups: Vec<_> = path.ancestors().take_while(|path| is_cgroup(path)).collect();
        groups.reverse();
        for group in groups {
            let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
            for controller in controllers.split_whitespace() {
                // What can not be had (e.g. cpu with realtime tasks about) is missed when a limit asks for it.
                let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        // Without the controller there is nothing to be kept back with.
        if let Some(limit) = process_limit() {
            let _ = fs::write(path.join("pids.max"), limit.to_string());
        }
        Ok(())
    }

    /// Makes a group.
    ///
    /// # Errors
    /// When there is one already.
    pub fn create(path: &Path) -> Result<Cgroup, Error> {
        fs::create_dir(path).map_err(Error::system(format!("make the control group {}", path.display())))?;
        Ok(Cgroup { path: path.to_owned() })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into the group; where the container made itself sub-groups and this one takes no processes any
    /// more, into the one that `init`, the container's first process, is in.
    pub(super) fn add(&self, pid: u32, init: Option<u32>) -> Result<(), Error> {
        let join = |group: &Path| fs::write(group.join("cgroup.procs"), pid.to_string());
        let joined = match (join(&self.path), init.and_then(|init| self.group_of(init))) {
            // "No internal processes": this one has controllers for its children on.
            (Err(error), Some(group)) if error.raw_os_error() == Some(libc::EBUSY) => join(&group),
            (result, _) => result,
        };
        joined.map_err(Error::system("join the container's control group"))
    }

    /// The group that a process is in, if it is this one or below it.
    fn group_of(&self, pid: u32) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        Some(Path::new(CGROUP_ROOT).join(path)).filter(|group| group.starts_with(&self.path))
    }

    /// Applies limits; what is absent stays.
    ///
    /// # Errors
    /// The member at fault.
    pub fn apply(&self, resources: &Resources) -> Result<(), Error> {
        limits::apply(&self.path, resources)
    }

    /// Lets the group's processes use only the devices that `rules`, and the default ones behind them, allow.
    pub(super) fn restrict_devices(&self, rules: &[DeviceRule]) -> Result<(), Error> {
        let program = devices::compile(rules)?;
        let group = File::open(&self.path).map_err(Error::system("open the control group"))?;
        devices::attach(&program, group.as_fd())
            .map_err(Error::apply("linux.resources.devices", "attach the device filter"))
    }

    /// Pids of all processes, also of those in sub-groups.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        let mut pids = Vec::new();
        for group in self.groups() {
            match fs::read_to_string(group.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
                // Removed by the container in the meantime, or threaded: its processes are listed above it.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
                    ) => {}
                Err(error) => return Err(Error::system("list the container's processes")(error)),
            }
        }
        Ok(pids)
    }

    /// Sends a signal to all processes.
    pub(super) fn signal_all(&self, signal: i32) -> Result<(), Error> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.processes()? {
            // By descriptor, and only if it still is one of ours: the pid may have been reused since.
            let Ok(process) = sys::pidfd_open(pid) else { continue };
            if self.group_of(pid).is_some() {
                let _ = sys::pidfd_send_signal(process.as_fd(), signal);
            }
        }
        Ok(())
    }

    /// Kills all processes, frozen or not, against forks.
    pub(super) fn kill(&self) -> Result<(), Error> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Gone, before or after the file was opened.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
            result => result.map_err(Error::system("kill the container's processes")),
        }
    }

    /// Freezes or thaws all processes; returns when it is done.
    pub(super) async fn freeze(&self, freeze: bool) -> Result<(), Error> {
        let failed = || Error::system(if freeze { "freeze the container" } else { "thaw the container" });
        let mut watch = self.watch("cgroup.events").map_err(failed())?;
        fs::write(self.path.join("cgroup.freeze"), if freeze { "1" } else { "0" }).map_err(failed())?;
        let done = async {
            while self.event("frozen")? != u64::from(freeze) {
                watch.changed().await?;
            }
            Ok(())
        };
        match tokio::time::timeout(FREEZE_TIMEOUT, done).await {
            Ok(done) => done.map_err(failed()),
            Err(_) => Err(failed()(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Returns when no process is left.
    pub(super) async fn wait_empty(&self) -> Result<(), Error> {
        let failed = || Error::system("wait for the container's processes");
        let mut watch = self.watch("cgroup.events").map_err(failed())?;
        while self.event("populated").map_err(failed())? != 0 {
            watch.changed().await.map_err(failed())?;
        }
        Ok(())
    }

    /// Watches one of the group's files.
    pub(super) fn watch(&self, file: &str) -> io::Result<Watch> {
        Watch::new(&self.path.join(file))
    }

    /// Processes that the kernel killed for lack of memory.
    pub(super) fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        stats::keyed(&text, "oom_kill").unwrap_or(0)
    }

    /// Reads statistics.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn stats(&self) -> Result<Stats, Error> {
        stats::read(&self.path)
    }

    /// Removes the group and all below it. Its processes must be dead or dying.
    ///
    /// # Errors
    /// When a process in it does not die.
    pub fn remove(&self) -> Result<(), Error> {
        let mut failure = None;
        for _ in 0..REMOVE_TRIES {
            let mut groups = self.groups();
            // Deepest first.
            groups.reverse();
            failure = groups.iter().find_map(|group| match fs::remove_dir(group) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Some(error),
                _ => None,
            });
            if failure.is_none() {
                return Ok(());
            }
            // A killed process leaves its group a little after it was reaped; nothing tells when.
            std::thread::sleep(REMOVE_PAUSE);
        }
        Err(Error::system("remove the control group")(
            failure.unwrap_or_else(|| io::ErrorKind::TimedOut.into()),
        ))
    }

    /// Kills all and removes the group, after a failure that is reported already.
    pub(super) fn discard(&self) {
        if let Err(error) = self.kill().and_then(|()| self.remove()) {
            tracing::warn!(cgroup = %self.path.display(), %error, "left a control group behind");
        }
    }

    /// The group and all below it, parents first.
    fn groups(&self) -> Vec<PathBuf> {
        let mut groups = vec![self.path.clone()];
        let mut index = 0;
        while let Some(group) = groups.get(index).cloned() {
            let entries = fs::read_dir(group).into_iter().flatten().flatten();
            groups.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
            index += 1;
        }
        groups
    }

    fn event(&self, key: &str) -> io::Result<u64> {
        let text = fs::read_to_string(self.path.join("cgroup.events"))?;
        stats::keyed(&text, key).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// How many processes and threads all containers may have together, so that the agent can always make its own.
fn process_limit() -> Option<u64> {
    let read = |file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let all = read("/proc/sys/kernel/threads-max")?.min(read("/proc/sys/kernel/pid_max")?);
    Some(all - RESERVED_PROCESSES.min(all / 4))
}

fn is_cgroup(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}
