//! Locks between processes.

use std::{fs::File, os::fd::AsRawFd, path::Path};

use anyhow::{Result, ensure};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, Flock, FlockArg, fcntl},
    libc,
};

use crate::{Case, process::Other, refused};

pub(crate) const CASES: &[Case] =
    &[("posix_locks", posix), ("posix_locks_wait", posix_waits), ("ofd_locks", ofd), ("flock", flock)];

fn open(dir: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(false).open(dir.join("file"))?)
}

fn range(kind: i32, start: i64, len: i64) -> Result<libc::flock> {
    Ok(libc::flock {
        l_type: i16::try_from(kind)?,
        l_whence: i16::try_from(libc::SEEK_SET)?,
        l_start: start,
        l_len: len,
        l_pid: 0,
    })
}

fn posix(dir: &Path) -> Result<()> {
    let file = open(dir)?;
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 10, 10)?))?;
    let ours = std::process::id();
    let other = Other::start(|| {
        let file = open(dir)?;
        refused(fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_RDLCK, 19, 1)?)), Errno::EAGAIN)?;
        fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 20, 5)?))?;
        let mut found = range(libc::F_WRLCK, 0, 100)?;
        fcntl(&file, FcntlArg::F_GETLK(&mut found))?;
        ensure!((found.l_start, found.l_len, found.l_pid) == (10, 10, i32::try_from(ours)?), "{found:?}");
        Ok(())
    })?;
    other.finish()?;
    // Its locks went with it.
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 0, 0)?))?;
    // Ours go as soon as any descriptor of the file is closed.
    drop(open(dir)?);
    Other::start(|| {
        let file = open(dir)?;
        Ok(fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 0, 0)?)).map(drop)?)
    })?
    .finish()
}

fn posix_waits(dir: &Path) -> Result<()> {
    let file = open(dir)?;
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 0, 1)?))?;
    let other = Other::start(|| {
        let file = open(dir)?;
        Ok(fcntl(&file, FcntlArg::F_SETLKW(&range(libc::F_WRLCK, 0, 1)?)).map(drop)?)
    })?;
    ensure!(other.waits()?, "it did not wait");
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_UNLCK, 0, 1)?))?;
    other.finish()
}

fn ofd(dir: &Path) -> Result<()> {
    let (one, two) = (open(dir)?, open(dir)?);
    fcntl(&one, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, 0, 10)?))?;
    refused(fcntl(&two, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, 5, 1)?)), Errno::EAGAIN)?;
    drop(one);
    fcntl(&two, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, 5, 1)?))?;
    Ok(())
}

fn flock(dir: &Path) -> Result<()> {
    let lock = |file: File, how| Flock::lock(file, how).map_err(|(_, error)| error);
    let held = lock(open(dir)?, FlockArg::LockExclusive)?;
    let other = Other::start(|| {
        refused(lock(open(dir)?, FlockArg::LockSharedNonblock).map(drop), Errno::EAGAIN)?;
        lock(open(dir)?, FlockArg::LockShared)?;
        Ok(())
    })?;
    ensure!(other.waits()?, "it did not wait");
    ensure!(held.as_raw_fd() > 2);
    drop(held);
    other.finish()?;
    let (_one, _two) = (lock(open(dir)?, FlockArg::LockShared)?, lock(open(dir)?, FlockArg::LockShared)?);
    Ok(())
}
