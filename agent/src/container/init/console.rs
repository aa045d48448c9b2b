//! A process's terminal and standard streams.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::stat::{fstat, makedev};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fchown};
use rustix::fs::OFlags;

use super::root::Root;
use crate::container::{Error, sys};
use crate::oci::{IdMapping, Process};

/// A pseudo-terminal of the container's devpts.
pub(super) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

/// Makes a terminal. The slave is opened through the master, without a look at any path.
pub(super) fn open(root: &Root, process: &Process) -> Result<Terminal, Error> {
    const DEVPTS_SUPER_MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0x1cd1);
    let failed = || Error::apply("process.terminal", "open a terminal in the container's /dev/pts");
    let master = root.open(Path::new("/dev/pts/ptmx"), OFlags::RDWR | OFlags::NOCTTY).map_err(failed())?;
    let stat = fstat(&master).map_err(|errno| failed()(errno.into()))?;
    let real = fstatfs(&master).is_ok_and(|fs| fs.filesystem_type() == DEVPTS_SUPER_MAGIC);
    if !real || stat.st_rdev != makedev(5, 2) {
        return Err(Error::invalid("process.terminal", "the container's /dev/pts/ptmx is not the real one"));
    }
    let slave = sys::open_terminal_peer(master.as_fd()).map_err(failed())?;
    if let Some(size) = process.console_size {
        // Checked to fit.
        let fit = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        sys::resize(slave.as_fd(), fit(size.width), fit(size.height))
            .map_err(Error::apply("process.consoleSize", "set the size"))?;
    }
    fchown(&slave, Some(Uid::from_raw(process.user.uid)), None)
        .map_err(|errno| Error::apply("process.user", "give the terminal to the user")(errno.into()))?;
    Ok(Terminal { master, slave })
}

/// Puts the terminal at `/dev/console`.
pub(super) fn mount(root: &Root, terminal: &Terminal) -> Result<(), Error> {
    let failed = || Error::apply("process.terminal", "mount /dev/console");
    let path = Path::new("/dev/console");
    root.file(path).map_err(failed())?;
    // A link in a /dev that was not made for this container would send the terminal over something else.
    let target = root.resolve_plain(path).map_err(failed())?;
    let tree = sys::open_tree(Some(terminal.slave.as_fd()), c"", sys::OPEN_TREE_CLONE).map_err(failed())?;
    sys::move_mount(tree.as_fd(), target.as_fd()).map_err(failed())
}

impl Terminal {
    /// Makes it this process's controlling terminal and standard streams; returns the master.
    pub(super) fn take_over(self) -> Result<OwnedFd, Error> {
        let failed = || Error::apply("process.terminal", "make it the controlling terminal");
        rustix::process::ioctl_tiocsctty(&self.slave).map_err(|errno| failed()(errno.into()))?;
        for stream in 0..=2 {
            replace_stream(self.slave.as_fd(), stream).map_err(|errno| failed()(errno.into()))?;
        }
        Ok(self.master)
    }
}

fn replace_stream(by: BorrowedFd<'_>, stream: i32) -> nix::Result<()> {
    match stream {
        0 => dup2_stdin(by),
        1 => dup2_stdout(by),
        _ => dup2_stderr(by),
    }
}

/// Gives pipes to the user that a user namespace makes of the process's, as long as this process may: inside the
/// namespace they are nobody's.
pub(super) fn map_streams(process: &Process, uids: &[IdMapping], gids: &[IdMapping]) {
    let outside = |maps: &[IdMapping], id: u32| {
        maps.iter().find_map(|map| {
            let offset = id.checked_sub(map.container_id).filter(|offset| *offset < map.size)?;
            map.host_id.checked_add(offset)
        })
    };
    let Some(uid) = outside(uids, process.user.uid) else { return };
    let gid = outside(gids, process.user.gid).map(Gid::from_raw);
    for stream in 0..=2 {
        // SAFETY: the helper is started with all three open.
        let fd = unsafe { BorrowedFd::borrow_raw(stream) };
        if fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO) {
            // The stream works all the same.
            let _ = fchown(fd, Some(Uid::from_raw(uid)), gid);
        }
    }
}

/// Gives the streams to the user, so that it can open `/dev/stdout` anew, and exchanges the guest's null device, which
/// is not the container's to change the mode of, for the container's own.
pub(super) fn own_streams(root: &Root, process: &Process) -> Result<(), Error> {
    let failed = || Error::system("set the standard streams");
    let null_device = makedev(1, 3);
    for stream in 0..=2 {
        // SAFETY: the helper is started with all three open.
        let fd = unsafe { BorrowedFd::borrow_raw(stream) };
        let stat = fstat(fd).map_err(|errno| failed()(errno.into()))?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == null_device {
            let own = match root.open(Path::new("/dev/null"), OFlags::RDWR) {
                Ok(own) => own,
                // Without a /dev the stream stays what it is.
                Err(_) => continue,
            };
            if fstat(&own)
                .is_ok_and(|own| own.st_mode & libc::S_IFMT == libc::S_IFCHR && own.st_rdev == null_device)
            {
                replace_stream(own.as_fd(), stream).map_err(|errno| failed()(errno.into()))?;
            }
        } else if stat.st_uid != process.user.uid {
            // A file system or a user namespace may not let go of it; the stream works all the same.
            let _ = fchown(fd, Some(Uid::from_raw(process.user.uid)), Some(Gid::from_raw(process.user.gid)));
        }
    }
    Ok(())
}
