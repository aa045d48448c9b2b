//! Guests that mean harm.

use caisson_vmm_api::devices::FsConfig;
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::{super::*, bench::*};
use crate::mock::{Buffer, MockQueue};

#[test]
fn names_that_are_more_than_a_name_are_refused() {
    let mut bench = Bench::new();
    std::fs::write(bench.path("file"), "x").unwrap();
    let file = bench.lookup(ROOT, "file").unwrap();
    let long = "n".repeat(256);
    for name in ["", ".", "..", "/", "a/b", "../a", "/etc/passwd", &long] {
        let expected = if name.len() > 255 { libc::ENAMETOOLONG } else { libc::EINVAL };
        let one = |body: &[u8]| [body.to_vec(), text(name)].concat();
        let other = |body: &[u8]| [body.to_vec(), text("file"), text(name)].concat();
        let requests = [
            ("lookup", 1, one(&[])),
            ("symlink", 6, [text(name), text("target")].concat()),
            ("mknod", 8, one(&words(&[libc::S_IFREG | 0o600, 0, 0, 0]))),
            ("mkdir", 9, one(&words(&[0o700, 0]))),
            ("unlink", 10, one(&[])),
            ("rmdir", 11, one(&[])),
            ("rename from", 12, [ROOT.to_le_bytes().to_vec(), text(name), text("new")].concat()),
            ("rename to", 12, other(&ROOT.to_le_bytes())),
            ("rename2 to", 45, other(&[&ROOT.to_le_bytes()[..], &[0; 8]].concat())),
            ("link", 13, one(&file.to_le_bytes())),
            ("create", 35, one(&words(&[2, 0o600, 0, 0]))),
        ];
        for (what, opcode, body) in requests {
            assert_eq!(bench.call(opcode, ROOT, &body), Err(expected), "{what} {name:?}");
        }
    }
    assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 1);
}

#[test]
fn a_name_ends_at_its_first_zero_byte() {
    let mut bench = Bench::new();
    std::fs::write(bench.path("a"), "").unwrap();
    let node = bench.lookup(ROOT, "a").unwrap();
    for name in [&b"a\0/etc/passwd\0"[..], b"a\0..\0", b"a\0\0"] {
        let found = bench.call(1, ROOT, name).map(|reply| long(&reply, 0));
        assert!(matches!(found, Err(libc::EINVAL)) || found == Ok(node), "{name:?}: {found:?}");
    }
    for name in [&b""[..], b"a", b"\0", b"\0a\0"] {
        assert_eq!(bench.call(1, ROOT, name), Err(libc::EINVAL), "{name:?}");
    }
    // Two names, of which the second is not ended, or is missing.
    for names in [&b"a\0b"[..], b"a\0", b"a"] {
        let body = [&ROOT.to_le_bytes()[..], names].concat();
        assert_eq!(bench.call(12, ROOT, &body), Err(libc::EINVAL), "{names:?}");
    }
    assert!(bench.path("a").exists() && !bench.path("b").exists());
}

/// Magic links lead a process of the host out of any directory. A guest is shown where they point, and no
/// more.
#[test]
fn magic_links_lead_nowhere() {
    let mut bench = Bench::new();
    let own = format!("/proc/{}", std::process::id());
    bench.fs.reset();
    bench.fs = Fs::new(config(), directory(own), workers(1, || {})).unwrap();
    bench.queues = [MockQueue::new(&bench.mem, 0, QUEUE), MockQueue::new(&bench.mem, 0x4000, QUEUE)];
    bench.activate().unwrap();
    bench.init().unwrap();
    for name in ["root", "cwd", "exe"] {
        let link = bench.lookup(ROOT, name).unwrap();
        assert_eq!(bench.attributes(link).0 & libc::S_IFMT, libc::S_IFLNK, "{name}");
        assert_eq!(bench.lookup(link, "etc"), Err(libc::ENOTDIR));
        assert_eq!(bench.call(27, link, &[0; 8]), Err(libc::ENOTDIR));
        assert_eq!(bench.open(link, libc::O_RDONLY), Err(libc::ENXIO));
    }
}

