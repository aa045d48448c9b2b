//! Files in and out, and connections into the pod.
//!
//! Paths come from the host, directories from a container that may be hostile: every path is resolved in the root
//! that it belongs to, on descriptors, without magic links.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use caisson_protocol::v1::{CopyInRequest, CopyOutResponse};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, unlinkat};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::pod::Pod;
use crate::state::{lock, random};
use crate::streams::Port;
use crate::task;

/// Bytes moved at a time.
const CHUNK: usize = 256 << 10;
/// How long a stream waits for the host to connect.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection inside the pod may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Transfers that go on, or whose result nobody asked for yet. Such a result makes room when there is none.
const MAX_TRANSFERS: usize = 256;
const MAX_PARENTS: usize = 64;

/// Why a transfer failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// A field is malformed.
    #[error("{field}: {value:?} is not valid")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: String,
    },
    /// The transfer is unknown, or its result was told.
    #[error("there is no transfer {0}")]
    NotFound(u64),
    /// Too many go on.
    #[error("there are {MAX_TRANSFERS} transfers already")]
    Limit,
    /// The host did not connect, or sent less or more than it said.
    #[error("{0}")]
    Protocol(String),
    /// Nobody listens there.
    #[error("cannot connect to {address} in the pod")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The file or a directory on its way.
    #[error("{action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which path, in its root.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl TransferError {
    fn invalid(field: &'static str, value: impl Into<String>) -> TransferError {
        TransferError::Invalid { field, value: value.into() }
    }

    fn file<E: Into<io::Error>>(action: &'static str, path: &str) -> impl FnOnce(E) -> TransferError {
        let path = path.to_owned();
        move |error| TransferError::File { action, path, source: error.into() }
    }
}

type Outcome = Result<u64, TransferError>;

/// Transfers whose results can be asked for. Clones share one table.
#[derive(Clone, Debug, Default)]
pub struct Transfers {
    results: Arc<Mutex<BTreeMap<u64, Transfer>>>,
}

#[derive(Debug)]
struct Transfer {
    outcome: oneshot::Receiver<Outcome>,
    task: JoinHandle<()>,
}

impl Transfers {
    /// Starts to receive a file into `root`. Returns the stream's id.
    ///
    /// # Errors
    /// When the request is malformed or the place can not be written.
    pub fn copy_in(&self, root: OwnedFd, request: CopyInRequest, port: Port) -> Result<u64, TransferError> {
        let incoming = Incoming::create(&root, request)?;
        self.start(port.id(), incoming.receive(port))
    }

    /// Starts to send the file `path` of `root`. Returns what the reply says.
    ///
    /// # Errors
    /// When there is no such regular file.
    pub fn copy_out(&self, root: &OwnedFd, path: &str, port: Port) -> Result<CopyOutResponse, TransferError> {
        check_path(path)?;
        // Not blocking: a FIFO would hold the open until someone writes to it.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = File::from(
            in_root(root.as_fd(), Path::new(path), flags).map_err(TransferError::file("open", path))?,
        );
        let metadata = file.metadata().map_err(TransferError::file("examine", path))?;
        if !metadata.is_file() {
            return Err(TransferError::invalid("path", format!("{path} (not a regular file)")));
        }
        let mtime = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
        let reply = CopyOutResponse {
            stream: port.id(),
            size: metadata.len(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime_ns: mtime,
        };
        self.start(port.id(), send(file, path.to_owned(), port))?;
        Ok(reply)
    }

    fn start(
        &self,
        stream: u64,
        transfer: impl Future<Output = Outcome> + Send + 'static,
    ) -> Result<u64, TransferError> {
        let (sender, outcome) = oneshot::channel();
        let mut results = lock(&self.results);
        if results.len() >= MAX_TRANSFERS {
            // Whoever began it has gone without asking, or would have.
            let ended = results.iter().find(|(_, transfer)| transfer.task.is_finished());
            let ended = ended.map(|(&stream, _)| stream).ok_or(TransferError::Limit)?;
            results.remove(&ended);
        }
        let task = task::spawn(async move {
            // Nobody may want to know.
            let _ = sender.send(transfer.await);
        });
        results.insert(stream, Transfer { outcome, task });
        Ok(stream)
    }

