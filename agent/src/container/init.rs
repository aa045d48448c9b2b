//! The helper that becomes a container's process.
//!
//! The agent has threads, and a process with threads can neither join a user or time namespace nor do much after a
//! fork. So it executes itself anew under the name [`ARGV0`]; that process has one thread, and goes through it all:
//!
//! 1. with the agent's view: opens what the container shall see of it (root, bind mounts, namespaces) as descriptors;
//! 2. enters the container's namespaces, and forks the process proper as the agent's child, which alone is in the new
//!    PID namespace;
//! 3. builds the root out of the descriptors and of paths resolved inside it ([`root`]), never by the container's
//!    `/proc`, and turns into it;
//! 4. says that it is ready, waits for the order to start, drops its privileges, executes the program.
//!
//! From its first instruction it can not be traced or read by others in its namespaces (it is not dumpable), and it
//! holds no descriptor beyond the standard streams that is not close-on-exec.
//!
//! - [`wire`]: what is said between the two.
//! - [`namespaces`]: entering and making namespaces.
//! - [`rootfs`], [`mounts`], [`devices`]: the container's file systems.
//! - [`console`]: its terminal.
//! - [`sysctl`]: its kernel parameters.
//! - [`identity`]: users, capabilities and what else a program inherits; [`hooks`]: what runs just before it.

mod console;
mod devices;
mod hooks;
pub(super) mod identity;
pub(super) mod mounts;
mod namespaces;
mod root;
mod rootfs;
pub(super) mod sysctl;
pub(super) mod wire;

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use self::hooks::Hooks;
use self::identity::Identity;
use self::root::Root;
pub(crate) use self::rootfs::{change_root, empty_directory};
use self::wire::{Answer, ContainerSetup, ExecSetup, Order, Process, Setup, Word};
use super::error::Failure;
use super::seccomp::Filter;
use super::{Error, sys};
use crate::oci::{Document, NamespaceKind, Spec};

/// The name under which the agent executes itself as a helper.
pub const ARGV0: &str = "caisson-init";

/// Does the helper's work if this process is one, and then is the exit code of `main`. To be called first in `main`,
/// while there is one thread.
pub fn run_if_helper() -> Option<c_int> {
    if std::env::args_os().next()? != ARGV0 {
        return None;
    }
    // SAFETY: whoever executes the helper puts its socket there, and this is the only place to take it.
    let socket = unsafe { OwnedFd::from_raw_fd(wire::SOCKET) };
    let mut agent = Agent(UnixStream::from(socket));
    match work(&mut agent) {
        Ok(()) => Some(libc::EXIT_SUCCESS),
        Err(error) => {
            // When the agent is gone, so is whoever would want to know.
            let _ = agent.answer(Word::Failed(Failure::from(error)), None);
            Some(libc::EXIT_FAILURE)
        }
    }
}