#[test]
fn a_tree_may_be_as_deep_as_there_are_descriptors() {
    let mut bench = Bench::with(FsConfig { max_descriptors: 200, ..config() });
    let body = [words(&[0o700, 0]), text("d")].concat();
    let mut at = ROOT;
    for _ in 0..200 {
        at = bench.call(9, at, &body).map(|reply| long(&reply, 0)).unwrap();
    }
    assert_eq!(bench.call(9, at, &body), Err(libc::ENFILE));
    // Those above may be forgotten, what is below is held all the same.
    for node in 2..150 {
        bench.forget(node, 1);
    }
    for _ in 0..100 {
        at = bench.call(9, at, &body).map(|reply| long(&reply, 0)).unwrap();
    }
}

#[test]
fn a_directory_with_very_many_files_is_read_in_pieces() {
    let mut bench = Bench::with(FsConfig { max_descriptors: 50, ..config() });
    for i in 0..3_000 {
        std::fs::write(bench.path(&format!("{i:0>200}")), "").unwrap();
    }
    let handle = long(&bench.call(27, ROOT, &words(&[0, 0])).unwrap(), 0);
    for opcode in [28, 44] {
        for (offset, size) in [(0, u32::MAX), (0, 1 << 20), (u64::MAX, 4096), (1 << 62, 0), (0, 1)] {
            match bench.call(opcode, ROOT, &read_in(handle, offset, size)) {
                // What one call reads of the host is bounded, whatever there is room for.
                Ok(reply) => assert!(reply.len() <= 256 << 10, "{}", reply.len()),
                Err(error) => assert!([libc::EINVAL, libc::ENOMEM].contains(&error), "{error}"),
            }
        }
    }
    let (inodes, handles) = bench.fs.share.held();
    assert!(inodes + handles <= 50, "READDIRPLUS looks up no more than may be held");
}

/// While one goes down a tree, its directories go elsewhere: every step is from the directory that is held.
#[test]
fn directories_that_move_are_still_the_same_ones() {
    let mut bench = Bench::new();
    let (inside, outside) = (bench.path("a"), TempDir::new().unwrap());
    std::fs::create_dir_all(inside.join("b/c")).unwrap();
    std::fs::write(bench.path("a/b/c/file"), "right").unwrap();
    std::fs::write(outside.path().join("file"), "wrong").unwrap();
    let (from, elsewhere) = (bench.path("a/b"), bench.path("moved"));
    let stop = Arc::new(AtomicBool::new(false));
    let mover = std::thread::spawn({
        let stop = stop.clone();
        let outside = outside.path().to_owned();
        move || {
            while !stop.load(Ordering::Relaxed) {
                std::fs::rename(&from, &elsewhere).unwrap();
                std::os::unix::fs::symlink(&outside, &from).unwrap();
                std::fs::remove_file(&from).unwrap();
                std::fs::rename(&elsewhere, &from).unwrap();
            }
        }
    });
    let a = bench.lookup(ROOT, "a").unwrap();
    for _ in 0..300 {
        let Ok(b) = bench.lookup(a, "b") else { continue };
        match bench.lookup(b, "c").and_then(|c| bench.lookup(c, "file")) {
            Ok(file) => {
                let handle = bench.open(file, libc::O_RDONLY).unwrap();
                assert_eq!(bench.read((file, handle), 0, 9).unwrap(), b"right");
                bench.release((file, handle)).unwrap();
            }
            // Just then it was the link.
            Err(error) => assert_eq!(error, libc::ENOTDIR),
        }
    }
    stop.store(true, Ordering::Relaxed);
    mover.join().unwrap();
}

