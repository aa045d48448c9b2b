//! The specification's mounts.
//!
//! A mount is made detached and then moved onto its target, both by descriptor: what the container's root holds, or
//! another container changes meanwhile, does not matter. Sources of bind mounts are opened in the agent's view.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::stat::fstat;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use rustix::mount::MountAttrFlags;

use super::Blueprint;
use super::root::{Root, c_path};
use crate::container::sys::{FsContext, MountAttr};
use crate::container::{Error, process, sys};
use crate::oci::{IdMapping, Mount, NamespaceKind};

/// What a mount is made of, read off its options.
#[derive(Debug, Default)]
struct Plan {
    bind: bool,
    recursive: bool,
    attr: MountAttr,
    recursive_attr: MountAttr,
    propagation: Vec<(u64, bool)>,
    idmap: Option<bool>,
    /// File system parameters, with or without a value.
    data: Vec<(String, Option<String>)>,
}

/// A propagation type as (MS_* flag, recursive).
pub(crate) fn propagation(name: &str) -> Option<(u64, bool)> {
    let (name, recursive) = match name.strip_prefix('r') {
        Some(rest) => (rest, true),
        None => (name, false),
    };
    let flag = match name {
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag, recursive))
}

/// A mount attribute as (to be set, to be cleared).
fn attribute(name: &str) -> Option<(u64, u64)> {
    const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
    Some(match name {
        "ro" => (libc::MOUNT_ATTR_RDONLY, 0),
        "rw" => (0, libc::MOUNT_ATTR_RDONLY),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, 0),
        "suid" => (0, libc::MOUNT_ATTR_NOSUID),
        "nodev" => (libc::MOUNT_ATTR_NODEV, 0),
        "dev" => (0, libc::MOUNT_ATTR_NODEV),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, 0),
        "exec" => (0, libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, 0),
        "diratime" => (0, libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, libc::MOUNT_ATTR_NOSYMFOLLOW),
        // The three are one field, whose zero is relatime.
        "noatime" => (libc::MOUNT_ATTR_NOATIME, ATIME),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, ATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, ATIME),
        _ => return None,
    })
}

fn merge(attr: &mut MountAttr, (set, clear): (u64, u64)) {
    attr.set = attr.set & !clear | set;
    attr.clear = attr.clear & !set | clear;
}

fn plan(field: &str, mount: &Mount) -> Result<Plan, Error> {
    let field = format!("{field}.options");
    let mut plan = Plan { bind: mount.kind.as_deref() == Some("bind"), ..Plan::default() };
    for option in
        mount.options.iter().flat_map(|option| option.split(',')).filter(|option| !option.is_empty())
    {
        match option {
            "bind" => plan.bind = true,
            "rbind" => (plan.bind, plan.recursive) = (true, true),
            "idmap" => plan.idmap = Some(false),
            "ridmap" => plan.idmap = Some(true),
            "defaults" | "async" | "nomand" | "noiversion" | "nolazytime" | "loud" | "silent" => {}
            "remount" | "tmpcopyup" | "mand" | "iversion" => {
                return Err(Error::unsupported(field, format!("{option:?} is not available")));
            }
            _ => {
                if let Some(propagation) = propagation(option) {
                    plan.propagation.push(propagation);
                } else if let Some(change) = attribute(option) {
                    merge(&mut plan.attr, change);
                } else if let Some(change) = option.strip_prefix('r').and_then(attribute) {
                    merge(&mut plan.recursive_attr, change);
                } else {
                    let (key, value) = match option.split_once('=') {
                        Some((key, value)) => (key, Some(value.to_owned())),
                        None => (option, None),
                    };
                    plan.data.push((key.to_owned(), value));
                }
            }
        }
    }
    if plan.bind
        && let Some((key, _)) = plan.data.first()
    {
        return Err(Error::invalid(field, format!("{key:?} is unknown for a bind mount")));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        plan.idmap.get_or_insert(false);
    }
    if plan.idmap.is_some() && !plan.bind {
        return Err(Error::unsupported(field, "only bind mounts are id-mapped"));
    }
    Ok(plan)
}

