//! Directories, links, renames, special files.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, RenameFlags, openat, renameat2},
    sys::{
        stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, lstat, mkdirat, mknod, utimensat},
        statvfs::statvfs,
        time::{TimeSpec, TimeValLike},
    },
    unistd::{UnlinkatFlags, linkat, mkfifo, unlinkat},
};

use crate::{Case, process::Other, refused, refused_io};

pub(crate) const CASES: &[Case] = &[
    ("rename_no_replace", no_replace),
    ("rename_exchange", exchange),
    ("rename_replaces", replaces),
    ("rename_into_itself", into_itself),
    ("links", links),
    ("symlinks", symlinks),
    ("long_names", long_names),
    ("odd_names", odd_names),
    ("deep", deep),
    ("many", many),
    ("removed_while_read", removed_while_read),
    ("moved_while_walked", moved_while_walked),
    ("up_and_out", up_and_out),
    ("fifo", fifo),
    ("socket", socket),
    ("whiteout", whiteout),
    ("device", device),
    ("times", times),
    ("statfs", stat_fs),
    ("exclusive", exclusive),
];

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)
}

fn no_replace(dir: &Path) -> Result<()> {
    let (a, b) = (dir.join("a"), dir.join("b"));
    fs::write(&a, "a")?;
    fs::write(&b, "b")?;
    refused(rename(&a, &b, RenameFlags::RENAME_NOREPLACE), Errno::EEXIST)?;
    ensure!(fs::read_to_string(&b)? == "b");
    rename(&a, &dir.join("c"), RenameFlags::RENAME_NOREPLACE)?;
    ensure!(!a.exists() && fs::read_to_string(dir.join("c"))? == "a");
    Ok(())
}

fn exchange(dir: &Path) -> Result<()> {
    let (file, tree) = (dir.join("file"), dir.join("tree"));
    fs::write(&file, "file")?;
    fs::create_dir(&tree)?;
    fs::write(tree.join("inside"), "inside")?;
    rename(&file, &tree, RenameFlags::RENAME_EXCHANGE)?;
    ensure!(fs::read_to_string(&tree)? == "file" && fs::read_to_string(file.join("inside"))? == "inside");
    refused(rename(&file, &dir.join("none"), RenameFlags::RENAME_EXCHANGE), Errno::ENOENT)
}

fn replaces(dir: &Path) -> Result<()> {
    fs::write(dir.join("new"), "new")?;
    fs::write(dir.join("old"), "old")?;
    let mut old = File::open(dir.join("old"))?;
    fs::rename(dir.join("new"), dir.join("old"))?;
    let mut text = String::new();
    old.read_to_string(&mut text)?;
    ensure!(text == "old" && fs::read_to_string(dir.join("old"))? == "new" && !dir.join("new").exists());
    fs::create_dir_all(dir.join("full/x"))?;
    fs::create_dir(dir.join("empty"))?;
    refused_io(fs::rename(dir.join("empty"), dir.join("full")), Errno::ENOTEMPTY)?;
    refused_io(fs::rename(dir.join("empty"), dir.join("old")), Errno::ENOTDIR)?;
    fs::rename(dir.join("full"), dir.join("empty"))?;
    ensure!(dir.join("empty/x").is_dir());
    Ok(())
}

fn into_itself(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("a/b"))?;
    refused_io(fs::rename(dir.join("a"), dir.join("a/b/c")), Errno::EINVAL)
}

fn links(dir: &Path) -> Result<()> {
    fs::write(dir.join("a"), "a")?;
    for name in ["b", "c"] {
        fs::hard_link(dir.join("a"), dir.join(name))?;
    }
    let of = |name: &str| fs::metadata(dir.join(name));
    ensure!(of("a")?.nlink() == 3 && of("b")?.ino() == of("c")?.ino());
    fs::write(dir.join("c"), "changed")?;
    ensure!(fs::read_to_string(dir.join("a"))? == "changed");
    fs::remove_file(dir.join("a"))?;
    ensure!(of("b")?.nlink() == 2);
    symlink("b", dir.join("s"))?;
    linkat(AT_FDCWD, &dir.join("s"), AT_FDCWD, &dir.join("hard"), nix::fcntl::AtFlags::empty())?;
    ensure!(fs::read_link(dir.join("hard"))? == Path::new("b"), "a link to a symbolic link");
    refused_io(fs::hard_link(dir, dir.join("d")), Errno::EPERM)?;
    refused_io(fs::hard_link(dir.join("b"), dir.join("c")), Errno::EEXIST)
}

