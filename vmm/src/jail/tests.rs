//! The jail is entered for real, by a child of the test; what it sees there it tells through a descriptor
//! that it was allowed to keep. These tests need root, or a host that lets users have namespaces.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
    path::Path,
    time::{Duration, Instant},
};

use caisson_vmm_api::jail::{SHARE, SeccompMode};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
        wait::{WaitStatus, waitpid},
    },
    unistd::{Pid, pipe},
};

use super::*;

/// What a jailed process leaves behind.
struct Outcome {
    /// How the parent ended, which is how the inner process did.
    status: WaitStatus,
    /// What the inner process wrote.
    report: String,
}

/// A process that enters a jail and runs `body` in it, with a descriptor to write to.
struct Jailed {
    parent: Pid,
    report: BufReader<File>,
    ended: bool,
}

impl Jailed {
    fn start(config: JailConfig, body: impl FnOnce(Inside, &mut File) -> i32) -> Self {
        let (read, write) = pipe().unwrap();
        // SAFETY: the child runs the jail and the body and exits; the C library keeps its allocator usable
        // over a fork.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                drop(write);
                Self { parent: child, report: BufReader::new(File::from(read)), ended: false }
            }
            ForkResult::Child => {
                drop(read);
                run(config, write, body)
            }
        }
    }

    /// The next line that the inner process writes.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.report.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn finish(mut self) -> Outcome {
        let mut report = String::new();
        self.report.read_to_string(&mut report).unwrap();
        let status = waitpid(self.parent, None).unwrap();
        self.ended = true;
        Outcome { status, report }
    }
}

/// A test that fails leaves no jailed process behind.
impl Drop for Jailed {
    fn drop(&mut self) {
        if !self.ended {
            let _ = kill(self.parent, Signal::SIGKILL);
            let _ = waitpid(self.parent, None);
        }
    }
}

fn run(config: JailConfig, write: OwnedFd, body: impl FnOnce(Inside, &mut File) -> i32) -> ! {
    let keep = vec![write.as_raw_fd()];
    // Whatever the harness has open is not ours to keep open.
    let mut report = File::from(write);
    let code = match Jail::new(config, keep).and_then(Jail::enter) {
        Ok(Side::Inside(inside)) => body(inside, &mut report),
        Ok(Side::Outside(ended)) => ended.mirror(),
        Err(error) => {
            let _ = writeln!(report, "error: {error}: {:?}", std::error::Error::source(&error));
            99
        }
    };
    // SAFETY: ends the process without running the test harness's exit handlers.
    unsafe { libc::_exit(code) }
}

fn jailed(config: JailConfig, body: impl FnOnce(Inside, &mut File) -> i32) -> Outcome {
    Jailed::start(config, body).finish()
}

/// What /proc says of a process that is still in its jail. `line` is its first, by which the test knows that
/// it is.
fn host_view(jailed: &mut Jailed) -> (Pid, String) {
    assert_eq!(jailed.line(), "inside");
    let children = format!("/proc/{0}/task/{0}/children", jailed.parent);
    let children = std::fs::read_to_string(children).unwrap();
    let inner = Pid::from_raw(children.trim().parse().unwrap());
    (inner, std::fs::read_to_string(format!("/proc/{inner}/status")).unwrap())
}

/// Says that it is inside, and waits to be killed.
fn stay(_: Inside, report: &mut File) -> i32 {
    report.write_all(b"inside\n").unwrap();
    std::thread::sleep(Duration::from_secs(600));
    0
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').split_whitespace().collect()
}

fn namespace(pid: Pid, kind: &str) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

#[test]
fn a_file_that_grows_too_long_is_an_error_and_not_the_end() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let config = JailConfig { max_file_size: Some(4096), ..JailConfig::default() };
    let outcome = jailed(config, |_, report| {
        let file = File::from(memfd_create("file", MFdFlags::MFD_CLOEXEC).unwrap());
        let write = |at| file.write_at(b"x", at).map_err(|error| error.raw_os_error());
        writeln!(report, "{:?}", (write(4095), write(4096) == Err(Some(libc::EFBIG)))).unwrap();
        0
    });
    assert_eq!(outcome.report, "(Ok(1), true)\n");
    assert!(matches!(outcome.status, WaitStatus::Exited(_, 0)), "{:?}", outcome.status);
}

