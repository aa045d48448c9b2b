//! Volumes that the guest has of its own, in place of a directory of the host.
//!
//! They live as long as the pod, whatever its containers do: a container that is restarted finds what it had written.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use caisson_protocol::client::{Client, call};
use caisson_protocol::connect::UnixVsock;
use caisson_protocol::v1;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::error::PodError;
use super::spec::FILES;
use crate::machine::{Machine, within};
use crate::share::{self, Memory, Owner, Special, Volume};

/// The size of a volume of the kubelet's files: while they are swapped, old and new are there.
const WRITTEN_SIZE: u64 = 8 << 20;
/// The permissions of the pod's own files, and of their directory.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;
/// How long the guest may take to bring a copy up to date.
const SYNC: Duration = Duration::from_secs(60);
/// What inotify(7) has in place of a watch's number once events were lost.
const OVERFLOW: i32 = -1;

/// What is in the place of a directory of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StandIn {
    /// A directory of the guest.
    Directory(String),
    /// What is at a path in one, to be found when it is used.
    Part(v1::Part),
    /// New mounts of huge pages of so many bytes.
    HugePages(u64),
}

/// A pod's.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By the path on the host.
    known: HashMap<PathBuf, Known>,
    /// How many were begun.
    count: usize,
    watch: Option<Watch>,
}

/// A directory that the guest has.
#[derive(Clone, Debug)]
struct Known {
    /// The storage's id.
    id: String,
    /// Where it is in the guest.
    path: String,
}

impl Volumes {
    /// What is in the place of a volume; none when that is to be shared.
    ///
    /// # Errors
    /// When it can't be looked at, and the agent's own.
    pub async fn stand_in(&self, machine: &Machine, volume: &Volume) -> Result<Option<StandIn>, PodError> {
        let mut state = self.0.lock().await;
        let source = volume.source.as_path();
        if let Some(known) = state.known.get(source) {
            return Ok(Some(StandIn::Directory(known.path.clone())));
        }
        let looked_at = volume.clone();
        let special = tokio::task::spawn_blocking(move || share::special(&looked_at)).await??;
        Ok(match special {
            None => None,
            Some(Special::HugePages(size)) => Some(StandIn::HugePages(size)),
            Some(Special::Memory(memory)) => {
                let known = state.memory(machine, source, memory).await?;
                Some(StandIn::Directory(known.path))
            }
            Some(Special::MemoryPart { volume, whole, path, owner }) => {
                let known = state.memory(machine, &volume, whole).await?;
                let path = path.into_os_string().into_string();
                let path = path.map_err(|path| PodError::Invalid(format!("subPath {path:?}: not UTF-8")))?;
                let Owner { mode, uid, gid } = owner;
                let part = v1::Part { storage_id: known.id, path, mode, uid, gid, ..v1::Part::default() };
                Some(StandIn::Part(part))
            }
            Some(Special::Written(root)) => {
                state.copy(machine, source, root).await?.map(|known| StandIn::Directory(known.path))
            }
        })
    }

    /// Where in the guest the pod's own files are, which are in `directory` on the host. They are copies: containers may
    /// write to them, and the host's directory is in memory that is the node's.
    ///
    /// # Errors
    /// When they can't be read, and the agent's own.
    pub async fn files(&self, machine: &Machine, directory: &Path) -> Result<String, PodError> {
        Ok(self.0.lock().await.files(machine, directory).await?.path)
    }
}

/// The pod's own files as they are in a directory of the host.
fn read_files(directory: &Path) -> Result<Vec<v1::TreeEntry>, PodError> {
    let entry = |&(_, name): &(&str, &str)| {
        let path = directory.join(name);
        match std::fs::read(&path) {
            Ok(text) => Ok(v1::TreeEntry {
                path: name.to_owned(),
                kind: Some(v1::tree_entry::Kind::File(text)),
                mode: FILE_MODE,
                ..v1::TreeEntry::default()
            }),
            Err(source) => Err(PodError::Io { action: "read", path, source }),
        }
    };
    FILES.iter().map(entry).collect()
}