/// What may be mounted over in procfs: files that LXCFS and the like stand in for.
const PROC_FILES: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Checks a mount as far as that goes without making it.
///
/// # Errors
/// The member at fault.
pub(crate) fn validate(field: &str, mount: &Mount) -> Result<(), Error> {
    let at = format!("{field}.destination");
    let destination = &mount.destination;
    if !destination.is_absolute() || destination.file_name().is_none() {
        return Err(Error::invalid(at, format!("{destination:?} is no absolute path below the root")));
    }
    if destination.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(Error::invalid(at, "has a null byte"));
    }
    let kind = mount.kind.as_deref().unwrap_or_default();
    let covered = PROC_FILES.iter().any(|file| destination == Path::new(file));
    if destination.starts_with("/proc") && !covered && (destination != Path::new("/proc") || kind != "proc") {
        return Err(Error::invalid(at, "procfs must not be mounted over"));
    }
    let plan = plan(field, mount)?;
    if plan.bind {
        match &mount.source {
            Some(source) if source.is_absolute() => {}
            _ => return Err(Error::invalid(format!("{field}.source"), "is not absolute")),
        }
    } else if kind.is_empty() {
        return Err(Error::invalid(format!("{field}.type"), "is required"));
    }
    Ok(())
}

/// Opens what has to come from the agent's view.
pub(super) fn open_source(index: usize, setup: &Blueprint) -> Result<Option<OwnedFd>, Error> {
    let Some(mount) = setup.spec.mounts.get(index) else { return Ok(None) };
    let linux = setup.spec.linux();
    let field = format!("mounts[{index}]");
    let plan = plan(&field, mount)?;
    let failed = || Error::apply(format!("{field}.source"), "open the source");
    if matches!(mount.kind.as_deref(), Some("cgroup" | "cgroup2")) && !plan.bind {
        // Without a namespace of its own, cgroup2 would show all groups.
        if linux.creates(NamespaceKind::Cgroup) {
            return Ok(None);
        }
        let path = c_path(&setup.cgroup).map_err(failed())?;
        return sys::open_tree(None, &path, sys::OPEN_TREE_CLONE).map(Some).map_err(failed());
    }
    if !plan.bind {
        return Ok(None);
    }
    let path = c_path(mount.source.as_deref().unwrap_or(Path::new(""))).map_err(failed())?;
    let flags = if plan.recursive { sys::OPEN_TREE_CLONE | sys::AT_RECURSIVE } else { sys::OPEN_TREE_CLONE };
    let tree = sys::open_tree(None, &path, flags).map_err(failed())?;
    if let Some(recursive) = plan.idmap {
        let (uids, gids) = if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
            (&linux.uid_mappings, &linux.gid_mappings)
        } else {
            (&mount.uid_mappings, &mount.gid_mappings)
        };
        let failed = || Error::apply(format!("{field}.uidMappings"), "map the ids of the mount");
        let namespace = id_namespace(uids, gids).map_err(failed())?;
        let attr =
            MountAttr { userns: Some(namespace.as_raw_fd()), ..MountAttr::set(libc::MOUNT_ATTR_IDMAP) };
        sys::mount_setattr(tree.as_fd(), recursive, &attr).map_err(failed())?;
    }
    Ok(Some(tree))
}

/// A user namespace that has nothing but maps.
fn id_namespace(uids: &[IdMapping], gids: &[IdMapping]) -> io::Result<OwnedFd> {
    let (ready, tell) = io::pipe()?;
    // SAFETY: the helper has one thread.
    let child = match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            drop(ready);
            let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).is_ok();
            let _ = io::Write::write_all(&mut &tell, &[u8::from(made)]);
            loop {
                nix::unistd::pause();
            }
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    drop(tell);
    let namespace = (|| {
        let mut made = [0];
        io::Read::read_exact(&mut &ready, &mut made)?;
        if made == [0] {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        fs::write(format!("/proc/{child}/uid_map"), process::id_map(uids))?;
        fs::write(format!("/proc/{child}/gid_map"), process::id_map(gids))?;
        fs::File::open(format!("/proc/{child}/ns/user")).map(OwnedFd::from)
    })();
    // Nobody else reaps the helper's child.
    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
    let _ = nix::sys::wait::waitpid(child, None);
    namespace
}

/// Makes a mount inside the root.
pub(super) fn make(index: usize, mount: &Mount, source: Option<&OwnedFd>, root: &Root) -> Result<(), Error> {
    let field = format!("mounts[{index}]");
    let plan = plan(&field, mount)?;
    let made;
    let tree = match source {
        Some(tree) => tree,
        None => {
            made = file_system(mount, &plan).map_err(Error::apply(
                &field,
                format!("mount {}", mount.kind.as_deref().unwrap_or_default()),
            ))?;
            &made
        }
    };
    let failed = |action| Error::apply(format!("{field}.options"), action);
    // Nothing that happens in the container's mounts shows in the agent's, unless asked for.
    if plan.propagation.is_empty() && source.is_some() {
        sys::mount_setattr(tree.as_fd(), true, &MountAttr::propagation(libc::MS_SLAVE))
            .map_err(failed("make the mount a slave"))?;
    }
    for &(flag, recursive) in &plan.propagation {
        // A peer stays one when it is to be shared; another type follows.
        sys::mount_setattr(tree.as_fd(), recursive, &MountAttr::propagation(flag))
            .map_err(failed("set the propagation"))?;
    }
    sys::mount_setattr(tree.as_fd(), false, &plan.attr).map_err(failed("set the mount's attributes"))?;
    sys::mount_setattr(tree.as_fd(), true, &plan.recursive_attr)
        .map_err(failed("set the mounts' attributes recursively"))?;
    let target = target(&field, mount, tree, root)?;
    sys::move_mount(tree.as_fd(), target.as_fd())
        .map_err(Error::apply(format!("{field}.destination"), "move the mount into place"))
}

