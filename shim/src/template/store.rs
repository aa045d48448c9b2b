//! Where templates are kept.
//!
//! ```text
//! DIRECTORY/lock                        held by the process that makes a template, collects or removes them
//! DIRECTORY/KEY/key.json                what it was made from
//! DIRECTORY/KEY/state, memory           the snapshot
//! DIRECTORY/KEY/tenants/TENANT          a tenant's own copy of the memory file
//! DIRECTORY/KEY/tenants/TENANT.lock     held by whoever makes that copy
//! DIRECTORY/KEY.new                     one that is being made
//! DIRECTORY/KEY.failed                  why the last attempt failed
//! ```
//!
//! A template appears with its directory, by a rename, and its files never change from then on. They may be removed while
//! machines map them: the kernel keeps the files for these. Whatever a killed process left is found by the next one that
//! takes the lock.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, OFlags, SeekFrom};
use rustix::io::Errno;

use super::key::{Key, digest};
use super::{TemplateError, at};

const LOCK: &str = "lock";
const KEY: &str = "key.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const TENANTS: &str = "tenants";
/// What the name of an unfinished template or copy ends with.
const NEW: &str = "new";
const FAILED: &str = "failed";
/// For how long a failed attempt is not repeated.
const RETRY: Duration = Duration::from_secs(600);
/// For how long a copy that no machine maps is kept for its tenant's next pod.
const UNUSED: Duration = Duration::from_secs(24 * 3600);
/// Who may write to what is not root's alone.
const OTHERS_WRITE: u32 = 0o022;

/// The directory of a node's templates.
#[derive(Clone, Debug)]
pub struct Store(PathBuf);

