//! The new root: an empty, read-only directory of its own, with nothing in it but what the configuration
//! names.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use caisson_vmm_api::jail::{JailConfig, SHARE, SOCKETS};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{Mode, umask},
        statvfs::{FsFlags, fstatvfs},
    },
    unistd::{chdir, pivot_root},
};

use super::{JailError, Share, step};

/// Where the new root is mounted until it is the root: any directory that exists on every host does.
const SCAFFOLD: &str = "/dev";

/// Makes the new root, and moves into it. The old one is then out of reach for good.
pub(super) fn enter(config: &JailConfig) -> Result<(), JailError> {
    let none = None::<&str>;
    // Mounts on the host still come in below the share; none of ours gets out.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(step("detaching mounts"))?;
    let wanted = [(&config.share, SHARE), (&config.sockets, SOCKETS)];
    // Opened before the scaffold may cover them.
    let mut sources = Vec::new();
    for (path, name) in wanted {
        if let Some(path) = path {
            sources.push((open_directory(path)?, path, name));
        }
    }

    let hard = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("caisson"), SCAFFOLD, Some("tmpfs"), hard, Some("size=4k,nr_inodes=4,mode=0755"))
        .map_err(step("mounting the new root"))?;
    for (source, path, name) in sources {
        let target = PathBuf::from(format!("{SCAFFOLD}{name}"));
        bind(&source, &target).map_err(|source| JailError::Path { path: path.clone(), source })?;
    }
    mount(none, SCAFFOLD, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | hard, Some("mode=0555"))
        .map_err(step("making the new root read-only"))?;

    chdir(SCAFFOLD).map_err(step("entering the new root"))?;
    // With one directory for both, the old root ends up mounted over the new one, from where it is taken
    // away.
    pivot_root(".", ".").map_err(step("changing the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("unmounting the old root"))?;
    chdir("/").map_err(step("entering the new root"))?;
    // Files in the share get the mode that the guest asked for: its own umask was applied there.
    umask(if config.share.is_some() { Mode::empty() } else { Mode::from_bits_truncate(0o077) });
    Ok(())
}

/// The share, once inside.
pub(super) fn open_share(descriptors: OwnedFd) -> Result<Share, JailError> {
    Ok(Share { root: open_directory(Path::new(SHARE))?, descriptors })
}

fn open_directory(path: &Path) -> Result<OwnedFd, JailError> {
    fs::File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|source| JailError::Path { path: path.into(), source })
}

/// Shows a directory, with what is mounted below it, at another place as well.
fn bind(source: &OwnedFd, target: &Path) -> io::Result<()> {
    let none = None::<&str>;
    fs::create_dir(target)?;
    let from = format!("/proc/self/fd/{}", source.as_raw_fd());
    mount(Some(from.as_str()), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    // A bind remount sets all flags anew, so those that the mount has are asked for again: inside a user
    // namespace they may not be taken away.
    let kept = fstatvfs(source)?.flags();
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    for (has, flag) in [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        if kept.contains(has) {
            flags |= flag;
        }
    }
    mount(none, target, none, flags, none)?;
    Ok(())
}
