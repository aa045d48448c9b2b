//! The pod: the namespaces that its containers share, and the init of its PID namespace.

pub mod init;
mod sysctl;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;

use crate::container::sys;
use crate::namespace::aside;

/// The namespaces that every pod has, with their names in /proc.
const SHARED: [(&str, CloneFlags); 3] =
    [("net", CloneFlags::CLONE_NEWNET), ("ipc", CloneFlags::CLONE_NEWIPC), ("uts", CloneFlags::CLONE_NEWUTS)];

/// How long the processes of a pod's PID namespace may take to end, in milliseconds.
const END_TIMEOUT_MS: u16 = 5_000;

/// Why the pod can not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PodError {
    /// A field is malformed.
    #[error("{field}: {value:?} is not valid")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: String,
    },
    /// The kernel refused.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl PodError {
    fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> PodError {
        let action = action.into();
        move |source| PodError::Io { action, source }
    }
}

/// A pod's namespaces, kept alive by mounts under the agent's directory. Dropping it takes them away.
#[derive(Debug)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    directory: PathBuf,
    init: Option<Pid>,
    network: OwnedFd,
    ipc: OwnedFd,
    uts: OwnedFd,
}

impl Pod {
    /// Makes the namespaces; mounts them under `root`/ns.
    ///
    /// # Errors
    /// When one can not be made; nothing is left behind.
    pub fn create(root: &Path, id: &str) -> Result<Pod, PodError> {
        let directory = root.join("ns");
        fs::create_dir_all(&directory).map_err(PodError::io("make the namespaces' directory"))?;
        let guard = Mounts(directory.clone());
        for (name, _) in SHARED {
            File::create(directory.join(name))
                .map_err(PodError::io(format!("make the mount point of {name}")))?;
        }
        aside(|| {
            let all = SHARED.iter().fold(CloneFlags::empty(), |all, (_, flag)| all | *flag);
            unshare(all)?;
            for (name, _) in SHARED {
                bind(Path::new("/proc/thread-self/ns").join(name).as_path(), &directory.join(name))?;
            }
            Ok(())
        })
        .map_err(PodError::io("make the pod's namespaces"))?;
        let open = |name: &str| {
            let file = File::open(directory.join(name));
            file.map(OwnedFd::from).map_err(PodError::io(format!("open the pod's {name} namespace")))
        };
        let (network, ipc, uts) = (open("net")?, open("ipc")?, open("uts")?);
        std::mem::forget(guard);
        Ok(Pod { id: id.to_owned(), directory, init: None, network, ipc, uts })
    }

    /// The path of a namespace: "net", "ipc", "uts", and "pid" if the pod has one.
    pub fn namespace(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Gives the pod one PID namespace, whose init is `init`: a child of the agent.
    ///
    /// # Errors
    /// When it can not be mounted.
    pub fn adopt(&mut self, init: Pid) -> Result<(), PodError> {
        self.init = Some(init);
        let target = self.namespace("pid");
        let mount = || {
            File::create(&target)?;
            bind(Path::new(&format!("/proc/{init}/ns/pid")), &target)
        };
        mount().map_err(PodError::io("keep the pod's PID namespace"))
    }

    /// The network namespace.
    pub fn network(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// Sets the pod's host and domain name; empty ones stay.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_names(&self, hostname: &str, domainname: &str) -> Result<(), PodError> {
        self.within(|| {
            if !hostname.is_empty() {
                nix::unistd::sethostname(hostname)?;
            }
            if !domainname.is_empty() {
                fs::write("/proc/sys/kernel/domainname", domainname)?;
            }
            Ok(())
        })
        .map_err(PodError::io("name the pod"))
    }

    /// Sets kernel parameters of the pod's namespaces.
    ///
    /// # Errors
    /// When one is not namespaced, does not exist, or does not take its value.
    pub fn set_sysctls<'a>(
        &self,
        sysctls: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<(), PodError> {
        let mut writes = Vec::new();
        for (key, value) in sysctls {
            writes.push((key, sysctl::path(key)?, value));
        }
        for (key, path, value) in writes {
            self.within(|| {
                fs::OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
            })
            .map_err(PodError::io(format!("set {key}")))?;
        }
        Ok(())
    }

    /// Runs `work` on a thread inside the pod's namespaces.
    ///
    /// # Errors
    /// As `work`, or when they can not be entered.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        aside(|| {
            for namespace in [&self.network, &self.ipc, &self.uts] {
                setns(namespace, CloneFlags::empty())?;
            }
            work()
        })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(init) = self.init {
            // Takes every process of the namespace along; the reaper collects it.
            let end = u32::try_from(init.as_raw()).ok().and_then(|pid| sys::pidfd_open(pid).ok());
            let _ = kill(init, Signal::SIGKILL);
            if let Some(end) = end {
                let _ = poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLIN)], END_TIMEOUT_MS);
            }
        }
        drop(Mounts(self.directory.clone()));
    }
}

/// Removes the mounts of a directory of namespaces.
struct Mounts(PathBuf);

impl Drop for Mounts {
    fn drop(&mut self) {
        for name in ["net", "ipc", "uts", "pid"] {
            let path = self.0.join(name);
            let _ = umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = fs::remove_file(&path);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    Ok(mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}