async fn mount(machine: &Machine, id: &str, tmpfs: v1::Tmpfs) -> Result<String, PodError> {
    let storage = v1::Storage {
        id: id.to_owned(),
        source: Some(v1::storage::Source::Tmpfs(tmpfs)),
        ..v1::Storage::default()
    };
    let request = v1::MountStorageRequest { storage: Some(storage) };
    Ok(machine.answer(machine.agent().storages().mount_storage(call(request))).await?.path)
}

impl State {
    /// An id that none had before: the guest may still have what has failed.
    fn next_id(&mut self) -> String {
        let number = self.count;
        self.count = number.saturating_add(1);
        format!("volume-{number}")
    }

    fn keep(&mut self, source: &Path, id: String, path: String) -> Known {
        let known = Known { id, path };
        self.known.insert(source.to_owned(), known.clone());
        known
    }

    /// The guest's file system in memory in place of the host's.
    async fn memory(&mut self, machine: &Machine, source: &Path, memory: Memory) -> Result<Known, PodError> {
        if let Some(known) = self.known.get(source) {
            return Ok(known.clone());
        }
        let (id, Owner { mode, uid, gid }) = (self.next_id(), memory.root);
        let path = mount(machine, &id, v1::Tmpfs { size: memory.size, inodes: 0, mode, uid, gid }).await?;
        Ok(self.keep(source, id, path))
    }

    async fn files(&mut self, machine: &Machine, directory: &Path) -> Result<Known, PodError> {
        if let Some(known) = self.known.get(directory) {
            return Ok(known.clone());
        }
        let (id, path) = (self.next_id(), directory.to_owned());
        let entries = tokio::task::spawn_blocking(move || read_files(&path)).await??;
        let root = Owner { mode: DIRECTORY_MODE, uid: 0, gid: 0 };
        self.fill(machine, directory, id, root, entries).await
    }

    /// A copy of what the kubelet has written, kept up to date. None for what is too much or too strange to be copied.
    async fn copy(
        &mut self,
        machine: &Machine,
        source: &Path,
        root: Owner,
    ) -> Result<Option<Known>, PodError> {
        let id = self.next_id();
        let watch = match &self.watch {
            Some(watch) => watch,
            None => self.watch.insert(Watch::start(machine.agent().clone()).map_err(watching(source))?),
        };
        // Watched before it is read, so that no change is missed.
        watch.add(&id, source).map_err(watching(source))?;
        let path = source.to_owned();
        let entries = match tokio::task::spawn_blocking(move || share::read_tree(&path)).await? {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(error = %error, volume = ?source, "shared instead of copied: its changes are not told");
                watch.forget(source);
                return Ok(None);
            }
        };
        let filled = self.fill(machine, source, id, root, entries).await;
        if filled.is_err()
            && let Some(watch) = &self.watch
        {
            watch.forget(source);
        }
        filled.map(Some)
    }

    /// Makes a file system in the guest's memory with these files, in place of `source`.
    async fn fill(
        &mut self,
        machine: &Machine,
        source: &Path,
        id: String,
        Owner { mode, uid, gid }: Owner,
        entries: Vec<v1::TreeEntry>,
    ) -> Result<Known, PodError> {
        let tmpfs = v1::Tmpfs { size: WRITTEN_SIZE, inodes: 0, mode, uid, gid };
        let path = mount(machine, &id, tmpfs).await?;
        let request = v1::SyncTreeRequest { storage_id: id.clone(), entries };
        let mut storages = machine.agent().storages();
        if let Err(error) = machine.answer(storages.sync_tree(call(request))).await {
            // The guest's memory is the pod's; should this fail, too, it gets it back with the machine's end.
            let _ = machine.answer(storages.unmount_storage(call(v1::UnmountStorageRequest { id }))).await;
            return Err(error.into());
        }
        Ok(self.keep(source, id, path))
    }
}

