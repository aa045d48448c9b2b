//! Every operation, on a directory of the host's, whose own view is the reference.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
};

use caisson_vmm_api::devices::FsConfig;

use super::{super::*, bench::*};
use crate::Persist;

#[test]
fn tells_its_tag_and_its_queues() {
    let bench = Bench::with(FsConfig { queues: 1, ..config() });
    let mut space = [0xff; 44];
    bench.fs.read_config(0, &mut space);
    assert_eq!((&space[..6], word(&space, 36), word(&space, 40)), (&b"share\0"[..], 1, u32::MAX));
    for tag in ["", "0123456789012345678901234567890123456", "a\0b"] {
        let config = FsConfig { tag: tag.into(), ..config() };
        assert!(matches!(Fs::new(config, directory("/"), workers(1, || {})), Err(FsError::Tag)), "{tag:?}");
    }
    let config = FsConfig { queues: 9, ..config() };
    assert!(matches!(Fs::new(config, directory("/"), workers(1, || {})), Err(FsError::Queues(9))));
    let file: OwnedFd = fs::File::open("/proc/self/exe").unwrap().into();
    assert!(matches!(Fs::new(super::bench::config(), file, workers(1, || {})), Err(FsError::Root(_))));
}

#[test]
fn negotiates_what_it_can_do() {
    let mut bench = Bench::unmounted(config());
    let reply = bench.init().unwrap();
    let flags = word(&reply, 12);
    let (posix_locks, flock, writeback, posix_acl, dont_mask, submounts) =
        (1 << 1, 1 << 10, 1 << 16, 1 << 20, 1 << 6, 1 << 27);
    assert_eq!(flags & (posix_locks | flock | writeback), 0, "the guest keeps locks and writes through");
    assert_eq!(flags & (posix_acl | dont_mask | submounts), posix_acl | dont_mask | submounts);
    assert_eq!(word(&reply, 20), 1 << 20, "a megabyte in a write");
}

#[test]
fn a_file_from_creation_to_oblivion() {
    let mut bench = Bench::new();
    let file = bench.create("file", 0o100_666, 0o027).unwrap();
    assert_eq!(fs::metadata(bench.path("file")).unwrap().mode() & 0o7777, 0o640);
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(word(&bench.write(file, 7, 0, &data).unwrap(), 0), 300_000);
    assert_eq!(fs::read(bench.path("file")).unwrap()[7..], data);
    assert_eq!(bench.read(file, 7, 300_000).unwrap(), data);
    assert_eq!(bench.read(file, 300_000, 4096).unwrap(), data[299_993..]);
    assert_eq!(bench.read(file, 1 << 40, 4096).unwrap(), b"");
    assert_eq!(bench.attributes(file.0).3, 300_007);
    assert_eq!(bench.lookup(ROOT, "file"), Ok(file.0));
    assert_eq!(bench.fs.share.held(), (1, 1));
    bench.release(file).unwrap();
    assert_eq!(bench.release(file), Err(libc::EBADF));
    assert_eq!(bench.read(file, 0, 1), Err(libc::EBADF));
    bench.forget(file.0, 1);
    assert_eq!(bench.fs.share.held(), (1, 0), "it was told twice");
    bench.forget(file.0, 1);
    assert_eq!(bench.fs.share.held(), (0, 0));
    assert_eq!(bench.call(3, file.0, &[0; 16]), Err(libc::ESTALE));
    bench.forget(ROOT, u64::MAX);
    assert_eq!(bench.attributes(ROOT).0 & libc::S_IFMT, libc::S_IFDIR);
}

#[test]
fn appends_and_truncates_as_opened() {
    let mut bench = Bench::new();
    fs::write(bench.path("log"), "one ").unwrap();
    let node = bench.lookup(ROOT, "log").unwrap();
    let handle = bench.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    fs::write(bench.path("log"), "one two ").unwrap();
    bench.write((node, handle), 0, 0, b"three").unwrap();
    assert_eq!(fs::read(bench.path("log")).unwrap(), b"one two three");
    assert_eq!(bench.read((node, handle), 0, 5), Err(libc::EBADF), "it is open for writing alone");
    bench.open(node, libc::O_WRONLY | libc::O_TRUNC | libc::O_DIRECT).unwrap();
    assert_eq!(fs::metadata(bench.path("log")).unwrap().len(), 0);
}

