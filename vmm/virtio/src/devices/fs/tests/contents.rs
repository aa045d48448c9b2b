//! What the FUSE library does not know, and what of a file's contents a guest may keep.

use std::{fs, os::unix::fs::MetadataExt, time::Duration};

use caisson_vmm_api::devices::{CachePolicy, FsConfig};

use super::bench::*;

const OPEN_KEEP_CACHE: u32 = 2;

#[test]
fn copies_on_the_host() {
    let mut bench = Bench::new();
    let (from, to) = two_files(&mut bench);
    let reply = bench.call(47, from.0, &copy_in((from.1, 5), to, 100, 0)).unwrap();
    assert_eq!(word(&reply, 0), 13);
    assert_eq!(fs::read(bench.path("to")).unwrap(), b"bytes to copy");
    assert_eq!(word(&bench.call(47, from.0, &copy_in((from.1, 99), to, 100, 0)).unwrap(), 0), 0);
}

#[test]
fn copies_only_what_is_open_and_in_range() {
    let mut bench = Bench::new();
    let (from, to) = two_files(&mut bench);
    for (body, expected) in [
        (copy_in((to.1, 0), to, 1, 0), libc::EBADF),
        (copy_in((from.1, 0), (to.0, from.1), 1, 0), libc::EBADF),
        (copy_in((from.1, 0), (99, to.1), 1, 0), libc::EBADF),
        (copy_in((from.1, 0), to, 1, 1), libc::EINVAL),
        (copy_in((from.1, u64::MAX), to, 1, 0), libc::EINVAL),
        (copy_in((from.1, 0), to, 1, 0)[..48].to_vec(), libc::EINVAL),
    ] {
        assert_eq!(bench.call(47, from.0, &body), Err(expected), "{body:?}");
    }
    assert_eq!(fs::read(bench.path("to")).unwrap(), b"");
    // As much as there is, and no more than one request may take.
    let reply = bench.call(47, from.0, &copy_in((from.1, 0), to, u64::MAX, 0)).unwrap();
    assert_eq!(word(&reply, 0), 18);
    fs::File::options().write(true).open(bench.path("from")).unwrap().set_len(64 << 20).unwrap();
    let reply = bench.call(47, from.0, &copy_in((from.1, 0), to, u64::MAX, 0)).unwrap();
    assert!((1..=16 << 20).contains(&word(&reply, 0)), "{}", word(&reply, 0));
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let mut bench = Bench::new();
    let file = unnamed(&mut bench, ROOT, 0).unwrap();
    bench.write(file, 0, 0, b"unnamed").unwrap();
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 0);
    let link = |file: (u64, u64), name: &str| [file.0.to_le_bytes().to_vec(), text(name)].concat();
    bench.call(13, ROOT, &link(file, "named")).unwrap();
    assert_eq!(fs::read(bench.path("named")).unwrap(), b"unnamed");
    assert_eq!(fs::metadata(bench.path("named")).unwrap().mode() & 0o7777, 0o640);
    let file = unnamed(&mut bench, ROOT, libc::O_EXCL).unwrap();
    assert_eq!(bench.call(13, ROOT, &link(file, "never")), Err(libc::ENOENT));
    assert_eq!(unnamed(&mut bench, file.0, 0), Err(libc::ENOTDIR));
    assert_eq!(unnamed(&mut bench, 99, 0), Err(libc::ESTALE));
}

#[test]
fn a_file_without_a_name_counts() {
    let mut bench = Bench::with(FsConfig { max_descriptors: 3, ..config() });
    let file = unnamed(&mut bench, ROOT, 0).unwrap();
    assert_eq!(unnamed(&mut bench, ROOT, 0), Err(libc::ENFILE), "there is room for one of the two");
    assert_eq!(bench.fs.share.held(), (1, 1), "what was begun is undone");
    bench.release(file).unwrap();
    bench.forget(file.0, 1);
    unnamed(&mut bench, ROOT, 0).unwrap();
}

