//! Kernel parameters: only those that belong to a namespace of the container.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;

use rustix::fs::{OFlags, ResolveFlags};

use crate::container::{Error, sys};
use crate::oci::{Linux, NamespaceKind};

/// The namespace that a parameter belongs to.
fn owner(name: &str) -> Option<NamespaceKind> {
    const IPC: [&str; 9] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.msg_next_id",
    ];
    if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        Some(NamespaceKind::Ipc)
    } else if name.starts_with("net.") {
        Some(NamespaceKind::Network)
    } else if matches!(name, "kernel.domainname" | "kernel.hostname") {
        Some(NamespaceKind::Uts)
    } else {
        None
    }
}

/// A dotted name as a path; a name with slashes has dots of its own (interfaces).
fn path(name: &str) -> String {
    if name.contains('/') { format!("sys/{name}") } else { format!("sys/{}", name.replace('.', "/")) }
}

/// Checks that every parameter belongs to a namespace that the container does not share with the guest.
///
/// # Errors
/// The parameter at fault.
pub(crate) fn validate(linux: &Linux) -> Result<(), Error> {
    for name in linux.sysctl.keys() {
        let field = format!("linux.sysctl[{name}]");
        if name.contains('\0') || name.split(['.', '/']).any(str::is_empty) {
            return Err(Error::invalid(field, "is no parameter's name"));
        }
        let dotted = if name.contains('/') { name.replace('/', ".") } else { name.clone() };
        match owner(&dotted) {
            None => return Err(Error::unsupported(field, "belongs to no namespace")),
            Some(kind) if linux.namespace(kind).is_none() => {
                return Err(Error::invalid(field, "needs a namespace of the container's own"));
            }
            Some(NamespaceKind::Uts) if dotted == "kernel.hostname" => {
                return Err(Error::invalid(field, "is set by hostname"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Writes the parameters, by the agent's procfs: no symbolic link, and nothing mounted over it.
pub(super) fn apply(parameters: &BTreeMap<String, String>, procfs: BorrowedFd<'_>) -> Result<(), Error> {
    let plain = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    for (name, value) in parameters {
        let write = || -> io::Result<()> {
            let path = CString::new(path(name)).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            File::from(sys::openat2(procfs, &path, OFlags::WRONLY, plain)?).write_all(value.as_bytes())
        };
        write().map_err(Error::apply(format!("linux.sysctl[{name}]"), format!("write {value:?}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Namespace;

    fn verdict(name: &str, kinds: &[NamespaceKind]) -> Result<(), Error> {
        let namespaces = kinds.iter().map(|&kind| Namespace { kind, path: None }).collect();
        let sysctl = BTreeMap::from([(name.to_owned(), "1".to_owned())]);
        validate(&Linux { namespaces, sysctl, ..Linux::default() })
    }

    #[test]
    fn only_what_belongs_to_the_container() {
        use NamespaceKind::{Ipc, Network, Uts};
        assert!(verdict("net.ipv4.ip_forward", &[Network]).is_ok());
        assert!(verdict("net/ipv4/conf/eth0.1/forwarding", &[Network]).is_ok());
        assert!(verdict("net.ipv4.ip_forward", &[Ipc]).is_err());
        assert!(verdict("kernel.shmmax", &[Ipc]).is_ok());
        assert!(verdict("kernel.domainname", &[Uts]).is_ok());
        assert!(verdict("kernel.hostname", &[Uts]).is_err());
        for guest in
            ["kernel.panic", "vm.overcommit_memory", "fs.file-max", "net..x", "net/../kernel/panic", ""]
        {
            assert!(verdict(guest, &[Ipc, Uts]).is_err(), "{guest}");
        }
    }

    #[test]
    fn names_with_slashes_keep_their_dots() {
        assert_eq!(path("net.ipv4.ip_forward"), "sys/net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding"), "sys/net/ipv4/conf/eth0.1/forwarding");
    }
}