#[test]
fn makes_all_kinds_of_files_but_devices() {
    let mut bench = Bench::new();
    bench.mknod("fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    bench.mknod("socket", libc::S_IFSOCK | 0o600, 0).unwrap();
    bench.mknod("regular", libc::S_IFREG | 0o600, 0).unwrap();
    let mut body = words(&[0o1777, 0o022]);
    body.extend(text("dir"));
    bench.call(9, ROOT, &body).unwrap();
    let kind = |name: &str| fs::symlink_metadata(bench.path(name)).unwrap().file_type();
    assert!(kind("fifo").is_fifo() && kind("socket").is_socket() && kind("regular").is_file());
    assert_eq!(fs::metadata(bench.path("dir")).unwrap().mode() & 0o7777, 0o1755);
    for (mode, device) in
        [(libc::S_IFCHR, 0x103), (libc::S_IFBLK, 0), (libc::S_IFBLK, 0x800), (libc::S_IFDIR, 0)]
    {
        assert_eq!(bench.mknod("device", mode | 0o600, device), Err(libc::EPERM));
    }
    assert!(!bench.path("device").exists());
    let fifo = bench.lookup(ROOT, "fifo").unwrap();
    assert_eq!(bench.open(fifo, libc::O_RDONLY), Err(libc::ENXIO), "a worker would wait for the other end");
}

#[test]
fn names_are_linked_renamed_and_removed() {
    let mut bench = Bench::new();
    fs::write(bench.path("a"), "a").unwrap();
    fs::write(bench.path("b"), "b").unwrap();
    fs::create_dir(bench.path("dir")).unwrap();
    let a = bench.lookup(ROOT, "a").unwrap();
    let mut body = a.to_le_bytes().to_vec();
    body.extend(text("c"));
    assert_eq!(long(&bench.call(13, ROOT, &body).unwrap(), 0), a);
    assert_eq!(fs::metadata(bench.path("c")).unwrap().nlink(), 2);
    assert_eq!(bench.rename("a", "b", libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    bench.rename("a", "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(bench.path("a")).unwrap(), b"b");
    bench.rename("a", "b", 0).unwrap();
    assert_eq!(fs::read(bench.path("b")).unwrap(), b"b");
    assert_eq!(bench.lookup(ROOT, "a"), Err(libc::ENOENT));
    assert_eq!(bench.call(10, ROOT, &text("dir")), Err(libc::EISDIR));
    assert_eq!(bench.call(11, ROOT, &text("b")), Err(libc::ENOTDIR));
    bench.call(11, ROOT, &text("dir")).unwrap();
    bench.call(10, ROOT, &text("b")).unwrap();
    let handle = bench.open(a, libc::O_RDONLY).unwrap();
    bench.call(10, ROOT, &text("c")).unwrap();
    assert_eq!(bench.read((a, handle), 0, 9).unwrap(), b"a", "it is open");
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 0);
}

#[test]
fn links_are_shown_and_never_followed() {
    let mut bench = Bench::new();
    bench.call(6, ROOT, &[text("made"), text("/etc/passwd")].concat()).unwrap();
    assert_eq!(fs::read_link(bench.path("made")).unwrap().to_str(), Some("/etc/passwd"));
    symlink("/", bench.path("outside")).unwrap();
    for (name, target) in [("made", "/etc/passwd"), ("outside", "/")] {
        let link = bench.lookup(ROOT, name).unwrap();
        assert_eq!(bench.attributes(link).0 & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(bench.call(5, link, &[]).unwrap(), target.as_bytes());
        assert_eq!(bench.open(link, libc::O_RDONLY), Err(libc::ENXIO));
        assert_eq!(bench.call(27, link, &[0; 8]), Err(libc::ENOTDIR));
        assert_eq!(bench.lookup(link, "etc"), Err(libc::ENOTDIR));
    }
    assert_eq!(bench.create("outside", 0o600, 0), Err(libc::ENXIO));
    // A directory that a host's process puts a link in the place of is still the directory.
    fs::create_dir(bench.path("dir")).unwrap();
    let dir = bench.lookup(ROOT, "dir").unwrap();
    fs::rename(bench.path("dir"), bench.path("moved")).unwrap();
    symlink("/etc", bench.path("dir")).unwrap();
    assert_eq!(bench.lookup(dir, "passwd"), Err(libc::ENOENT));
}

#[test]
fn attributes_are_set() {
    let mut bench = Bench::new();
    let file = bench.create("file", 0o600, 0).unwrap();
    bench.setattr(file.0, 1, &[(68, 0o4751)]).unwrap();
    assert_eq!(bench.attributes(file.0).0, libc::S_IFREG | 0o4751);
    bench.setattr(file.0, 1 << 3, &[(16, 12_345)]).unwrap();
    assert_eq!(fs::metadata(bench.path("file")).unwrap().len(), 12_345);
    bench.setattr(file.0, 1 << 3 | 1 << 6, &[(8, file.1), (16, 54_321)]).unwrap();
    assert_eq!(fs::metadata(bench.path("file")).unwrap().len(), 54_321);
    assert_eq!(bench.setattr(file.0, 1 << 3 | 1 << 6, &[(8, 99), (16, 1)]), Err(libc::EBADF));
    bench.setattr(file.0, 1 << 4 | 1 << 5, &[(32, 1_000), (40, 2_000), (56, 7), (60, 9)]).unwrap();
    let meta = fs::metadata(bench.path("file")).unwrap();
    assert_eq!((meta.atime(), meta.atime_nsec(), meta.mtime(), meta.mtime_nsec()), (1_000, 7, 2_000, 9));
    bench.setattr(file.0, 1 << 5 | 1 << 8, &[]).unwrap();
    let meta = fs::metadata(bench.path("file")).unwrap();
    assert!(meta.atime() == 1_000 && meta.mtime() > 1_000_000_000);
    symlink("nowhere", bench.path("link")).unwrap();
    let link = bench.lookup(ROOT, "link").unwrap();
    bench.setattr(link, 1 << 5, &[(40, 5_000)]).unwrap();
    assert_eq!(fs::symlink_metadata(bench.path("link")).unwrap().mtime(), 5_000);
}

#[test]
fn files_belong_to_who_made_them() {
    let mut bench = Bench::new();
    fs::create_dir(bench.path("shared")).unwrap();
    fs::set_permissions(bench.path("shared"), fs::Permissions::from_mode(0o2755)).unwrap();
    let before = own();
    bench.caller = (54_321, 54_322);
    let made = bench.create("file", 0o600, 0);
    if before.0 != 0 {
        assert_eq!(made, Err(libc::EPERM), "only with privileges");
        return;
    }
    let (node, _) = made.unwrap();
    assert_eq!(bench.attributes(node), (libc::S_IFREG | 0o600, 54_321, 54_322, 0));
    let shared = bench.lookup(ROOT, "shared").unwrap();
    let mut body = words(&[0o700, 0]);
    body.extend(text("sub"));
    bench.call(9, shared, &body).unwrap();
    let sub = fs::metadata(bench.path("shared/sub")).unwrap();
    assert_eq!(
        (sub.uid(), sub.gid(), sub.mode() & 0o7777),
        (54_321, before.1, 0o2700),
        "the group is inherited"
    );
    bench.setattr(node, 1 << 1 | 1 << 2, &[(76, 11), (80, 12)]).unwrap();
    assert_eq!(bench.attributes(node).1, 11);
    bench.caller = before;
    let (node, _) = bench.create("own", 0o600, 0).unwrap();
    assert_eq!(bench.attributes(node).1, before.0, "the worker is itself again");
}

#[test]
fn privileges_of_a_file_end_with_a_write() {
    let mut bench = Bench::new();
    for (flags, left) in [(0, 0o6755), (4, 0o755)] {
        let file = bench.create("file", 0o755, 0).unwrap();
        bench.setattr(file.0, 1, &[(68, 0o6755)]).unwrap();
        bench.write(file, 0, flags, b"x").unwrap();
        let mode = bench.attributes(file.0).0 & 0o7777;
        // Without privileges there is nothing to give up: the kernel takes them away by itself.
        let expected = if own().0 == 0 { left } else { 0o755 };
        assert_eq!(mode, expected, "write flags {flags}");
    }
}

#[test]
fn extended_attributes_are_the_users_alone() {
    let mut bench = Bench::new();
    let (node, _) = bench.create("file", 0o600, 0).unwrap();
    assert_eq!(bench.get_xattr(node, "user.a", 100), Err(libc::ENODATA));
    bench.set_xattr(node, "user.a", b"value").unwrap();
    assert_eq!(bench.get_xattr(node, "user.a", 100).unwrap(), b"value");
    assert_eq!(word(&bench.get_xattr(node, "user.a", 0).unwrap(), 0), 5);
    assert_eq!(bench.get_xattr(node, "user.a", 4), Err(libc::ERANGE));
    for name in ["trusted.overlay.opaque", "security.selinux", "system.other", "a"] {
        assert_eq!(bench.set_xattr(node, name, b"x"), Err(libc::EOPNOTSUPP), "{name}");
        assert_eq!(bench.get_xattr(node, name, 9), Err(libc::EOPNOTSUPP), "{name}");
    }
    assert_eq!(bench.call(23, node, &words(&[100, 0])).unwrap(), b"user.a\0");
    assert_eq!(bench.call(23, node, &words(&[3, 0])), Err(libc::ERANGE));
    bench.call(24, node, &text("user.a")).unwrap();
    assert_eq!(word(&bench.call(23, node, &words(&[0, 0])).unwrap(), 0), 0);
}

#[test]
fn access_control_lists_reach_the_host() {
    let mut bench = Bench::new();
    let (node, _) = bench.create("file", 0o640, 0).unwrap();
    // Version 2; the owner rw-, user 1234 r--, the group r--, the mask r--, others ---.
    let entry = |tag: u16, permissions: u16, id: u32| {
        [tag.to_le_bytes().to_vec(), permissions.to_le_bytes().to_vec(), id.to_le_bytes().to_vec()].concat()
    };
    let list = [
        2u32.to_le_bytes().to_vec(),
        entry(1, 6, u32::MAX),
        entry(2, 4, 1234),
        entry(4, 4, u32::MAX),
        entry(0x10, 4, u32::MAX),
        entry(0x20, 0, u32::MAX),
    ]
    .concat();
    bench.set_xattr(node, "system.posix_acl_access", &list).unwrap();
    assert_eq!(bench.get_xattr(node, "system.posix_acl_access", 200).unwrap(), list);
}

#[test]
fn directories_are_read_whole_in_any_pieces() {
    let mut bench = Bench::new();
    let mut expected = BTreeSet::from([".".to_owned(), "..".to_owned()]);
    for i in 0..300 {
        let name = format!("a file with a name of some length {i}");
        fs::write(bench.path(&name), "").unwrap();
        expected.insert(name);
    }
    for size in [512, 4096, 1 << 19] {
        assert_eq!(names(&mut bench, ROOT, size, false), expected, "{size}");
        assert_eq!(bench.fs.share.held(), (0, 0));
        assert_eq!(names(&mut bench, ROOT, size, true), expected, "{size}");
        assert_eq!(bench.fs.share.held(), (300, 0));
        for name in expected.iter().filter(|name| !name.starts_with('.')) {
            let node = bench.lookup(ROOT, name).unwrap();
            bench.forget(node, 2);
        }
        assert_eq!(bench.fs.share.held(), (0, 0), "what was not told was not counted");
    }
}

#[test]
fn holes_space_and_the_rest() {
    let mut bench = Bench::new();
    let file = bench.create("file", 0o600, 0).unwrap();
    let fallocate = |mode: u32, offset: u64, len: u64| {
        let mut body = [file.1.to_le_bytes(), offset.to_le_bytes(), len.to_le_bytes()].concat();
        body.extend(words(&[mode, 0]));
        body
    };
    bench.call(43, file.0, &fallocate(0, 0, 1 << 20)).unwrap();
    assert_eq!(bench.attributes(file.0).3, 1 << 20);
    bench.write(file, 0, 0, &vec![1; 1 << 19]).unwrap();
    bench.call(43, file.0, &fallocate(3, 1 << 16, 1 << 16)).unwrap();
    assert_eq!(bench.read(file, 1 << 16, 4).unwrap(), [0; 4]);
    assert_eq!(bench.call(43, file.0, &fallocate(0, u64::MAX, 1)), Err(libc::EINVAL));
    let lseek = |offset: u64, whence: u32| {
        let mut body = [file.1.to_le_bytes(), offset.to_le_bytes()].concat();
        body.extend(words(&[whence, 0]));
        body
    };
    assert_eq!(long(&bench.call(46, file.0, &lseek(0, 4)).unwrap(), 0), 1 << 16);
    assert_eq!(long(&bench.call(46, file.0, &lseek(1 << 16, 3)).unwrap(), 0), 1 << 17);
    assert_eq!(bench.call(46, file.0, &lseek(0, 0)), Err(libc::EINVAL));
    let statfs = bench.call(17, ROOT, &[]).unwrap();
    assert!(long(&statfs, 0) > 0 && word(&statfs, 44) == 255);
    let handle = file.1.to_le_bytes();
    for data_only in [0, 1] {
        bench.call(20, file.0, &[&handle[..], &words(&[data_only, 0])].concat()).unwrap();
    }
    bench.call(25, file.0, &[&handle[..], &[0; 16]].concat()).unwrap();
    let dir = bench.call(27, ROOT, &[0; 8]).unwrap();
    bench.call(30, ROOT, &[&dir[..8], &[0; 8]].concat()).unwrap();
    bench.call(34, file.0, &words(&[0o6, 0])).unwrap();
    bench.caller = (77, 77);
    assert_eq!(bench.call(34, file.0, &words(&[0o4, 0])), Err(libc::EACCES));
}

#[test]
fn a_read_only_share_changes_nothing() {
    let mut bench = Bench::with(FsConfig { read_only: true, ..config() });
    fs::write(bench.path("file"), "x").unwrap();
    let node = bench.lookup(ROOT, "file").unwrap();
    let handle = bench.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(bench.read((node, handle), 0, 9).unwrap(), b"x");
    assert_eq!(bench.open(node, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(bench.open(node, libc::O_RDONLY | libc::O_TRUNC), Err(libc::EROFS));
    assert_eq!(bench.create("new", 0o600, 0), Err(libc::EROFS));
    assert_eq!(bench.mknod("new", libc::S_IFREG | 0o600, 0), Err(libc::EROFS));
    assert_eq!(bench.rename("file", "new", 0), Err(libc::EROFS));
    assert_eq!(bench.call(10, ROOT, &text("file")), Err(libc::EROFS));
    assert_eq!(bench.setattr(node, 1, &[(68, 0o777)]), Err(libc::EROFS));
    assert_eq!(bench.set_xattr(node, "user.a", b"x"), Err(libc::EROFS));
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 1);
}

/// Pages of a guest's cache are written by any handle, also by one that was opened to append: that must not
/// make a file writable that nothing else does.
#[test]
fn a_file_that_is_only_read_is_not_written_from_the_cache_either() {
    let append = libc::O_RDONLY | libc::O_APPEND;
    for (read_only, refusal) in [(true, libc::EROFS), (false, libc::EBADF)] {
        let mut bench = Bench::with(FsConfig { read_only, ..config() });
        fs::write(bench.path("file"), "x").unwrap();
        let node = bench.lookup(ROOT, "file").unwrap();
        let handle = bench.open(node, append).unwrap();
        for flags in [0, fuse_backend_rs::abi::fuse_abi::WRITE_CACHE] {
            assert_eq!(bench.write((node, handle), 0, flags, b"y"), Err(refusal), "{read_only} {flags}");
        }
        let fallocate = [handle, 0, 9, 0].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(bench.call(43, node, &fallocate), Err(refusal));
        assert_eq!(fs::read(bench.path("file")).unwrap(), b"x");
    }
}

#[test]
fn is_saved_only_while_not_mounted() {
    let mut bench = Bench::unmounted(config());
    let queues = bench.fs.quiesce().unwrap();
    let state = bench.fs.state();
    assert_eq!((queues.len(), &state.config), (2, &config()));
    let on = |config| FsResources { config, root: directory(bench.dir.path()), workers: workers(1, || {}) };
    let restored = Fs::restore(&state, on(config())).unwrap();
    let other_tag = FsConfig { tag: "other".into(), ..config() };
    assert!(Fs::restore(&state, on(other_tag)).is_err(), "the guest has seen the tag");
    let unseen =
        FsConfig { read_only: true, cache: caisson_vmm_api::devices::CachePolicy::Never, ..config() };
    assert!(Fs::restore(&state, on(unseen)).is_ok());
    assert_eq!(restored.config, config());
    let refused = |bench: &mut Bench| {
        let refused = bench.fs.quiesce().unwrap_err();
        matches!(refused, DeviceError::Backend(error) if error.kind() == io::ErrorKind::Unsupported)
    };
    bench.init().unwrap();
    assert!(refused(&mut bench), "also while the guest has looked at nothing");
    let file = bench.create("file", 0o600, 0).unwrap();
    assert!(refused(&mut bench));
    bench.call(38, 0, &[]).unwrap();
    bench.fs.quiesce().unwrap();
    bench.init().unwrap();
    bench.fs.reset();
    assert_eq!(bench.fs.share.held(), (0, 0), "{file:?}");
    bench.fs.quiesce().unwrap();
}

/// A file system in memory, mounted until it is dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn on(directory: std::path::PathBuf) -> Self {
        fs::create_dir_all(&directory).unwrap();
        let run = std::process::Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&directory).status();
        assert!(run.unwrap().success());
        Self(directory)
    }

    fn unmount(&self) -> bool {
        let target = std::ffi::CString::new(self.0.to_str().unwrap()).unwrap();
        // SAFETY: the string outlives the call.
        unsafe { libc::umount2(target.as_ptr(), 0) == 0 }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount();
    }
}

#[test]
fn what_the_host_mounts_in_a_volume_is_not_held_for_longer_than_it_is_used() {
    let mut bench = Bench::new();
    let volume = Mounted::on(bench.path("volume"));
    let late = Mounted::on(volume.0.join("late"));
    fs::create_dir(late.0.join("deep")).unwrap();
    // An entry's node, for how many seconds its name and attributes are valid, and its flags.
    let mut find = |parent, name: &str| {
        let reply = bench.call(1, parent, &[name.as_bytes(), b"\0"].concat()).unwrap();
        (long(&reply, 0), long(&reply, 16), long(&reply, 24), word(&reply, 124))
    };
    let (of_volume, name, attributes, flags) = find(ROOT, "volume");
    assert_eq!((name, attributes, flags), (1, 1, 1), "a mount in the guest too");
    let (of_late, name, attributes, flags) = find(of_volume, "late");
    assert_eq!((name, attributes, flags), (0, 0, 0));
    let (of_deep, name, attributes, flags) = find(of_late, "deep");
    assert_eq!((name, attributes, flags), (0, 0, 0));
    assert!(!late.unmount(), "it is held");
    bench.forget(of_deep, 1);
    bench.forget(of_late, 1);
    bench.settle();
    assert!(late.unmount());
    bench.forget(of_volume, 1);
    bench.settle();
}