#[test]
fn tells_when_a_file_was_made_and_nothing_of_the_hosts_mounts() {
    let mut bench = Bench::new();
    fs::write(bench.path("file"), "1234").unwrap();
    let node = bench.lookup(ROOT, "file").unwrap();
    let meta = fs::metadata(bench.path("file")).unwrap();
    let reply = bench.call(52, node, &statx_in(libc::STATX_BASIC_STATS | libc::STATX_BTIME)).unwrap();
    assert_eq!(reply.len(), 288);
    let stat = &reply[32..];
    assert_eq!(word(stat, 0) & libc::STATX_BASIC_STATS, libc::STATX_BASIC_STATS);
    assert_eq!((long(stat, 32), long(stat, 40)), (meta.ino(), 4));
    assert_eq!((word(stat, 16), word(stat, 20), word(stat, 28)), (1, meta.uid(), meta.mode()));
    assert_eq!(
        (long(stat, 112).cast_signed(), i64::from(word(stat, 120))),
        (meta.mtime(), meta.mtime_nsec())
    );
    if let Ok(created) = meta.created() {
        let created = created.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert_eq!((long(stat, 80), word(stat, 88)), (created.as_secs(), created.subsec_nanos()));
    }
    assert!(stat[144..].iter().all(|byte| *byte == 0));
    assert_eq!(bench.call(52, node, &statx_in(0)[..23]), Err(libc::EINVAL));
    assert_eq!(bench.call(52, 99, &statx_in(0)), Err(libc::ESTALE));
}

#[test]
fn syncs_the_file_system_of_a_directory() {
    let mut bench = Bench::new();
    let file = bench.create("file", 0o600, 0).unwrap();
    bench.call(50, ROOT, &[0; 8]).unwrap();
    assert_eq!(bench.call(50, file.0, &[0; 8]), Err(libc::ENOTDIR));
    assert_eq!(bench.call(50, 99, &[0; 8]), Err(libc::ESTALE));
}

#[test]
fn a_read_only_share_has_none_of_it() {
    let mut bench = Bench::with(FsConfig { read_only: true, ..config() });
    fs::write(bench.path("file"), "x").unwrap();
    let node = bench.lookup(ROOT, "file").unwrap();
    let handle = bench.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(bench.call(47, node, &copy_in((handle, 0), (node, handle), 1, 0)), Err(libc::EROFS));
    assert_eq!(unnamed(&mut bench, ROOT, 0), Err(libc::EROFS));
    bench.call(50, ROOT, &[0; 8]).unwrap();
    bench.call(52, node, &statx_in(libc::STATX_BTIME)).unwrap();
}

#[test]
fn mapped_pages_are_written_in_place_by_a_handle_that_appends() {
    let mut bench = Bench::new();
    fs::write(bench.path("log"), vec![1; 8192]).unwrap();
    let node = bench.lookup(ROOT, "log").unwrap();
    let handle = bench.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    // FUSE_WRITE_CACHE
    bench.write((node, handle), 4096, 1, &[2; 4096]).unwrap();
    let log = fs::read(bench.path("log")).unwrap();
    assert_eq!((log.len(), log[4095], log[4096]), (8192, 1, 2));
    bench.write((node, handle), 0, 0, b"end").unwrap();
    assert_eq!(fs::read(bench.path("log")).unwrap()[8192..], *b"end");
}

#[test]
fn cached_contents_are_kept_while_the_file_is_what_the_guest_was_told() {
    let mut bench = Bench::new();
    fs::write(bench.path("file"), "old").unwrap();
    // Past the tick in which another change would not show.
    let pause = || std::thread::sleep(Duration::from_millis(60));
    pause();
    let node = bench.lookup(ROOT, "file").unwrap();
    let keeps = |bench: &mut Bench| {
        let reply = bench.call(14, node, &words(&[0, 0])).unwrap();
        word(&reply, 8) & OPEN_KEEP_CACHE != 0
    };
    assert!(keeps(&mut bench) && keeps(&mut bench));
    fs::write(bench.path("file"), "new").unwrap();
    assert!(!keeps(&mut bench), "somebody else changed it");
    bench.attributes(node);
    assert!(!keeps(&mut bench), "it was told at once, and may have changed again since");
    pause();
    bench.attributes(node);
    assert!(keeps(&mut bench));

    let mut never = Bench::with(FsConfig { cache: CachePolicy::Never, ..config() });
    fs::write(never.path("file"), "x").unwrap();
    pause();
    let node = never.lookup(ROOT, "file").unwrap();
    let reply = never.call(14, node, &words(&[0, 0])).unwrap();
    assert_eq!(word(&reply, 8) & 3, 1, "around the cache");
}

#[test]
fn only_who_may_have_something_to_say_says_when_it_closes_a_file() {
    const NO_FLUSH: u32 = 1 << 5;
    // On a file system of this machine's own.
    let mut bench = Bench::new();
    fs::write(bench.path("file"), "x").unwrap();
    let node = bench.lookup(ROOT, "file").unwrap();
    for (flags, expected) in [(libc::O_RDONLY, NO_FLUSH), (libc::O_WRONLY, NO_FLUSH), (libc::O_RDWR, 0)] {
        let reply = bench.call(14, node, &words(&[flags.cast_unsigned(), 0])).unwrap();
        assert_eq!(word(&reply, 8) & NO_FLUSH, expected, "{flags}");
    }
}