/// Returns in the parent after the fork, or on an error.
fn work(agent: &mut Agent) -> Result<(), Error> {
    nix::sys::prctl::set_dumpable(false).map_err(|errno| Error::system("become undumpable")(errno.into()))?;
    sys::close_from(4).map_err(Error::system("close inherited descriptors"))?;
    nix::fcntl::fcntl(&agent.0, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .map_err(|errno| Error::system("mark the socket")(errno.into()))?;
    let setup: Setup = wire::receive(&mut agent.0).map_err(Error::system("read the set-up"))?;
    match setup.process.ok_or(Error::HelperGone)? {
        Process::First(setup) => container(agent, &Blueprint::of(setup)?),
        Process::Exec(setup) => exec(agent, setup),
    }
}

/// What a container is made from.
struct Blueprint {
    spec: Spec,
    cgroup: PathBuf,
    filter: Option<Filter>,
}

impl Blueprint {
    fn of(setup: ContainerSetup) -> Result<Blueprint, Error> {
        let (mut spec, _) = Document::spec(setup.spec)?.into_parts();
        spec.root.get_or_insert_default().path = setup.rootfs.into();
        Ok(Blueprint { spec, cgroup: setup.cgroup.into(), filter: setup.filter })
    }
}

fn container(agent: &mut Agent, setup: &Blueprint) -> Result<(), Error> {
    let linux = setup.spec.linux();
    let process = setup.spec.process.as_ref().ok_or_else(|| Error::invalid("process", "is required"))?;
    // The agent's procfs: the container's own is never trusted.
    let procfs = open_path("/proc")?;
    let parts = rootfs::Parts::open(setup)?;
    if linux.creates(NamespaceKind::User) {
        console::map_streams(process, &linux.uid_mappings, &linux.gid_mappings);
    }
    namespaces::enter(agent, &linux)?;
    if !fork(agent)? {
        return Ok(());
    }
    new_session()?;
    set_names(setup)?;
    let root = rootfs::build(setup, &parts)?;
    drop(parts);
    sysctl::apply(&linux.sysctl, procfs.as_fd())?;
    let terminal = if process.terminal { Some(console::open(&root, process)?) } else { None };
    console::own_streams(&root, process)?;
    if let Some(terminal) = &terminal {
        console::mount(&root, terminal)?;
    }
    rootfs::enter(root, setup, procfs.as_fd())?;
    drop(procfs);
    let identity = Identity::new(process, identity::personality(&linux)?, setup.filter.as_ref())?;
    finish(agent, identity, terminal, Some(setup))
}

fn exec(agent: &mut Agent, mut setup: ExecSetup) -> Result<(), Error> {
    let (process, _) = Document::process(std::mem::take(&mut setup.process))?.into_parts();
    let process = &process;
    if setup.user_namespace {
        let [uids, gids] = ["uid_map", "gid_map"].map(|file| namespaces::id_map(setup.init, file));
        console::map_streams(process, &uids, &gids);
    }
    namespaces::join(&setup)?;
    if !fork(agent)? {
        return Ok(());
    }
    new_session()?;
    let root = Root::new(open_path("/")?);
    let terminal = if process.terminal { Some(console::open(&root, process)?) } else { None };
    console::own_streams(&root, process)?;
    drop(root);
    let identity = Identity::new(process, setup.personality, setup.filter.as_ref())?;
    finish(agent, identity, terminal, None)
}

/// Waits for the order and executes the program; before it, the hooks of the container whose first process this is.
fn finish(
    agent: &mut Agent,
    identity: Identity<'_>,
    terminal: Option<console::Terminal>,
    container: Option<&Blueprint>,
) -> Result<(), Error> {
    let master = match terminal {
        Some(terminal) => Some(terminal.take_over()?),
        None => None,
    };
    identity.check_program()?;
    agent.answer(Word::Ready(()), master.as_ref().map(AsFd::as_fd))?;
    drop(master);
    if agent.order()? != Order::START {
        return Err(Error::HelperGone);
    }
    // Nothing but the streams and the socket is open from here on, so no path leads through a descriptor.
    sys::close_from(4).map_err(Error::system("close descriptors"))?;
    let hooks = container.map_or(Ok(None), Hooks::new)?;
    identity.assume()?;
    if let Some(hooks) = hooks {
        hooks.run()?;
    }
    Err(identity.execute())
}

/// Forks the process proper as the agent's child. Whether this is it.
fn fork(agent: &mut Agent) -> Result<bool, Error> {
    // SAFETY: the helper never starts a thread.
    let pid = unsafe { sys::fork_sibling() }.map_err(Error::system("fork"))?;
    if pid == 0 {
        agent.proceed()?;
        return Ok(true);
    }
    let pid = u32::try_from(pid).map_err(|_| Error::HelperGone)?;
    agent.answer(Word::Forked(pid), None)?;
    Ok(false)
}

fn new_session() -> Result<(), Error> {
    nix::unistd::setsid().map_err(|errno| Error::system("make a session")(errno.into()))?;
    sys::new_session_keyring().map_err(Error::system("make a session keyring"))
}

fn set_names(setup: &Blueprint) -> Result<(), Error> {
    let spec = &setup.spec;
    if spec.linux().namespace(NamespaceKind::Uts).is_none() {
        return Ok(());
    }
    if !spec.hostname.is_empty() {
        nix::unistd::sethostname(&spec.hostname)
            .map_err(|errno| Error::apply("hostname", "set the host name")(errno.into()))?;
    }
    if !spec.domainname.is_empty() {
        let name = spec.domainname.as_bytes();
        rustix::system::setdomainname(name)
            .map_err(|errno| Error::apply("domainname", "set the domain name")(errno.into()))?;
    }
    Ok(())
}

fn open_path(path: &str) -> Result<OwnedFd, Error> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
    options.open(path).map(OwnedFd::from).map_err(Error::system(format!("open {path}")))
}

/// The helper's end of the conversation.
struct Agent(UnixStream);

impl Agent {
    fn answer(&mut self, word: Word, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let failed = || Error::system("answer the agent");
        let fds: Vec<_> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &control[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&[0])], control, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|errno| failed()(errno.into()))?;
        wire::send(&mut self.0, &Answer { word: Some(word) }).map_err(failed())
    }

    fn order(&mut self) -> Result<Order, Error> {
        wire::receive(&mut self.0).map_err(Error::system("wait for the agent"))
    }

    fn proceed(&mut self) -> Result<(), Error> {
        match self.order()? {
            Order::CONTINUE => Ok(()),
            _ => Err(Error::system("wait for the agent")(io::ErrorKind::InvalidData.into())),
        }
    }
}