/// The right to change a store. It ends with this process at the latest.
#[derive(Debug)]
pub struct StoreLock(#[expect(dead_code, reason = "held, not used")] File);

/// A template that is being made.
#[derive(Debug)]
pub struct Unfinished {
    /// The file for the VMM's state.
    pub state: File,
    /// The file for the guest's memory.
    pub memory: File,
    directory: PathBuf,
    target: PathBuf,
}

impl Store {
    /// The store in a directory, which need not be there yet.
    pub fn new(directory: &Path) -> Store {
        Store(directory.to_owned())
    }

    fn directory(&self, key: &Key) -> Result<PathBuf, TemplateError> {
        Ok(self.0.join(key.name()?))
    }

    /// The state and memory files of a template. With a tenant the memory file is a copy that only this tenant's pods
    /// map, made by the first of them. `None`: there is no such template.
    ///
    /// # Errors
    /// [`TemplateError::Untrusted`] when others than root can write to it; [`TemplateError::Failed`] when the last attempt
    /// to make it failed a short while ago; [`TemplateError::Io`].
    pub fn open(&self, key: &Key, tenant: Option<&str>) -> Result<Option<(File, File)>, TemplateError> {
        let directory = self.directory(key)?;
        let Some(state) = open_if_there(&directory.join(STATE))? else {
            return match self.failure(key)? {
                Some(why) => Err(TemplateError::Failed(why)),
                None => Ok(None),
            };
        };
        for part in [self.0.as_path(), &directory] {
            check_owner(&fs::symlink_metadata(part).map_err(at("look at", part))?, part)?;
        }
        let Some(base) = open_if_there(&directory.join(MEMORY))? else { return Ok(None) };
        let memory = match tenant {
            Some(tenant) => tenants_memory(&directory, &base, tenant)?,
            None => base,
        };
        // Whoever collects copies leaves those that are locked. The lock is the open file's: it lasts until the last
        // process that has or maps it is gone.
        rustix::fs::flock(&memory, FlockOperation::LockShared)
            .map_err(|errno| at("lock the memory file below", &directory)(errno.into()))?;
        Ok(Some((state, memory)))
    }

    fn failure(&self, key: &Key) -> Result<Option<String>, TemplateError> {
        let path = self.directory(key)?.with_extension(FAILED);
        let recent = |metadata: &fs::Metadata| {
            metadata.modified().is_ok_and(|when| when.elapsed().is_ok_and(|age| age < RETRY))
        };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("look at", path)(error)),
            Ok(metadata) if recent(&metadata) => {
                fs::read_to_string(&path).map(Some).map_err(at("read", path))
            }
            Ok(_) => Ok(None),
        }
    }

    /// Notes why a template could not be made, for the pods that look for it.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn note_failure(&self, key: &Key, why: &str) -> Result<(), TemplateError> {
        let path = self.directory(key)?.with_extension(FAILED);
        fs::write(&path, why).map_err(at("write", path))
    }

    /// The right to change the store, which is made if it is missing. `None`: another process has it.
    ///
    /// # Errors
    /// [`TemplateError::Io`], and [`TemplateError::Untrusted`] when others than root can write to the directory.
    pub fn try_lock(&self) -> Result<Option<StoreLock>, TemplateError> {
        self.lock_by(FlockOperation::NonBlockingLockExclusive)
    }

    fn lock_by(&self, operation: FlockOperation) -> Result<Option<StoreLock>, TemplateError> {
        let mut builder = DirBuilder::new();
        builder.mode(0o700).recursive(true).create(&self.0).map_err(at("make", &self.0))?;
        check_owner(&fs::symlink_metadata(&self.0).map_err(at("look at", &self.0))?, &self.0)?;
        let path = self.0.join(LOCK);
        let file = options(true).create(true).open(&path).map_err(at("open", &path))?;
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(Some(StoreLock(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(at("lock", path)(errno.into())),
        }
    }

    /// Whether there is a template.
    ///
    /// # Errors
    /// [`TemplateError::Describe`].
    pub fn has(&self, key: &Key) -> Result<bool, TemplateError> {
        Ok(self.directory(key)?.join(STATE).exists())
    }

    /// Begins a template: nobody finds it before it is [published](Unfinished::publish).
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn begin(&self, _: &StoreLock, key: &Key) -> Result<Unfinished, TemplateError> {
        let target = self.directory(key)?;
        let directory = target.with_extension(NEW);
        remove_all(&directory)?;
        DirBuilder::new().mode(0o700).create(&directory).map_err(at("make", &directory))?;
        let create = |name: &str| {
            let path = directory.join(name);
            options(true).create_new(true).open(&path).map_err(at("make", path))
        };
        let (state, memory) = (create(STATE)?, create(MEMORY)?);
        let path = directory.join(KEY);
        fs::write(&path, serde_json::to_vec(key)?).map_err(at("write", path))?;
        Ok(Unfinished { state, memory, directory, target })
    }

    /// Removes what no pod will ask for again: templates of other programs or of another start of the host, what was left
    /// unfinished, and copies that no machine has mapped for a day.
    ///
    /// # Errors
    /// [`TemplateError::Io`] when the store cannot be listed. What cannot be removed is left, and logged.
    pub fn collect(&self, _: &StoreLock) -> Result<(), TemplateError> {
        for entry in fs::read_dir(&self.0).map_err(at("list", &self.0))? {
            let path = entry.map_err(at("list", &self.0))?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let collected = match extension {
                Some(NEW) => remove_all(&path),
                Some(FAILED) if is_older(&path, RETRY) => remove_file(&path),
                Some(_) => Ok(()),
                None if path.is_dir() && !fits(&path) => remove_all(&path),
                None if path.is_dir() => collect_copies(&path.join(TENANTS)),
                None => Ok(()),
            };
            if let Err(error) = collected {
                tracing::warn!(error = crate::log::one_line(&error), "a template that nobody needs is left");
            }
        }
        Ok(())
    }

    /// Removes a template. Machines that map it keep it.
    ///
    /// # Errors
    /// [`TemplateError::Io`] when it stays.
    pub fn remove(&self, key: &Key) -> Result<(), TemplateError> {
        // Waits for a builder, whose template is another one.
        let _lock = self.lock_by(FlockOperation::LockExclusive)?;
        remove_all(&self.directory(key)?)
    }
}

impl Unfinished {
    /// Lets pods find it.
    ///
    /// # Errors
    /// [`TemplateError::Io`]; then nothing of it is left.
    pub fn publish(self) -> Result<(), TemplateError> {
        let published = fs::rename(&self.directory, &self.target);
        if published.is_err() {
            self.discard()?;
        }
        published.map_err(at("rename to", &self.target))?;
        // A success is the end of an earlier failure.
        remove_file(&self.target.with_extension(FAILED))
    }

    /// Removes it.
    ///
    /// # Errors
    /// [`TemplateError::Io`] when it stays, for the next builder to remove.
    pub fn discard(&self) -> Result<(), TemplateError> {
        remove_all(&self.directory)
    }
}

/// Read-only files of root's. No link is followed.
fn options(write: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(write).mode(0o600);
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

fn open_if_there(path: &Path) -> Result<Option<File>, TemplateError> {
    match options(false).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("open", path)(error)),
        Ok(file) => {
            check_owner(&file.metadata().map_err(at("look at", path))?, path)?;
            Ok(Some(file))
        }
    }
}