    /// The number of bytes moved, once the transfer has ended. Is told once; a call that is given up before may be
    /// repeated.
    ///
    /// # Errors
    /// As the transfer, or when there is none.
    pub async fn wait(&self, stream: u64) -> Outcome {
        let transfer = lock(&self.results).remove(&stream).ok_or(TransferError::NotFound(stream))?;
        let mut asked = Asked { transfers: self, stream, transfer: Some(transfer) };
        let outcome = match &mut asked.transfer {
            Some(transfer) => (&mut transfer.outcome).await.ok(),
            None => None,
        };
        asked.transfer = None;
        outcome.unwrap_or(Err(TransferError::NotFound(stream)))
    }
}

/// A result that is being waited for; put back when nobody waits any more.
struct Asked<'a> {
    transfers: &'a Transfers,
    stream: u64,
    transfer: Option<Transfer>,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if let Some(transfer) = self.transfer.take() {
            lock(&self.transfers.results).insert(self.stream, transfer);
        }
    }
}

/// A file that is being received: under another name until it is complete.
struct Incoming {
    file: File,
    parent: OwnedFd,
    name: PathBuf,
    temporary: String,
    request: CopyInRequest,
    done: bool,
}

impl Incoming {
    fn create(root: &OwnedFd, request: CopyInRequest) -> Result<Incoming, TransferError> {
        let path = request.target.as_ref().map(|target| target.path.clone()).unwrap_or_default();
        check_path(&path)?;
        if request.mode > 0o7777 {
            return Err(TransferError::invalid("mode", format!("{:o}", request.mode)));
        }
        let relative = Path::new(path.trim_start_matches('/'));
        let name = relative.file_name().ok_or_else(|| TransferError::invalid("path", &path))?;
        let parent = relative.parent().unwrap_or(Path::new(""));
        let parent = if request.make_parents {
            make_parents(root.as_fd(), parent, &request)
        } else {
            in_root(root.as_fd(), parent, OFlag::O_PATH | OFlag::O_DIRECTORY)
        }
        .map_err(TransferError::file("open the directory of", &path))?;
        let suffix = random(8).map_err(TransferError::file("draw a name for", &path))?;
        let suffix: String = suffix.iter().map(|byte| format!("{byte:02x}")).collect();
        let temporary = format!(".caisson-{suffix}");
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&parent, temporary.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(TransferError::file("create", &path))?;
        Ok(Incoming { file: file.into(), parent, name: name.into(), temporary, request, done: false })
    }

    async fn receive(mut self, mut port: Port) -> Outcome {
        let path = self.name.to_string_lossy().into_owned();
        let mut connection = attached(&mut port).await?;
        let mut buffer = Vec::new();
        let mut received = 0u64;
        loop {
            buffer.resize(CHUNK, 0);
            let size = connection.read(&mut buffer).await.map_err(TransferError::file("receive", &path))?;
            if size == 0 {
                break;
            }
            received = received.saturating_add(size as u64);
            if received > self.request.size {
                return Err(TransferError::Protocol(format!(
                    "more than {} bytes were sent",
                    self.request.size
                )));
            }
            buffer.truncate(size);
            (self, buffer) = off_thread(move || {
                self.file.write_all(&buffer)?;
                Ok((self, buffer))
            })
            .await
            .map_err(TransferError::file("write", &path))?;
        }
        if received < self.request.size {
            let wanted = self.request.size;
            return Err(TransferError::Protocol(format!("{received} of {wanted} bytes were sent")));
        }
        off_thread(move || self.finish()).await.map_err(TransferError::file("finish", &path))?;
        Ok(received)
    }