fn symlinks(dir: &Path) -> Result<()> {
    let long = "t".repeat(4095);
    symlink(&long, dir.join("long"))?;
    ensure!(fs::read_link(dir.join("long"))? == Path::new(&long));
    ensure!(fs::symlink_metadata(dir.join("long"))?.len() == 4095);
    refused_io(symlink("t".repeat(4096), dir.join("longer")), Errno::ENAMETOOLONG)?;
    symlink("loop", dir.join("loop"))?;
    refused_io(File::open(dir.join("loop")), Errno::ELOOP)?;
    refused_io(File::open(dir.join("long")), Errno::ENAMETOOLONG)?;
    fs::write(dir.join("file"), "file")?;
    symlink("file", dir.join("to"))?;
    let opened = openat(AT_FDCWD, &dir.join("to"), OFlag::O_RDONLY | OFlag::O_NOFOLLOW, Mode::empty());
    refused(opened, Errno::ELOOP)?;
    let none = [TimeSpec::seconds(1_000), TimeSpec::seconds(2_000)];
    utimensat(AT_FDCWD, &dir.join("to"), &none[0], &none[1], UtimensatFlags::NoFollowSymlink)?;
    ensure!(lstat(&dir.join("to"))?.st_mtime == 2_000 && fs::metadata(dir.join("file"))?.mtime() > 2_000);
    Ok(())
}

fn long_names(dir: &Path) -> Result<()> {
    let name = "n".repeat(255);
    fs::write(dir.join(&name), "x")?;
    ensure!(fs::read_dir(dir)?.map_while(Result::ok).any(|entry| *entry.file_name() == *name));
    refused_io(fs::write(dir.join("n".repeat(256)), "x"), Errno::ENAMETOOLONG)?;
    refused_io(fs::metadata(dir.join("n".repeat(256))), Errno::ENAMETOOLONG)
}

/// All bytes but zero and the slash may be in a name.
fn odd_names(dir: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = (1..32).chain([b'*', b'\\', b'~', 127, 128, 192, 255]);
    let names = bytes.map(|byte| vec![b'x', byte]);
    let odd = [&b"..."[..], b".. ", b"\xff\xfe", b" ", b"\n", b"-rf", "\u{1f980}".as_bytes()];
    let names: BTreeSet<_> = names.chain(odd.into_iter().map(<[u8]>::to_vec)).collect();
    for name in &names {
        fs::write(dir.join(std::ffi::OsStr::from_bytes(name)), name)?;
    }
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().as_bytes().to_vec();
        ensure!(fs::read(entry.path())? == name, "{name:?} holds something else");
        seen.insert(name);
    }
    ensure!(seen == names);
    Ok(())
}

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY);

fn deep(dir: &Path) -> Result<()> {
    let mut at: OwnedFd = File::open(dir)?.into();
    let mut above = Vec::new();
    for _ in 0..60 {
        mkdirat(&at, "d", Mode::from_bits_truncate(0o755))?;
        let next = openat(&at, "d", DIRECTORY, Mode::empty())?;
        above.push(std::mem::replace(&mut at, next));
    }
    File::from(openat(&at, "file", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::from_bits_truncate(0o644))?)
        .write_all(b"deep")?;
    let path = dir.join("d/".repeat(60)).join("file");
    ensure!(fs::read_to_string(&path)? == "deep");
    unlinkat(&at, "file", UnlinkatFlags::NoRemoveDir)?;
    for dir in above.iter().rev() {
        unlinkat(dir, "d", UnlinkatFlags::RemoveDir)?;
    }
    Ok(())
}