fn check_owner(metadata: &fs::Metadata, path: &Path) -> Result<(), TemplateError> {
    let ours = metadata.uid() == rustix::process::geteuid().as_raw();
    if ours && metadata.mode() & OTHERS_WRITE == 0 && !metadata.is_symlink() {
        return Ok(());
    }
    Err(TemplateError::Untrusted(path.to_owned()))
}

/// The tenant's copy of a memory file, made if it is missing.
fn tenants_memory(directory: &Path, base: &File, tenant: &str) -> Result<File, TemplateError> {
    let tenants = directory.join(TENANTS);
    let path = tenants.join(digest(tenant.as_bytes()));
    if let Some(copy) = open_if_there(&path)? {
        return Ok(copy);
    }
    let mut builder = DirBuilder::new();
    builder.mode(0o700).recursive(true).create(&tenants).map_err(at("make", &tenants))?;
    let lock = path.with_extension(LOCK);
    let held = options(true).create(true).open(&lock).map_err(at("open", &lock))?;
    rustix::fs::flock(&held, FlockOperation::LockExclusive)
        .map_err(|errno| at("lock", lock)(errno.into()))?;
    // Another pod may have been faster.
    if let Some(copy) = open_if_there(&path)? {
        return Ok(copy);
    }
    let new = path.with_extension(NEW);
    remove_file(&new)?;
    let to = options(true).create_new(true).open(&new).map_err(at("make", &new))?;
    copy_data(base, &to).map_err(at("copy a template to", &new))?;
    fs::rename(&new, &path).map_err(at("rename to", &path))?;
    // Open for reading alone: no machine gets a descriptor that it could write by.
    open_if_there(&path)?.ok_or_else(|| at("open", &path)(io::ErrorKind::NotFound.into()))
}

/// Copies a file's data. Where it has none, neither has the copy.
fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    let mut position = 0;
    while position < len {
        let start = match rustix::fs::seek(from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start, end)?;
        position = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let wanted = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Whether a template may still be asked for.
fn fits(directory: &Path) -> bool {
    let text = fs::read(directory.join(KEY)).unwrap_or_default();
    serde_json::from_slice::<Key>(&text).is_ok_and(|key| key.still_fits())
}

fn collect_copies(tenants: &Path) -> Result<(), TemplateError> {
    let entries = match fs::read_dir(tenants) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(at("list", tenants))?,
    };
    for entry in entries {
        let path = entry.map_err(at("list", tenants))?.path();
        if path.extension().is_some() || !is_older(&path, UNUSED) {
            continue;
        }
        let Some(copy) = open_if_there(&path)? else { continue };
        match rustix::fs::flock(&copy, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => remove_file(&path)?,
            // A machine maps it.
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(at("lock", path)(errno.into())),
        }
    }
    Ok(())
}

fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|when| SystemTime::now().duration_since(when).is_ok_and(|now| now > age))
}

fn remove_file(path: &Path) -> Result<(), TemplateError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(at("remove", path)),
    }
}

