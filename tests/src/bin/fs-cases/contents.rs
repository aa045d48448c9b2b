//! Reading, writing, mapping, copying, holes.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    num::NonZeroUsize,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    ptr::NonNull,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, FallocateFlags, copy_file_range, fallocate},
    libc,
    sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap},
    unistd::{Whence, fdatasync, fsync, lseek, syncfs},
};

use crate::{Case, process::Other, refused};

pub(crate) const CASES: &[Case] = &[
    ("copy_file_range", copies),
    ("copy_file_range_within_a_file", copies_within),
    ("unnamed_file", unnamed),
    ("unnamed_file_for_good", unnamed_for_good),
    ("mapped_shared", mapped_shared),
    ("mapped_private", mapped_private),
    ("mapped_while_open_for_appending", mapped_while_appending),
    ("direct", direct),
    ("holes", holes),
    ("fallocate", allocates),
    ("truncate", truncates),
    ("far_out", far_out),
    ("reopened_contents", reopened),
    ("unlinked_while_open", unlinked),
    ("syncs", syncs),
    ("runs_programs", runs),
];

/// Bytes that show when some are lost or moved.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    caisson_e2e::vsock::pattern(len).into_iter().map(|byte| byte.wrapping_add(seed)).collect()
}

fn open(path: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(false).open(path)?)
}

fn copies(dir: &Path) -> Result<()> {
    let data = pattern(3 << 20, 1);
    fs::write(dir.join("from"), &data)?;
    let (from, to) = (File::open(dir.join("from"))?, open(&dir.join("to"))?);
    let (mut start, mut end, mut left) = (4097, 11, 2 << 20);
    while left > 0 {
        let copied = copy_file_range(&from, Some(&mut start), &to, Some(&mut end), left)?;
        ensure!(copied > 0, "ended early");
        left -= copied;
    }
    ensure!((start, end) == (4097 + (2 << 20), 11 + (2 << 20)));
    let copy = fs::read(dir.join("to"))?;
    ensure!(copy.len() == 11 + (2 << 20) && copy[..11] == [0; 11] && copy[11..] == data[4097..][..2 << 20]);
    let nothing = copy_file_range(&from, Some(&mut (3 << 20)), &to, Some(&mut 0), 10)?;
    ensure!(nothing == 0, "beyond the end there were {nothing} bytes");
    refused(copy_file_range(&from, None, &from, None, 10), Errno::EBADF)
}

fn copies_within(dir: &Path) -> Result<()> {
    let data = pattern(100_000, 2);
    fs::write(dir.join("file"), &data)?;
    let file = open(&dir.join("file"))?;
    let copied = copy_file_range(&file, Some(&mut 0), &file, Some(&mut 50_000), 50_000)?;
    let now = fs::read(dir.join("file"))?;
    ensure!(now[..50_000] == data[..50_000] && now[50_000..][..copied] == data[..copied]);
    refused(copy_file_range(&file, Some(&mut 0), &file, Some(&mut 10), 20), Errno::EINVAL)
}

fn unnamed_in(dir: &Path, flags: i32) -> std::io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_TMPFILE | flags).mode(0o640).open(dir)
}

fn link(file: &File, to: &Path) -> nix::Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::linkat(nix::fcntl::AT_FDCWD, &*from, nix::fcntl::AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)
}

fn unnamed(dir: &Path) -> Result<()> {
    let mut file = unnamed_in(dir, 0)?;
    ensure!(fs::read_dir(dir)?.count() == 0 && file.metadata()?.nlink() == 0);
    file.write_all(b"unnamed")?;
    link(&file, &dir.join("named")).context("naming it")?;
    let named = fs::metadata(dir.join("named"))?;
    ensure!((named.mode() & 0o7777, named.nlink(), named.ino()) == (0o640, 1, file.metadata()?.ino()));
    ensure!(fs::read(dir.join("named"))? == b"unnamed");
    Ok(())
}

fn unnamed_for_good(dir: &Path) -> Result<()> {
    let file = unnamed_in(dir, libc::O_EXCL)?;
    refused(link(&file, &dir.join("named")), Errno::ENOENT)
}

/// A file mapped into memory.
struct Mapping {
    at: NonNull<libc::c_void>,
    len: usize,
}