#[test]
fn a_guest_holds_no_more_than_its_share_of_descriptors() {
    let mut bench = Bench::with(FsConfig { max_descriptors: 4, ..config() });
    for i in 0..5 {
        std::fs::write(bench.path(&i.to_string()), "").unwrap();
    }
    let nodes: Vec<_> = (0..4).map(|i| bench.lookup(ROOT, &i.to_string()).unwrap()).collect();
    assert_eq!(bench.lookup(ROOT, "4"), Err(libc::ENFILE));
    assert_eq!(bench.open(nodes[0], libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(bench.create("new", 0o600, 0), Err(libc::ENFILE));
    assert_eq!(bench.mknod("new", libc::S_IFREG | 0o600, 0), Err(libc::ENFILE));
    assert!(!bench.path("new").exists());
    bench.forget(nodes[3], 1);
    let handle = bench.open(nodes[0], libc::O_RDONLY).unwrap();
    assert_eq!(bench.open(nodes[0], libc::O_RDONLY), Err(libc::ENFILE));
    bench.release((nodes[0], handle)).unwrap();
    bench.lookup(ROOT, "4").unwrap();
}

#[test]
fn no_configuration_gives_a_guest_all_descriptors() {
    let (limit, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let possible = workers(1, || {}).spare_descriptors();
    assert_eq!(possible as u64, limit - 2048.min(limit / 2));
    let spare = [1024, 4096, 1 << 20].map(crate::devices::fs::config::spare_descriptors);
    assert_eq!(spare, [512, 2048, (1 << 20) - 2048]);
    let limit = |max_descriptors| FsConfig { max_descriptors, ..config() }.descriptor_limit(possible);
    assert_eq!((limit(0), limit(7), limit(u32::MAX)), (possible, 7, possible.min(u32::MAX as usize)));
}

#[test]
fn what_is_not_served_does_not_exist() {
    let mut bench = Bench::new();
    for opcode in [0, 7, 31, 32, 33, 37, 39, 40, 41, 48, 49, 53, 4096, u32::MAX] {
        assert_eq!(bench.call(opcode, ROOT, &[0; 64]), Err(libc::ENOSYS), "{opcode}");
    }
    assert_eq!(bench.call(1, 77, &text("name")), Err(libc::ESTALE));
    assert_eq!(bench.fs.metrics.refused.get(), 14);
}

#[test]
fn handles_are_of_one_file() {
    let mut bench = Bench::new();
    let (a, b) = (bench.create("a", 0o600, 0).unwrap(), bench.create("b", 0o600, 0).unwrap());
    assert_eq!(bench.read((a.0, b.1), 0, 1), Err(libc::EBADF));
    assert_eq!(bench.write((a.0, b.1), 0, 0, b"x"), Err(libc::EBADF));
    assert_eq!(bench.release((a.0, b.1)), Err(libc::EBADF));
    assert_eq!(bench.call(28, a.0, &read_in(a.1, 0, 4096)), Err(libc::ENOTDIR));
}

#[test]
fn short_and_shapeless_chains_are_only_given_back() {
    let mut bench = Bench::new();
    let message = bench.message(1, ROOT, &text("x"));
    assert_eq!(bench.raw(1, &message[..39], 100), 0, "no header");
    assert_eq!(bench.raw(1, &message, 15), 0, "no room for an answer");
    assert_eq!(bench.raw(1, &message, 0), 0);
    assert_eq!(bench.raw(1, &message[..40], 100), 16, "shorter than it says");
    let head = bench.queues[1].add(&[Buffer::writable(REPLY, 64), Buffer::readable(REQUEST, 64)]);
    bench.fs.process(DeviceEvent::Queue(1)).unwrap();
    bench.settle();
    assert_eq!(bench.queues[1].used(), [(head, 0)]);
    let head = bench.queues[1].add(&[Buffer::readable(u64::MAX - 8, 64), Buffer::writable(REPLY, 64)]);
    bench.fs.process(DeviceEvent::Queue(1)).unwrap();
    bench.settle();
    assert_eq!(bench.queues[1].used(), [(head, 0)]);
    assert_eq!(bench.lookup(ROOT, "x"), Err(libc::ENOENT), "it goes on");
}

#[test]
fn a_broken_ring_ends_the_device() {
    let mut bench = Bench::new();
    bench.queues[1].set_available(5_000);
    assert!(matches!(
        bench.fs.process(DeviceEvent::Queue(1)),
        Err(DeviceError::AvailableIndex { queue: 1, .. })
    ));
    bench.fs.reset();
    bench.queues = [MockQueue::new(&bench.mem, 0, QUEUE), MockQueue::new(&bench.mem, 0x4000, QUEUE)];
    bench.activate().unwrap();
    bench.init().unwrap();
}

/// A driver that sees an entry come back may offer it again before the worker is done with the job.
#[test]
fn an_entry_that_was_given_back_may_be_used_at_once() {
    let bench = Bench::new();
    let active = bench.fs.active.as_ref().unwrap();
    for _ in 0..QUEUE {
        active.begin(1, QUEUE).unwrap();
    }
    assert!(matches!(active.begin(1, QUEUE), Err(DeviceError::Driver { queue: 1, .. })));
    active.complete(1, Head::restored(0), 0).unwrap();
    active.begin(1, QUEUE).unwrap();
    assert!(active.begin(1, QUEUE).is_err());
    assert_eq!(lock(&active.in_flight).jobs, usize::from(QUEUE) + 1, "none of them has ended");
    for _ in 0..=QUEUE {
        active.end();
    }
    active.wait();
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let mut bench = Bench::new();
    std::fs::write(bench.path("file"), vec![7; 4096]).unwrap();
    let node = bench.lookup(ROOT, "file").unwrap();
    let handle = bench.open(node, libc::O_RDONLY).unwrap();
    let message = bench.message(15, node, &read_in(handle, 0, 4096));
    bench.mem.write_slice(&message, GuestAddress(REQUEST)).unwrap();
    let len = u32::try_from(message.len()).unwrap();
    bench.interrupt.take_queue();
    for _ in 0..20 {
        for n in 0..u64::from(QUEUE / 2) {
            let buffers = [Buffer::readable(REQUEST, len), Buffer::writable(REPLY + n * 0x2000, 4112)];
            bench.queues[1].add(&buffers);
        }
        bench.fs.process(DeviceEvent::Queue(1)).unwrap();
        bench.settle();
        let used = bench.queues[1].used();
        assert_eq!((used.len(), used.iter().all(|used| used.1 == 4112)), (32, true));
    }
    assert!(bench.interrupt.take_queue() > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random bytes after a header that is right, of random length, into random room.
    #[test]
    fn no_message_does_harm(
        messages in prop::collection::vec(
            (1u32..54, 0u64..4, prop::collection::vec(any::<u8>(), 0..200), 0u32..300, any::<bool>()),
            1..40,
        ),
    ) {
        let mut bench = Bench::new();
        bench.create("file", 0o600, 0).unwrap();
        for (opcode, node, body, room, urgent) in messages {
            let message = bench.message(opcode, node, &body);
            prop_assert!(bench.raw(usize::from(!urgent), &message, room) <= room);
        }
        bench.init().unwrap();
        prop_assert_eq!(bench.attributes(ROOT).0 & libc::S_IFMT, libc::S_IFDIR);
    }

    /// Nothing but random bytes.
    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 1..2000), room in 0u32..5000) {
        let mut bench = Bench::new();
        prop_assert!(bench.raw(1, &bytes, room) <= room);
    }

    /// Descriptors of any kind, in any order: an error or an answer, and never a hang.
    #[test]
    fn no_chain_does_harm(
        descriptors in prop::collection::vec((0u64..0x60_0000, 0u32..0x10_0000, 0u16..8, 0u16..QUEUE), 1..16),
        heads in prop::collection::vec(0u16..QUEUE, 1..8),
    ) {
        let mut bench = Bench::new();
        for (index, (addr, len, flags, next)) in (0..).zip(descriptors) {
            bench.queues[1].raw_descriptor(index, addr, len, flags, next);
        }
        heads.into_iter().for_each(|head| bench.queues[1].offer(head));
        let _ = bench.fs.process(DeviceEvent::Queue(1));
        bench.settle();
        bench.fs.reset();
    }
}