const MANY: usize = 250;

fn fill(dir: &Path) -> Result<BTreeSet<String>> {
    let names: BTreeSet<_> = (0..MANY).map(|i| format!("a-rather-long-name-of-a-file-{i:05}")).collect();
    for name in &names {
        fs::write(dir.join(name), "")?;
    }
    Ok(names)
}

fn list(dir: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

fn many(dir: &Path) -> Result<()> {
    let names = fill(dir)?;
    let seen = list(dir)?;
    ensure!(seen.len() == MANY && seen.into_iter().collect::<BTreeSet<_>>() == names);
    for name in &names {
        fs::remove_file(dir.join(name))?;
    }
    ensure!(list(dir)?.is_empty());
    Ok(())
}

fn removed_while_read(dir: &Path) -> Result<()> {
    let names = fill(dir)?;
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        fs::remove_file(entry.path())?;
        ensure!(seen.insert(entry.file_name().to_string_lossy().into_owned()), "{entry:?} came twice");
    }
    ensure!(seen == names && list(dir)?.is_empty());
    Ok(())
}

/// A directory that somebody is in goes elsewhere: the way down and up leads through where it is now.
fn moved_while_walked(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("one/inner/most"))?;
    fs::create_dir_all(dir.join("other/place"))?;
    let inner = openat(AT_FDCWD, &dir.join("one/inner"), DIRECTORY, Mode::empty())?;
    fs::rename(dir.join("one/inner"), dir.join("other/place/inner"))?;
    let most = openat(&inner, "most", DIRECTORY, Mode::empty()).context("down")?;
    let up = openat(&inner, "../..", DIRECTORY, Mode::empty()).context("up")?;
    let ino = |fd: &OwnedFd| Ok::<_, anyhow::Error>(File::from(fd.try_clone()?).metadata()?.ino());
    ensure!(ino(&up)? == fs::metadata(dir.join("other"))?.ino());
    ensure!(ino(&most)? == fs::metadata(dir.join("other/place/inner/most"))?.ino());

    // All the while another process moves it to and fro.
    let (one, other) = (dir.join("one/inner"), dir.join("other/place/inner"));
    let mover = Other::start(|| {
        for _ in 0..40 {
            fs::rename(&other, &one)?;
            fs::rename(&one, &other)?;
        }
        Ok(())
    })?;
    let expected: BTreeSet<_> = ["one", "other"].map(str::to_owned).into();
    for _ in 0..40 {
        let found = openat(&most, "../../..", DIRECTORY, Mode::empty())
            .ok()
            .map(|fd| list(Path::new(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)))));
        // From one place it is the common directory, from the other one that is below it.
        let found: BTreeSet<_> = found.transpose()?.unwrap_or_default().into_iter().collect();
        let below = found.is_empty() || found.iter().all(|name| name == "place" || name == "inner");
        ensure!(found == expected || below, "it leads to {found:?}");
    }
    mover.finish()
}

/// Links and dots lead where the one who follows them is, not anywhere else.
fn up_and_out(dir: &Path) -> Result<()> {
    let mark = std::env::temp_dir().join("fs-cases-mark");
    fs::write(&mark, "here")?;
    symlink(&mark, dir.join("absolute"))?;
    ensure!(fs::read_to_string(dir.join("absolute"))? == "here");
    symlink("/proc/self/fd/0", dir.join("magic"))?;
    ensure!(fs::read_link(dir.join("magic"))? == Path::new("/proc/self/fd/0"));
    let up = "../".repeat(60);
    symlink(format!("{up}proc/self/status"), dir.join("up"))?;
    let name = fs::read_to_string(dir.join("up"))?;
    ensure!(name.contains("fs-cases"), "it is another process that looks at itself: {name}");
    fs::remove_file(mark)?;
    let root = fs::metadata("/")?;
    let reached = fs::metadata(dir.join(up))?;
    ensure!((root.ino(), root.dev()) == (reached.ino(), reached.dev()));
    Ok(())
}