impl Mapping {
    fn new(file: &File, flags: MapFlags) -> Result<Self> {
        let len = usize::try_from(file.metadata()?.len())?;
        let size = NonZeroUsize::new(len).context("nothing to map")?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, file, 0) }?;
        Ok(Self { at, len })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as this lives, and the files here are never made shorter meanwhile. What
        // other processes write is read only after they have ended.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.len) }
    }

    fn sync(&self) -> Result<()> {
        // SAFETY: the mapping itself.
        Ok(unsafe { msync(self.at, self.len, MsFlags::MS_SYNC) }?)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping itself, which nothing refers to any more.
        let _ = unsafe { munmap(self.at, self.len) };
    }
}

fn mapped_shared(dir: &Path) -> Result<()> {
    fs::write(dir.join("file"), pattern(20_000, 3))?;
    let file = open(&dir.join("file"))?;
    let (mut one, mut other) =
        (Mapping::new(&file, MapFlags::MAP_SHARED)?, Mapping::new(&file, MapFlags::MAP_SHARED)?);
    one.bytes()[5_000..5_003].copy_from_slice(b"new");
    ensure!(&other.bytes()[5_000..5_003] == b"new");
    let mut read = [0; 3];
    file.read_exact_at(&mut read, 5_000)?;
    ensure!(&read == b"new", "what is mapped is not what is read");
    file.write_all_at(b"WRITTEN", 12_000)?;
    ensure!(&other.bytes()[12_000..12_007] == b"WRITTEN", "what is written is not what is mapped");
    let process = Other::start(|| {
        one.bytes()[19_999] = 77;
        Ok(())
    })?;
    process.finish()?;
    ensure!(one.bytes()[19_999] == 77, "another process's change");
    one.sync()?;
    drop((one, other));
    let end = fs::read(dir.join("file"))?;
    ensure!(end.len() == 20_000 && &end[5_000..5_003] == b"new" && end[19_999] == 77);
    Ok(())
}

fn mapped_private(dir: &Path) -> Result<()> {
    let data = pattern(20_000, 4);
    fs::write(dir.join("file"), &data)?;
    let file = open(&dir.join("file"))?;
    let mut mapping = Mapping::new(&file, MapFlags::MAP_PRIVATE)?;
    ensure!(mapping.bytes() == data);
    mapping.bytes().fill(0);
    mapping.sync()?;
    drop(mapping);
    ensure!(fs::read(dir.join("file"))? == data);
    Ok(())
}

fn mapped_while_appending(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, pattern(12_288, 5))?;
    let mut mapping = Mapping::new(&open(&path)?, MapFlags::MAP_SHARED)?;
    let mut appending = File::options().append(true).open(&path)?;
    mapping.bytes()[100] = 200;
    mapping.sync()?;
    appending.write_all(b"end")?;
    mapping.bytes()[8_000] = 201;
    mapping.sync()?;
    drop((mapping, appending));
    let end = fs::read(&path)?;
    ensure!(end.len() == 12_291, "it has {} bytes", end.len());
    ensure!((end[100], end[8_000], &end[12_288..]) == (200, 201, &b"end"[..]));
    Ok(())
}

/// Memory that is aligned as direct input and output wants it.
#[repr(C, align(4096))]
struct Aligned([u8; 8192]);

fn direct(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file =
        File::options().read(true).write(true).create(true).custom_flags(libc::O_DIRECT).open(&path)?;
    let data = pattern(8192, 6);
    let mut buffer = Box::new(Aligned([0; 8192]));
    buffer.0.copy_from_slice(&data);
    file.write_all_at(&buffer.0, 4096)?;
    buffer.0.fill(0);
    file.read_exact_at(&mut buffer.0, 4096)?;
    ensure!(buffer.0[..] == data);
    // Beside a handle that goes through the cache.
    let cached = open(&path)?;
    let mut read = vec![0; 8192];
    cached.read_exact_at(&mut read, 4096)?;
    ensure!(read == data, "the cache has something else");
    cached.write_all_at(b"cached", 4096)?;
    cached.sync_all()?;
    file.read_exact_at(&mut buffer.0, 4096)?;
    ensure!(&buffer.0[..6] == b"cached", "around the cache something else is read");
    buffer.0.fill(9);
    file.write_all_at(&buffer.0, 0)?;
    cached.read_exact_at(&mut read, 0)?;
    ensure!(read == [9; 8192], "the cache was not told");
    Ok(())
}