#[test]
fn nothing_is_left() {
    let mut jailed = Jailed::start(JailConfig::default(), stay);
    let (inner, status) = host_view(&mut jailed);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
    assert!(field(&status, "Groups").is_empty());
    assert_eq!(*field(&status, "NSpid").last().unwrap(), "1");
    let uid = field(&status, "Uid");
    assert!(uid.iter().all(|id| *id == uid[0] && *id != "0"), "{uid:?}");
    // A process that cannot be dumped belongs to root in /proc, and only root sees more of it than its
    // status.
    assert_eq!(std::fs::metadata(format!("/proc/{inner}/mem")).unwrap().uid(), 0);
    if !is_root().unwrap() {
        assert!(std::fs::read_link(format!("/proc/{inner}/ns/user")).is_err());
        return;
    }
    for kind in ["user", "mnt", "pid", "ipc", "net", "uts", "cgroup"] {
        assert_ne!(namespace(inner, kind), namespace(Pid::this(), kind), "{kind}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{inner}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    // 0 to 2, the report, and the link to the parent until it is dropped.
    let open = std::fs::read_dir(format!("/proc/{inner}/fd")).unwrap().count();
    assert!(open <= 5, "{open} descriptors");
    assert_eq!(std::fs::read_dir(format!("/proc/{inner}/root")).unwrap().count(), 0);

    kill(jailed.parent, Signal::SIGKILL).unwrap();
    jailed.finish();
}

#[test]
fn the_root_is_empty_and_stays_so() {
    let outcome = jailed(JailConfig::default(), |_, report| {
        let listing = std::fs::read_dir("/").map(Iterator::count);
        let write = File::create("/file").is_err();
        let up = File::open("/../../etc/passwd").is_err() && File::open("/proc/self/status").is_err();
        writeln!(report, "{} {write} {up}", listing.unwrap_or(0)).unwrap();
        0
    });
    assert_eq!((outcome.report.as_str(), outcome.status), ("0 true true\n", exited(&outcome, 0)));
}

fn exited(outcome: &Outcome, code: i32) -> WaitStatus {
    WaitStatus::Exited(outcome.status.pid().unwrap(), code)
}

#[test]
fn exit_codes_and_signals_are_passed_on() {
    let outcome = jailed(JailConfig::default(), |_, _| 42);
    assert_eq!(outcome.status, exited(&outcome, 42));
    let mut killed = Jailed::start(JailConfig::default(), stay);
    kill(host_view(&mut killed).0, Signal::SIGKILL).unwrap();
    let outcome = killed.finish();
    assert!(matches!(outcome.status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{:?}", outcome.status);
    let outcome = jailed(JailConfig::default(), |_, _| {
        let _ = crate::seccomp::apply(crate::seccomp::Thread::Vcpu, SeccompMode::Kill);
        i32::from(File::open("/").is_ok())
    });
    assert!(matches!(outcome.status, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{:?}", outcome.status);
}

#[test]
fn the_inner_process_dies_with_its_supervisor() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut jailed = Jailed::start(JailConfig::default(), stay);
        let (inner, _) = host_view(&mut jailed);
        kill(jailed.parent, signal).unwrap();
        let outcome = jailed.finish();
        assert!(matches!(outcome.status, WaitStatus::Signaled(_, ended, _) if ended == signal));
        let deadline = Instant::now() + Duration::from_secs(10);
        while alive(inner) {
            assert!(Instant::now() < deadline, "still there after {signal}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A zombie is dead, even if whoever adopted it has not looked yet.
fn alive(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

#[test]
fn the_share_is_served_and_later_mounts_come_in() {
    if !is_root().unwrap() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let share = host.path().join("share");
    std::fs::create_dir_all(share.join("sub")).unwrap();
    // As the shim does: a mount of its own, whose mounts are passed on.
    let none = None::<&str>;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    mount(Some(&share), &share, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, &share, none, MsFlags::MS_SHARED, none).unwrap();
    std::fs::write(share.join("file"), "content").unwrap();
    std::fs::set_permissions(&share, PermissionsExt::from_mode(0o777)).unwrap();
    std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o755)).unwrap();

    let config = JailConfig { share: Some(share.clone()), ..JailConfig::default() };
    let mut jailed = Jailed::start(config, |inside, report| {
        let content = std::fs::read_to_string(format!("{SHARE}/file")).unwrap_or_default();
        let device = nix::sys::stat::mknod(
            Path::new("/share/null"),
            nix::sys::stat::SFlag::S_IFCHR,
            Mode::empty(),
            nix::sys::stat::makedev(1, 3),
        );
        writeln!(report, "inside\n{content} {} {}", device.is_err(), inside.share_capabilities).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !Path::new("/share/sub/late").exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        i32::from(!Path::new("/share/sub/late").exists())
    });
    let (inner, status) = host_view(&mut jailed);
    assert_eq!(field(&status, "CapEff"), ["0000000000000000"], "only a thread that asks has them");
    assert_eq!(
        field(&status, "CapPrm"),
        ["00000000800000db"],
        "chown, dac_override, fowner, fsetid, set[ug]id, setfcap"
    );
    assert_eq!(field(&status, "CapBnd"), ["0000000000000000"]);
    assert_eq!(jailed.line(), "content true true");
    let root = std::fs::read_dir(format!("/proc/{inner}/root")).unwrap();
    let root: Vec<_> = root.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(root, ["share"]);
    mount(Some("late"), &share.join("sub"), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    std::fs::write(share.join("sub/late"), "").unwrap();
    let outcome = jailed.finish();
    umount2(&share.join("sub"), MntFlags::MNT_DETACH).unwrap();
    umount2(&share, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(outcome.status, exited(&outcome, 0), "{}", outcome.report);
}

#[test]
fn capabilities_for_the_share_are_a_threads_own_business() {
    if !is_root().unwrap() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let config = JailConfig { share: Some(host.path().into()), id_count: 65536, ..JailConfig::default() };
    let outcome = jailed(config, |_, report| {
        let effective = || caps::read(None, CapSet::Effective).unwrap().len();
        let server = std::thread::spawn(move || {
            raise_share_capabilities().unwrap();
            effective()
        });
        let other = std::thread::spawn(move || {
            drop_thread_capabilities().unwrap();
            (effective(), raise_share_capabilities().is_err())
        });
        writeln!(report, "{:?} {:?} {}", server.join().unwrap(), other.join().unwrap(), effective()).unwrap();
        0
    });
    assert_eq!(outcome.report, "7 (0, true) 0\n");
}

#[test]
fn the_way_to_descriptors_leads_to_no_process_of_the_host() {
    let host = tempfile::tempdir().unwrap();
    std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let config = JailConfig { share: Some(host.path().into()), ..JailConfig::default() };
    let outcome = jailed(config, |inside, report| {
        use std::os::fd::AsFd;
        let descriptors = inside.share.as_ref().unwrap().descriptors.as_fd();
        // An O_PATH descriptor is no more than a place, which Landlock has no say in.
        let flags = nix::fcntl::OFlag::O_PATH;
        let open = |path: &str| nix::fcntl::openat(descriptors, path, flags, Mode::empty());
        let found = ["0", "../../1/fd", "../../sys", "../../2", "../../cpuinfo", "../../../etc"]
            .map(|path| open(path).is_ok());
        writeln!(report, "{found:?}").unwrap();
        0
    });
    // Where a user namespace may have no procfs of its own it is the host's, for which whoever runs this is a
    // user.
    if is_root().unwrap() {
        assert_eq!(outcome.report, "[true, true, false, false, false, false]\n");
    }
}

#[test]
fn a_file_is_removed_however_it_ends() {
    let directory = tempfile::tempdir().unwrap();
    // As in /tmp, where only a file's owner may remove it.
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o1777)).unwrap();
    let path = directory.path().join("socket");
    for signal in [None, Some(Signal::SIGKILL), Some(Signal::SIGTERM), Some(Signal::SIGINT)] {
        std::fs::write(&path, "").unwrap();
        let (read, write) = pipe().unwrap();
        // SAFETY: as in `Jailed::start`.
        let mut jailed = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                drop(write);
                Jailed { parent: child, report: BufReader::new(File::from(read)), ended: false }
            }
            ForkResult::Child => {
                let mut report = File::from(write);
                let jail = Jail::new(JailConfig::default(), vec![report.as_raw_fd()]).unwrap();
                match jail.removing([path.clone()]).enter().unwrap() {
                    Side::Inside(inside) if signal.is_some() => drop(stay(inside, &mut report)),
                    Side::Inside(_) => {}
                    Side::Outside(ended) => ended.mirror(),
                }
                // SAFETY: ends the process without running the test harness's exit handlers.
                unsafe { libc::_exit(0) }
            }
        };
        match signal {
            None => {}
            Some(Signal::SIGKILL) => kill(host_view(&mut jailed).0, Signal::SIGKILL).unwrap(),
            Some(signal) => {
                host_view(&mut jailed);
                kill(jailed.parent, signal).unwrap();
            }
        }
        let outcome = jailed.finish();
        assert!(!path.exists(), "{signal:?}");
        match (signal, outcome.status) {
            (None, WaitStatus::Exited(_, 0)) => {}
            (Some(sent), WaitStatus::Signaled(_, ended, _)) if sent == ended => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_was_opened_since_is_known() {
    let (before, _other) = pipe().unwrap();
    let inherited = Inherited::note().unwrap();
    let (after, end) = pipe().unwrap();
    let mut expected = [after.as_raw_fd(), end.as_raw_fd()];
    expected.sort_unstable();
    let opened = inherited.opened_since().unwrap();
    assert!(expected.iter().all(|fd| opened.contains(fd)) && !opened.contains(&before.as_raw_fd()));
}

#[test]
fn descriptors_that_were_not_handed_over_are_closed() {
    let (secret, _other) = pipe().unwrap();
    let number = secret.as_raw_fd();
    let outcome = jailed(JailConfig::default(), |_, report| {
        // SAFETY: only asks whether the number is open; forgotten right after.
        let stray = unsafe { OwnedFd::from_raw_fd(number) };
        let open = nix::fcntl::fcntl(&stray, nix::fcntl::FcntlArg::F_GETFD).is_ok();
        std::mem::forget(stray);
        writeln!(report, "{open}").unwrap();
        0
    });
    assert_eq!(outcome.report, "false\n");
}

#[test]
fn wrong_configurations_are_refused() {
    if is_root().unwrap() {
        for (uid, count) in [(Some(0), 1), (Some(u32::MAX), 1), (Some(u32::MAX - 5), 65536), (Some(7), 0)] {
            let config = JailConfig { uid, id_count: count, ..JailConfig::default() };
            assert!(matches!(Jail::new(config, vec![]), Err(JailError::Ids { what: "uid", .. })));
        }
    } else {
        let config = JailConfig { uid: Some(7), ..JailConfig::default() };
        assert!(matches!(Jail::new(config, vec![]), Err(JailError::NeedsRoot("uid"))));
    }
    let missing = JailConfig { share: Some("/nowhere/at/all".into()), ..JailConfig::default() };
    let outcome = jailed(missing, |_, _| 0);
    assert!(outcome.report.contains("/nowhere/at/all"), "{}", outcome.report);
    assert_eq!(outcome.status, exited(&outcome, 99));
    let missing = JailConfig { cgroup: Some("/nowhere/at/all".into()), ..JailConfig::default() };
    let outcome = jailed(missing, |_, _| 0);
    assert!(outcome.report.contains("/nowhere/at/all/cgroup.procs"), "{}", outcome.report);
}

#[test]
fn a_second_thread_is_too_many() {
    let outcome = jailed_with_thread();
    assert!(outcome.report.contains("2 threads"), "{}", outcome.report);
}

fn jailed_with_thread() -> Outcome {
    let (read, write) = pipe().unwrap();
    // SAFETY: as in `Jailed::start`.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => {
            drop(write);
            Jailed { parent: child, report: BufReader::new(File::from(read)), ended: false }.finish()
        }
        ForkResult::Child => {
            drop(read);
            let _thread = std::thread::spawn(|| std::thread::sleep(Duration::from_secs(60)));
            run(JailConfig::default(), write, |_, _| 0)
        }
    }
}