    fn finish(mut self) -> io::Result<()> {
        let request = &self.request;
        fchown(&self.file, Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid)))?;
        // After the owner, whose change clears set-id bits.
        fchmod(&self.file, Mode::from_bits_truncate(request.mode))?;
        if request.mtime_ns != 0 {
            let second = 1_000_000_000;
            let time =
                TimeSpec::new(request.mtime_ns.div_euclid(second), request.mtime_ns.rem_euclid(second));
            futimens(&self.file, &TimeSpec::UTIME_OMIT, &time)?;
        }
        renameat(&self.parent, self.temporary.as_str(), &self.parent, &self.name)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.done {
            let _ = unlinkat(&self.parent, self.temporary.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

async fn send(mut file: File, path: String, mut port: Port) -> Outcome {
    let mut connection = attached(&mut port).await?;
    let mut buffer = Vec::new();
    let mut sent = 0u64;
    loop {
        buffer.resize(CHUNK, 0);
        let size;
        (file, buffer, size) = off_thread(move || {
            let size = file.read(&mut buffer)?;
            Ok((file, buffer, size))
        })
        .await
        .map_err(TransferError::file("read", &path))?;
        if size == 0 {
            break;
        }
        let bytes = buffer.get(..size).unwrap_or_default();
        connection.write_all(bytes).await.map_err(TransferError::file("send", &path))?;
        sent = sent.saturating_add(size as u64);
    }
    connection.shutdown().await.map_err(TransferError::file("send", &path))?;
    Ok(sent)
}

/// Connects to a port in the pod: `address`, or loopback.
///
/// # Errors
/// When nobody listens there.
pub fn connect(pod: &Pod, port: u32, address: &str) -> Result<TcpStream, TransferError> {
    let number = u16::try_from(port).ok().filter(|&port| port != 0);
    let number = number.ok_or_else(|| TransferError::invalid("port", port.to_string()))?;
    let addresses: Vec<IpAddr> = if address.is_empty() {
        vec![std::net::Ipv4Addr::LOCALHOST.into(), std::net::Ipv6Addr::LOCALHOST.into()]
    } else {
        vec![address.parse().map_err(|_| TransferError::invalid("address", address))?]
    };
    let mut failure = None;
    for address in addresses {
        let address = SocketAddr::new(address, number);
        match pod.within(|| TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)) {
            Ok(stream) => return Ok(stream),
            // The first address's reason: IPv6 may be off altogether.
            Err(source) => failure = failure.or(Some(TransferError::Connect { address, source })),
        }
    }
    Err(failure.unwrap_or_else(|| TransferError::invalid("address", address)))
}

async fn attached(port: &mut Port) -> Result<crate::connection::Connection, TransferError> {
    tokio::time::timeout(ATTACH_TIMEOUT, port.connection())
        .await
        .map_err(|_| TransferError::Protocol("the host did not connect to the stream".to_owned()))
}

async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    task::blocking(work).await?
}

fn check_path(path: &str) -> Result<(), TransferError> {
    if path.is_empty() || path.len() >= 4096 || path.contains('\0') {
        return Err(TransferError::invalid("path", path));
    }
    Ok(())
}