fn target(field: &str, mount: &Mount, tree: &OwnedFd, root: &Root) -> Result<OwnedFd, Error> {
    let field = format!("{field}.destination");
    let failed = || Error::apply(&field, "resolve or make the mount point");
    let destination = &mount.destination;
    let is_directory =
        fstat(tree).map_err(io::Error::from).map_err(failed())?.st_mode & libc::S_IFMT == libc::S_IFDIR;
    let target = if is_directory { root.directory(destination) } else { root.file(destination) };
    let target = target.map_err(failed())?;
    // A link in the image would send the mount elsewhere, and what is masked there would stay bare.
    if destination == Path::new("/proc") || destination == Path::new("/sys") {
        root.resolve_plain(destination).map_err(failed())?;
    }
    // The same by a detour: a link that leads into procfs.
    let on_procfs = fstatfs(&target).is_ok_and(|fs| fs.filesystem_type() == PROC_SUPER_MAGIC);
    if on_procfs && !PROC_FILES.iter().any(|file| destination == Path::new(file)) {
        return Err(Error::invalid(field, "leads into procfs, which must not be mounted over"));
    }
    Ok(target)
}

/// A new file system, mounted but detached.
fn file_system(mount: &Mount, plan: &Plan) -> io::Result<OwnedFd> {
    let kind = match mount.kind.as_deref().unwrap_or_default() {
        "cgroup" => "cgroup2",
        other => other,
    };
    let string = |text: &str| CString::new(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let context = FsContext::open(&string(kind)?)?;
    if let Some(source) = &mount.source {
        context.set(c"source", Some(&c_path(source)?))?;
    }
    for (key, value) in &plan.data {
        let value = value.as_deref().map(string).transpose()?;
        context.set(&string(key)?, value.as_deref())?;
    }
    context.mount(MountAttrFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(options: &[&str]) -> Mount {
        Mount {
            destination: "/x".into(),
            source: Some("/y".into()),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn every_option_of_the_specification_is_known() {
        let spec = [
            "async",
            "atime",
            "bind",
            "defaults",
            "dev",
            "diratime",
            "exec",
            "loud",
            "noatime",
            "nodev",
            "nodiratime",
            "noexec",
            "noiversion",
            "nolazytime",
            "nomand",
            "norelatime",
            "nostrictatime",
            "nosuid",
            "nosymfollow",
            "private",
            "ratime",
            "rbind",
            "rdev",
            "rdiratime",
            "relatime",
            "rexec",
            "rnoatime",
            "rnodiratime",
            "rnoexec",
            "rnorelatime",
            "rnostrictatime",
            "rnosuid",
            "rnosymfollow",
            "ro",
            "rprivate",
            "rrelatime",
            "rro",
            "rrw",
            "rshared",
            "rslave",
            "rstrictatime",
            "rsuid",
            "rsymfollow",
            "runbindable",
            "rw",
            "shared",
            "silent",
            "slave",
            "strictatime",
            "suid",
            "symfollow",
            "unbindable",
            "idmap",
            "ridmap",
        ];
        let plan = plan("m", &options(&[&["bind"], &spec[..]].concat())).unwrap();
        assert!(plan.data.is_empty());
    }

    #[test]
    fn later_options_win() {
        let plan =
            plan("m", &options(&["bind", "ro", "rw", "rro", "nosuid", "noatime", "relatime"])).unwrap();
        assert_eq!(plan.attr.set, libc::MOUNT_ATTR_NOSUID);
        assert_ne!(plan.attr.clear & libc::MOUNT_ATTR_RDONLY, 0);
        assert_eq!(plan.recursive_attr.set, libc::MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn procfs_is_not_mounted_over() {
        let to = |destination: &str| Mount { destination: destination.into(), ..options(&["bind"]) };
        assert!(validate("m", &to("/proc/self")).is_err());
        assert!(validate("m", &to("/proc")).is_err());
        assert!(validate("m", &to("/proc/uptime")).is_ok());
        assert!(validate("m", &to("/")).is_err());
        assert!(validate("m", &to("/process")).is_ok());
    }
}