fn fifo(dir: &Path) -> Result<()> {
    let path = dir.join("fifo");
    mkfifo(&path, Mode::from_bits_truncate(0o600))?;
    ensure!(fs::metadata(&path)?.file_type().is_fifo());
    let writer = Other::start(|| Ok(fs::write(&path, "through the pipe")?))?;
    ensure!(fs::read_to_string(&path)? == "through the pipe");
    writer.finish()?;
    fs::rename(&path, dir.join("moved"))?;
    ensure!(fs::metadata(dir.join("moved"))?.len() == 0);
    Ok(())
}

fn socket(dir: &Path) -> Result<()> {
    // Addresses are short, the way to a share need not be.
    std::env::set_current_dir(dir)?;
    let listener = UnixListener::bind("socket")?;
    ensure!(fs::metadata("socket")?.file_type().is_socket());
    let client = Other::start(|| Ok(UnixStream::connect("socket")?.write_all(b"hello")?))?;
    let mut said = String::new();
    listener.accept()?.0.read_to_string(&mut said)?;
    ensure!(said == "hello");
    client.finish()?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// An overlay's mark for a file that was deleted.
fn whiteout(dir: &Path) -> Result<()> {
    let path = dir.join("deleted");
    mknod(&path, SFlag::S_IFCHR, Mode::empty(), 0)?;
    let made = fs::metadata(&path)?;
    ensure!(made.file_type().is_char_device() && made.rdev() == 0);
    Ok(())
}

fn device(dir: &Path) -> Result<()> {
    let null = nix::sys::stat::makedev(1, 3);
    mknod(&dir.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), null)?;
    ensure!(fs::metadata(dir.join("null"))?.rdev() == null);
    Ok(())
}

fn times(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let before = std::time::SystemTime::now();
    fs::write(&path, "x")?;
    let born = fs::metadata(&path)?.created().context("when it was made")?;
    // By the clock of whoever keeps the file.
    let apart = born.duration_since(before).unwrap_or_else(|error| error.duration());
    ensure!(apart.as_secs() < 60, "{apart:?} apart");
    let (access, change) = (TimeSpec::new(981_173_106, 123_456_789), TimeSpec::new(-5, 999_999_999));
    utimensat(AT_FDCWD, &path, &access, &change, UtimensatFlags::FollowSymlink)?;
    let now = fs::metadata(&path)?;
    ensure!((now.atime(), now.atime_nsec()) == (981_173_106, 123_456_789));
    ensure!((now.mtime(), now.mtime_nsec()) == (-5, 999_999_999));
    ensure!(now.created()? == born, "born again");
    fchmodat(AT_FDCWD, &path, Mode::from_bits_truncate(0o600), FchmodatFlags::FollowSymlink)?;
    let later = fs::metadata(&path)?;
    ensure!(later.mtime() == -5 && (later.ctime(), later.ctime_nsec()) >= (now.ctime(), now.ctime_nsec()));
    Ok(())
}

fn stat_fs(dir: &Path) -> Result<()> {
    let stat = statvfs(dir)?;
    ensure!(stat.name_max() == 255 && stat.block_size() >= 512 && stat.blocks() > 0, "{stat:?}");
    ensure!(stat.blocks_free() <= stat.blocks() && stat.files_free() <= stat.files(), "{stat:?}");
    ensure!(stat.blocks_free() > 0 && stat.files() > 0, "{stat:?}");
    Ok(())
}

fn exclusive(dir: &Path) -> Result<()> {
    let make = || File::options().write(true).create_new(true).open(dir.join("file"));
    make()?;
    refused_io(make(), Errno::EEXIST)?;
    symlink("nowhere", dir.join("dangling"))?;
    refused_io(File::options().write(true).create_new(true).open(dir.join("dangling")), Errno::EEXIST)?;
    refused_io(fs::create_dir(dir.join("file")), Errno::EEXIST)?;
    let as_directory = openat(File::open(dir)?.as_fd(), "file", DIRECTORY, Mode::empty());
    refused(as_directory, Errno::ENOTDIR)
}