fn holes(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    file.write_all_at(&[1; 4096], 1 << 20)?;
    file.write_all_at(&[2; 4096], 4 << 20)?;
    file.set_len(8 << 20)?;
    let seek = |from, whence| lseek(&file, from, whence);
    ensure!(seek(0, Whence::SeekData)? == 1 << 20);
    ensure!(seek(1 << 20, Whence::SeekHole)? == (1 << 20) + 4096);
    ensure!(seek(2 << 20, Whence::SeekData)? == 4 << 20);
    refused(seek(5 << 20, Whence::SeekData), Errno::ENXIO)?;
    ensure!(seek(5 << 20, Whence::SeekHole)? == 5 << 20);
    refused(seek(9 << 20, Whence::SeekHole), Errno::ENXIO)?;
    ensure!(file.metadata()?.blocks() <= 64, "the holes take up space");
    let mut byte = [7];
    file.read_exact_at(&mut byte, 2 << 20)?;
    ensure!(byte == [0]);
    Ok(())
}

fn allocates(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
    ensure!(file.metadata()?.len() == 1 << 20 && file.metadata()?.blocks() >= 2048);
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20)?;
    ensure!(file.metadata()?.len() == 1 << 20 && file.metadata()?.blocks() >= 4096);
    file.write_all_at(&[3; 65_536], 0)?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 4096, 8192)?;
    let mut start = [0; 16_384];
    file.read_exact_at(&mut start, 0)?;
    ensure!(start[..4096] == [3; 4096] && start[4096..12_288] == [0; 8192] && start[12_288..] == [3; 4096]);
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, 100, 100)?;
    file.read_exact_at(&mut start, 0)?;
    ensure!(start[99] == 3 && start[100..200] == [0; 100] && start[200] == 3);
    let read_only = File::open(dir.join("file"))?;
    refused(fallocate(&read_only, FallocateFlags::empty(), 0, 1), Errno::EBADF)
}

fn truncates(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let data = pattern(10_000, 7);
    fs::write(&path, &data)?;
    let mut file = open(&path)?;
    file.set_len(5_001)?;
    file.set_len(9_000)?;
    let now = fs::read(&path)?;
    ensure!(
        now.len() == 9_000 && now[..5_001] == data[..5_001] && now[5_001..].iter().all(|byte| *byte == 0)
    );
    nix::unistd::truncate(&path, 3)?;
    file.seek(SeekFrom::Start(0))?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    ensure!(rest == data[..3]);
    File::options().write(true).truncate(true).open(&path)?;
    ensure!(file.metadata()?.len() == 0);
    Ok(())
}

fn far_out(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    file.write_all_at(b"far", 1 << 40)?;
    ensure!(file.metadata()?.len() == (1 << 40) + 3);
    let mut read = [0; 3];
    file.read_exact_at(&mut read, 1 << 40)?;
    ensure!(&read == b"far");
    Ok(())
}

/// What was written by one descriptor is what the next one reads, however often.
fn reopened(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    for round in 0..5 {
        let data = pattern(4096, round);
        fs::write(&path, &data)?;
        for _ in 0..3 {
            ensure!(fs::read(&path)? == data, "in round {round}");
        }
    }
    Ok(())
}

fn unlinked(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = open(&path)?;
    file.write_all_at(b"before", 0)?;
    fs::remove_file(&path)?;
    file.write_all_at(b"after", 100)?;
    let mut read = [0; 105];
    file.read_exact_at(&mut read, 0)?;
    ensure!(&read[..6] == b"before" && &read[100..] == b"after" && file.metadata()?.nlink() == 0);
    refused(nix::sys::stat::stat(&path), Errno::ENOENT)?;
    fs::write(&path, "another")?;
    ensure!(file.metadata()?.len() == 105);
    Ok(())
}

fn syncs(dir: &Path) -> Result<()> {
    let file = open(&dir.join("file"))?;
    file.write_all_at(b"x", 0)?;
    fdatasync(&file)?;
    fsync(&file)?;
    fsync(File::open(dir)?.as_fd())?;
    syncfs(&file)?;
    nix::unistd::sync();
    Ok(())
}

fn runs(dir: &Path) -> Result<()> {
    let path = dir.join("program");
    fs::copy(std::env::current_exe()?, &path)?;
    let output = std::process::Command::new(&path).arg(dir).arg("no such case").output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}
