//! Entering and making namespaces.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};

use super::Agent;
use super::wire::{ExecSetup, Word};
use crate::container::{Error, sys};
use crate::oci::{IdMapping, Linux, NamespaceKind};

fn flag(kind: NamespaceKind) -> CloneFlags {
    match kind {
        NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
        NamespaceKind::Network => CloneFlags::CLONE_NEWNET,
        NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
        NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
        NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
        NamespaceKind::User => CloneFlags::CLONE_NEWUSER,
        NamespaceKind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        // The bit of CSIGNAL in clone(2), which nix has no name for.
        NamespaceKind::Time => CloneFlags::from_bits_retain(0x80),
    }
}

/// Joins the namespaces that are given by path and makes the others. A PID or time namespace is the next child's.
pub(super) fn enter(agent: &mut Agent, linux: &Linux) -> Result<(), Error> {
    let mut joined: Vec<(String, CloneFlags, OwnedFd)> = Vec::new();
    for (index, namespace) in linux.namespaces.iter().enumerate() {
        if let Some(path) = &namespace.path {
            let field = format!("linux.namespaces[{index}].path");
            let file = File::open(path).map_err(Error::apply(&field, "open the namespace"))?;
            joined.push((field, flag(namespace.kind), file.into()));
        }
    }
    // The user namespace last: the others may belong to the agent's.
    joined.sort_by_key(|&(_, flag, _)| flag == CloneFlags::CLONE_NEWUSER);
    for (field, flag, namespace) in &joined {
        setns(namespace.as_fd(), *flag)
            .map_err(|errno| Error::apply(field, "join the namespace")(errno.into()))?;
    }
    let made = linux.namespaces.iter().filter(|namespace| namespace.path.is_none());
    let flags = made.fold(CloneFlags::empty(), |flags, namespace| flags | flag(namespace.kind));
    unshare(flags).map_err(|errno| Error::apply("linux.namespaces", "make the namespaces")(errno.into()))?;
    let user = linux.creates(NamespaceKind::User);
    if user || linux.creates(NamespaceKind::Time) {
        agent.answer(Word::Unshared(()), None)?;
        agent.proceed()?;
    }
    if linux.namespace(NamespaceKind::User).is_some() {
        become_root()?;
    }
    Ok(())
}

/// Joins the namespaces of a running container's first process.
pub(super) fn join(setup: &ExecSetup) -> Result<(), Error> {
    let failed = || Error::system("join the container's namespaces");
    let process = sys::pidfd_open(setup.init).map_err(failed())?;
    // All at once, so that the order does not matter. Joining the user or time namespace one is in is an error.
    let mut flags = [
        NamespaceKind::Pid,
        NamespaceKind::Network,
        NamespaceKind::Mount,
        NamespaceKind::Ipc,
        NamespaceKind::Uts,
        NamespaceKind::Cgroup,
    ]
    .into_iter()
    .fold(CloneFlags::empty(), |flags, kind| flags | flag(kind));
    if setup.user_namespace {
        flags |= flag(NamespaceKind::User);
    }
    if setup.time_namespace {
        flags |= flag(NamespaceKind::Time);
    }
    setns(process.as_fd(), flags).map_err(|errno| failed()(errno.into()))?;
    if setup.user_namespace { become_root() } else { Ok(()) }
}

/// How a process's user namespace maps ids, by its uid_map or gid_map; empty when that can not be told.
pub(super) fn id_map(pid: u32, file: &str) -> Vec<IdMapping> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let lines = text.lines().map(|line| line.split_whitespace().map(str::parse));
    let mappings = lines.filter_map(|mut numbers| {
        let mut next = || numbers.next()?.ok();
        Some(IdMapping { container_id: next()?, host_id: next()?, size: next()? })
    });
    mappings.collect()
}

/// Becomes root of the user namespace just entered, so that what is made belongs to it. A namespace that does not map
/// 0 can do without.
fn become_root() -> Result<(), Error> {
    let failed = || Error::system("become root of the user namespace");
    let root = (nix::unistd::Gid::from_raw(0), nix::unistd::Uid::from_raw(0));
    nix::unistd::setgroups(&[]).map_err(|errno| failed()(errno.into()))?;
    nix::unistd::setresgid(root.0, root.0, root.0).map_err(|errno| failed()(errno.into()))?;
    nix::unistd::setresuid(root.1, root.1, root.1).map_err(|errno| failed()(errno.into()))?;
    // Credentials changed; that made the process readable for others in its namespace.
    nix::sys::prctl::set_dumpable(false).map_err(|errno| failed()(errno.into()))
}
