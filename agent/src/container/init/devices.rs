//! A container's `/dev`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fstatat, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use super::root::{Root, c_path};
use crate::container::{Error, sys};
use crate::oci::{Device, Linux, NamespaceKind};

/// The devices that the specification puts into every container: name, major, minor.
const DEFAULTS: [(&str, i64, i64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// In a user namespace no node can be made: the agent's own are bound then. By path.
pub(super) struct Nodes(Option<Vec<OwnedFd>>);

/// All devices, the default ones first.
fn all(linux: &Linux) -> Vec<Device> {
    let device = |(name, major, minor): &(&str, i64, i64)| Device {
        path: format!("/dev/{name}").into(),
        kind: "c".to_owned(),
        major: *major,
        minor: *minor,
        file_mode: Some(0o666),
        uid: None,
        gid: None,
    };
    DEFAULTS.iter().map(device).chain(linux.devices.iter().cloned()).collect()
}

fn field(index: usize) -> String {
    match index.checked_sub(DEFAULTS.len()) {
        Some(index) => format!("linux.devices[{index}]"),
        None => "linux.devices".to_owned(),
    }
}

impl Nodes {
    pub(super) fn open(linux: &Linux) -> Result<Nodes, Error> {
        if linux.namespace(NamespaceKind::User).is_none() {
            return Ok(Nodes(None));
        }
        let open = |(index, device): (usize, Device)| {
            c_path(&device.path)
                .and_then(|path| sys::open_tree(None, &path, sys::OPEN_TREE_CLONE))
                .map_err(Error::apply(field(index), "open the guest's device of this path"))
        };
        all(linux).into_iter().enumerate().map(open).collect::<Result<_, _>>().map(|nodes| Nodes(Some(nodes)))
    }
}

/// Fills a new `/dev`.
pub(super) fn populate(linux: &Linux, nodes: &Nodes, root: &Root) -> Result<(), Error> {
    for (index, device) in all(linux).iter().enumerate() {
        add(index, device, nodes, root)?;
    }
    for (path, target) in LINKS {
        let failed = || Error::apply("linux.devices", format!("link {path}"));
        let (parent, name) = root.parent(Path::new(path)).map_err(failed())?;
        match symlinkat(target, &parent, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed()(errno.into())),
        }
    }
    Ok(())
}

/// Adds what the specification lists to a `/dev` that is filled already.
pub(super) fn add_listed(linux: &Linux, nodes: &Nodes, root: &Root) -> Result<(), Error> {
    let listed = all(linux);
    listed
        .iter()
        .enumerate()
        .skip(DEFAULTS.len())
        .try_for_each(|(index, device)| add(index, device, nodes, root))
}

fn add(index: usize, device: &Device, nodes: &Nodes, root: &Root) -> Result<(), Error> {
    let failed = || Error::apply(field(index), format!("make {}", device.path.display()));
    match nodes.0.as_ref().map(|nodes| nodes.get(index)) {
        Some(Some(node)) => {
            let target = root.file(&device.path).map_err(failed())?;
            sys::move_mount(node.as_fd(), target.as_fd()).map_err(failed())
        }
        _ => make(device, root).map_err(failed()),
    }
}

fn make(device: &Device, root: &Root) -> io::Result<()> {
    let kind = match device.kind.as_str() {
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        _ => SFlag::S_IFCHR,
    };
    let number =
        |number: i64| u64::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let number = makedev(number(device.major)?, number(device.minor)?);
    let mode = Mode::from_bits_truncate(device.file_mode.unwrap_or(0o666) & 0o7777);
    let (parent, name) = root.parent(&device.path)?;
    // The agent's mask must not take what the specification gives.
    let mask = nix::sys::stat::umask(Mode::empty());
    let made = mknodat(&parent, name, kind, mode, number);
    nix::sys::stat::umask(mask);
    match made {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            let there = fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            let same = there.st_mode & libc::S_IFMT == kind.bits()
                && (device.kind == "p" || there.st_rdev == number);
            if !same {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
        }
        Err(errno) => return Err(errno.into()),
    }
    let (uid, gid) = (device.uid.unwrap_or(0), device.gid.unwrap_or(0));
    fchownat(
        &parent,
        name,
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    Ok(())
}