fn watching(path: &Path) -> impl FnOnce(io::Error) -> PodError {
    let path = path.to_owned();
    move |source| PodError::Io { action: "watch", path, source }
}

/// Copies what has changed, until it is dropped.
#[derive(Debug)]
struct Watch {
    shared: Arc<Watched>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Watched {
    inotify: AsyncFd<OwnedFd>,
    /// The storage's id and the directory, by the watch's number.
    volumes: std::sync::Mutex<HashMap<i32, (String, PathBuf)>>,
}

impl Watch {
    fn start(agent: Client<UnixVsock>) -> io::Result<Watch> {
        let shared = Arc::new(Watched::new()?);
        let watched = shared.clone();
        let task = tokio::spawn(async move {
            while let Ok(changed) = watched.changed().await {
                for number in changed {
                    watched.copy(&agent, number).await;
                }
            }
        });
        Ok(Watch { shared, task })
    }

    fn add(&self, id: &str, source: &Path) -> io::Result<()> {
        let mut volumes = self.shared.volumes();
        let flags = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let number = inotify::add_watch(&self.shared.inotify, source, flags)?;
        volumes.insert(number, (id.to_owned(), source.to_owned()));
        Ok(())
    }

    fn forget(&self, source: &Path) {
        let mut volumes = self.shared.volumes();
        let found = volumes.iter().find(|(_, (_, path))| path == source).map(|(number, _)| *number);
        if let Some(number) = found {
            volumes.remove(&number);
            // It may be gone with its directory.
            let _ = inotify::remove_watch(&self.shared.inotify, number);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watched {
    fn new() -> io::Result<Watched> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: the descriptor is its own, and open for as long as it is.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?;
        Ok(Watched { inotify, volumes: Default::default() })
    }

    fn volumes(&self) -> std::sync::MutexGuard<'_, HashMap<i32, (String, PathBuf)>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for changes, and returns the numbers of their watches, each once.
    async fn changed(&self) -> io::Result<Vec<i32>> {
        let mut numbers = Vec::new();
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) if !numbers.contains(&event.wd()) => numbers.push(event.wd()),
                    Ok(_) => {}
                    Err(rustix::io::Errno::WOULDBLOCK) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            ready.clear_ready();
            if numbers.contains(&OVERFLOW) {
                return Ok(self.volumes().keys().copied().collect());
            }
            if !numbers.is_empty() {
                return Ok(numbers);
            }
        }
    }

    async fn copy(&self, agent: &Client<UnixVsock>, number: i32) {
        let Some((id, source)) = self.volumes().get(&number).cloned() else { return };
        let path = source.clone();
        let entries = match tokio::task::spawn_blocking(move || share::read_tree(&path)).await {
            Ok(Ok(entries)) => entries,
            // The kubelet is about to write it, or to remove it; another change tells when it has.
            _ => return,
        };
        let request = v1::SyncTreeRequest { storage_id: id, entries };
        let mut storages = agent.storages();
        if let Err(status) = within(SYNC, storages.sync_tree(call(request))).await {
            tracing::warn!(error = status.message(), volume = ?source, "the guest's copy is out of date");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[tokio::test]
    async fn a_swapped_link_is_a_change() {
        let volume = tempfile::tempdir().unwrap();
        let shared = Arc::new(Watched::new().unwrap());
        let watch = Watch { shared: shared.clone(), task: tokio::spawn(async {}) };
        watch.add("volume-0", volume.path()).unwrap();
        symlink("..1", volume.path().join("..data_tmp")).unwrap();
        std::fs::rename(volume.path().join("..data_tmp"), volume.path().join("..data")).unwrap();
        let numbers = shared.changed().await.unwrap();
        assert_eq!(numbers.len(), 1);
        assert_eq!(shared.volumes()[&numbers[0]].0, "volume-0");
        watch.forget(volume.path());
        assert!(shared.volumes().is_empty());
    }
}