/// Opens `path` with `root` as its "/": neither a link nor ".." leads out.
fn in_root(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

fn make_parents(root: BorrowedFd<'_>, path: &Path, request: &CopyInRequest) -> nix::Result<OwnedFd> {
    if path.components().count() > MAX_PARENTS {
        return Err(Errno::ENAMETOOLONG);
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut so_far = PathBuf::new();
    let mut current = in_root(root, &so_far, flags)?;
    for component in path.components() {
        so_far.push(component);
        current = match in_root(root, &so_far, flags) {
            Err(Errno::ENOENT) => make_directory(&current, component.as_os_str(), request)?,
            result => result?,
        };
    }
    Ok(current)
}

fn make_directory(parent: &OwnedFd, name: &OsStr, request: &CopyInRequest) -> nix::Result<OwnedFd> {
    mkdirat(parent, name, Mode::from_bits_truncate(0o755))?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(parent, name, flags, Mode::empty())?;
    fchown(&made, Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid)))?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use caisson_protocol::stream::attach;
    use caisson_protocol::v1::CopyTarget;
    use tokio::io::duplex;

    use super::*;
    use crate::connection::Connection;
    use crate::streams::Registry;

    fn root(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    fn request(path: &str, size: u64) -> CopyInRequest {
        CopyInRequest {
            target: Some(CopyTarget { within: None, path: path.into() }),
            size,
            mode: 0o640,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            mtime_ns: 1_500_000_000_123_456_789,
            make_parents: false,
        }
    }

    async fn put(directory: &Path, request: CopyInRequest, bytes: &[u8]) -> Outcome {
        let (registry, transfers) = (Registry::default(), Transfers::default());
        let id = transfers.copy_in(root(directory), request, registry.open())?;
        let (mut host, agent) = duplex(1024);
        let (attached, ()) = tokio::join!(attach(&mut host, id), registry.attach(Connection::new(agent)));
        attached.unwrap();
        // The agent may stop reading early.
        let _ = host.write_all(bytes).await;
        let _ = host.shutdown().await;
        transfers.wait(id).await
    }

    #[tokio::test]
    async fn a_file_goes_in_and_out() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = vec![7; 1_000_000];
        assert_eq!(put(directory.path(), request("/file", 1_000_000), &bytes).await.unwrap(), 1_000_000);
        let (registry, transfers) = (Registry::default(), Transfers::default());
        let reply = transfers.copy_out(&root(directory.path()), "file", registry.open()).unwrap();
        assert_eq!((reply.size, reply.mode, reply.mtime_ns), (1_000_000, 0o640, 1_500_000_000_123_456_789));
        let (mut host, agent) = duplex(1024);
        let (_, ()) = tokio::join!(attach(&mut host, reply.stream), registry.attach(Connection::new(agent)));
        let mut back = Vec::new();
        host.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, bytes);
        assert_eq!(transfers.wait(reply.stream).await.unwrap(), 1_000_000);
        assert!(matches!(transfers.wait(reply.stream).await, Err(TransferError::NotFound(_))));
    }

    #[tokio::test]
    async fn results_that_nobody_asks_for_make_room() {
        let directory = tempfile::tempdir().unwrap();
        let (registry, transfers) = (Registry::default(), Transfers::default());
        let begin = || transfers.copy_in(root(directory.path()), request("file", 1), registry.open());
        let begun: Vec<u64> = (0..MAX_TRANSFERS).map(|_| begin().unwrap()).collect();
        assert!(matches!(begin(), Err(TransferError::Limit)), "all go on");
        let (mut host, agent) = duplex(64);
        let ended = begun[7];
        let (attached, ()) = tokio::join!(attach(&mut host, ended), registry.attach(Connection::new(agent)));
        attached.unwrap();
        host.shutdown().await.unwrap();
        let next = loop {
            match begin() {
                Err(TransferError::Limit) => tokio::time::sleep(Duration::from_millis(5)).await,
                next => break next.unwrap(),
            }
        };
        assert!(matches!(transfers.wait(ended).await, Err(TransferError::NotFound(_))));
        assert!(next > ended && matches!(begin(), Err(TransferError::Limit)));
    }

    #[tokio::test]
    async fn too_little_and_too_much_leave_nothing() {
        let directory = tempfile::tempdir().unwrap();
        for sent in [5, 7] {
            let result = put(directory.path(), request("file", 6), &vec![0; sent]).await;
            assert!(matches!(result, Err(TransferError::Protocol(_))), "{sent}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn links_and_dots_stay_in_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let inside = outside.path().join("root");
        fs::create_dir_all(inside.join("etc")).unwrap();
        symlink("/etc", inside.join("link")).unwrap();
        symlink(outside.path(), inside.join("out")).unwrap();
        put(&inside, request("/link/file", 1), b"x").await.unwrap();
        assert!(inside.join("etc/file").exists(), "an absolute link starts at the root");
        put(&inside, request("../../file", 1), b"x").await.unwrap();
        assert!(inside.join("file").exists() && !outside.path().join("file").exists());
        assert!(put(&inside, request("/out/file", 1), b"x").await.is_err());
        // A last component that is a link is replaced, not followed.
        symlink(outside.path().join("victim"), inside.join("victim")).unwrap();
        put(&inside, request("/victim", 1), b"x").await.unwrap();
        assert!(!outside.path().join("victim").exists());
    }

    #[tokio::test]
    async fn parents_are_made_on_demand() {
        let directory = tempfile::tempdir().unwrap();
        assert!(put(directory.path(), request("a/b/c", 1), b"x").await.is_err());
        let with_parents = CopyInRequest { make_parents: true, ..request("a/b/c", 1) };
        put(directory.path(), with_parents, b"x").await.unwrap();
        assert!(directory.path().join("a/b/c").is_file());
    }

    #[tokio::test]
    async fn only_regular_files_come_out() {
        let directory = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&directory.path().join("fifo"), Mode::S_IRWXU).unwrap();
        let registry = Registry::default();
        for path in ["fifo", "."] {
            let result = Transfers::default().copy_out(&root(directory.path()), path, registry.open());
            assert!(matches!(result, Err(TransferError::Invalid { .. })), "{path}");
        }
    }
}