fn remove_all(directory: &Path) -> Result<(), TemplateError> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(at("remove", directory)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::config;
    use crate::sizing::{Shape, Size};

    struct Node {
        directory: tempfile::TempDir,
        store: Store,
        key: Key,
    }

    fn node() -> Node {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = directory.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let programs = config::Machine {
            vmm: file("vmm"),
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            kernel_parameters: String::new(),
        };
        let shape = Shape { boot: Size { vcpus: 1, memory_mib: 256 }, max_vcpus: 1, hotplug_mib: 0 };
        let key = Key::of(&programs, shape).unwrap();
        let store = Store::new(&directory.path().join("templates"));
        Node { directory, store, key }
    }

    /// Memory with data between two holes.
    fn fill(mut file: &File) {
        file.set_len(16 << 20).unwrap();
        file.seek(io::SeekFrom::Start(4 << 20)).unwrap();
        file.write_all(&[7; 8192]).unwrap();
    }

    fn publish(node: &Node) {
        let lock = node.store.try_lock().unwrap().unwrap();
        let unfinished = node.store.begin(&lock, &node.key).unwrap();
        fill(&unfinished.memory);
        unfinished.publish().unwrap();
    }

    #[test]
    fn template_is_found_only_once_it_is_whole() {
        let node = node();
        assert!(node.store.open(&node.key, None).unwrap().is_none());
        let lock = node.store.try_lock().unwrap().unwrap();
        assert!(node.store.try_lock().unwrap().is_none(), "one builder at a time");
        let unfinished = node.store.begin(&lock, &node.key).unwrap();
        fill(&unfinished.memory);
        assert!(node.store.open(&node.key, None).unwrap().is_none());
        unfinished.publish().unwrap();
        assert!(node.store.has(&node.key).unwrap());
        let (_, memory) = node.store.open(&node.key, None).unwrap().unwrap();
        assert!(memory.set_len(0).is_err(), "a machine could write to its template");
    }

    #[test]
    fn template_of_a_killed_builder_is_removed_by_the_next() {
        let node = node();
        let lock = node.store.try_lock().unwrap().unwrap();
        drop(node.store.begin(&lock, &node.key).unwrap());
        let unfinished = node.store.begin(&lock, &node.key).unwrap();
        let left = unfinished.directory.clone();
        drop(unfinished);
        assert!(left.exists());
        node.store.collect(&lock).unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn template_copies_are_a_tenants_own_and_as_sparse() {
        let node = node();
        publish(&node);
        let inode = |tenant| {
            let (_, memory) = node.store.open(&node.key, tenant).unwrap().unwrap();
            let metadata = memory.metadata().unwrap();
            let mut data = [0; 8192];
            memory.read_exact_at(&mut data, 4 << 20).unwrap();
            assert_eq!((metadata.len(), data), (16 << 20, [7; 8192]));
            assert!(metadata.blocks() * 512 < 1 << 20, "the holes were filled");
            metadata.ino()
        };
        let (base, a, b) = (inode(None), inode(Some("a")), inode(Some("b")));
        assert!(base != a && a != b && b != base);
        assert_eq!(inode(Some("a")), a);
    }

    #[test]
    fn template_copies_are_collected_when_old_and_not_in_use() {
        let node = node();
        publish(&node);
        let (_, used) = node.store.open(&node.key, Some("used")).unwrap().unwrap();
        node.store.open(&node.key, Some("unused")).unwrap();
        node.store.open(&node.key, Some("recent")).unwrap();
        let tenants = node.store.directory(&node.key).unwrap().join(TENANTS);
        let long_ago = SystemTime::now() - 2 * UNUSED;
        for tenant in ["used", "unused"] {
            let copy = File::options().write(true).open(tenants.join(digest(tenant.as_bytes()))).unwrap();
            copy.set_modified(long_ago).unwrap();
        }
        let lock = node.store.try_lock().unwrap().unwrap();
        node.store.collect(&lock).unwrap();
        let exists = |tenant: &str| tenants.join(digest(tenant.as_bytes())).exists();
        assert_eq!((exists("used"), exists("unused"), exists("recent")), (true, false, true));
        drop(used);
        node.store.collect(&lock).unwrap();
        assert!(!exists("used"));
    }

    #[test]
    fn template_of_replaced_programs_is_collected() {
        let node = node();
        publish(&node);
        let lock = node.store.try_lock().unwrap().unwrap();
        node.store.collect(&lock).unwrap();
        assert!(node.store.has(&node.key).unwrap());
        let kernel = node.directory.path().join("kernel");
        fs::write(kernel.with_extension("new"), "another").unwrap();
        fs::rename(kernel.with_extension("new"), kernel).unwrap();
        node.store.collect(&lock).unwrap();
        assert!(!node.store.has(&node.key).unwrap());
    }

    #[test]
    fn template_that_others_can_write_is_refused() {
        let node = node();
        publish(&node);
        let state = node.store.directory(&node.key).unwrap().join(STATE);
        fs::set_permissions(&state, fs::Permissions::from_mode(0o666)).unwrap();
        let refused = node.store.open(&node.key, None);
        assert!(matches!(refused, Err(TemplateError::Untrusted(path)) if path == state));
    }

    #[test]
    fn template_failure_is_remembered_until_one_succeeds() {
        let node = node();
        drop(node.store.try_lock().unwrap());
        node.store.note_failure(&node.key, "no KVM").unwrap();
        let failed = node.store.open(&node.key, None);
        assert!(matches!(failed, Err(TemplateError::Failed(why)) if why == "no KVM"));
        publish(&node);
        assert!(node.store.open(&node.key, None).unwrap().is_some());
        node.store.remove(&node.key).unwrap();
        assert!(node.store.open(&node.key, None).unwrap().is_none());
    }
}
