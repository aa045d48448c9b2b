//! Shares with real mounts, in a mount namespace of the test's own. These tests need root.

use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::sync::mpsc;
use std::thread;

use rustix::mount::{MountFlags, mount, mount_bind_recursive, mount_remount, unmount};

use super::*;

const RANGE: IdRange = IdRange { first: ID_BASE, count: ID_COUNT };

/// A pod's directory, and files of the host, on the calling thread's own mounts.
struct Host {
    directory: tempfile::TempDir,
    journal: Journal,
}

impl Host {
    fn new() -> Host {
        sys::leave_mount_namespace().unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("pod")).unwrap();
        let journal = Journal::open(&directory.path().join("pod")).unwrap();
        Host { directory, journal }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn share(&mut self, owners: Owners) -> Share {
        let pod = self.path("pod");
        Share::make(&mut self.journal, &pod, owners).unwrap()
    }

    /// A file and the directories above it.
    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// An image of two layers and a container's own, as containerd's overlay snapshotter has them.
    fn image(&self) -> Mount {
        self.file("1/fs/etc/passwd", "below");
        self.file("1/fs/etc/group", "lower");
        self.file("2/fs/etc/passwd", "above");
        fs::create_dir_all(self.path("3/fs")).unwrap();
        fs::create_dir_all(self.path("3/work")).unwrap();
        let [one, two, upper, work] = ["1/fs", "2/fs", "3/fs", "3/work"].map(|name| self.path(name));
        let options = [
            "index=off".to_owned(),
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}:{}", two.display(), one.display()),
        ];
        Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: options.into(),
            ..Mount::default()
        }
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    fn tmpfs(&self, name: &str) -> PathBuf {
        let path = self.directory(name);
        mount("test", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        path
    }

    /// All mount points below the directory of this test.
    fn mounts(&self) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        points
            .filter(|point| Path::new(point).starts_with(self.directory.path()))
            .map(str::to_owned)
            .collect()
    }

    /// Somebody else undoes the pod, who has nothing but its record. Nothing may be left.
    fn undo(&self) {
        let pod = self.path("pod");
        Journal::open(&pod).unwrap().undo().unwrap();
        assert_eq!(self.mounts(), [""; 0]);
        assert_eq!(fs::read_dir(pod).unwrap().count(), 0);
    }
}

/// Runs `work` as the machine's root is seen on the host.
fn as_guest<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let thread = || {
        sys::act_as(RANGE).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(thread).join().unwrap())
}

fn id(text: &str) -> Id {
    text.parse().unwrap()
}

fn volume(source: &Path, options: &[&str]) -> Volume {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Volume { source: source.into(), options, pod: Some("1".into()) }
}

fn owner(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().uid()
}

#[test]
fn a_guest_owns_its_root_file_system_and_the_disk_does_not_show_it() {
    let mut host = Host::new();
    let image = host.image();
    assert!(mappable(std::slice::from_ref(&image), RANGE, &host.directory("scaffold")).unwrap());
    let share = host.share(Owners::Mapped(RANGE));
    let placed = share.add_rootfs(&mut host.journal, &id("c1"), &[image]).unwrap();
    assert_eq!(placed, Placed { path: "c1/rootfs".into(), part: None, mapped: true });
    let root = share.path().join(&placed.path);
    assert_eq!(fs::read_to_string(root.join("etc/passwd")).unwrap(), "above");
    assert_eq!(fs::read_to_string(root.join("etc/group")).unwrap(), "lower");
    assert_eq!(owner(&root.join("etc/group")), RANGE.first);

    as_guest(|| {
        fs::write(root.join("new"), "new").unwrap();
        // A file that has to be copied up, a directory that has to be made opaque, and a whiteout.
        fs::write(root.join("etc/group"), "changed").unwrap();
        fs::remove_file(root.join("etc/passwd")).unwrap();
        fs::create_dir(root.join("etc/passwd")).unwrap();
        fs::remove_dir(root.join("etc/passwd")).unwrap();
        chown(root.join("new"), Some(RANGE.first + 33), Some(RANGE.first + 44)).unwrap();
    });
    let upper = host.path("3/fs");
    assert_eq!((owner(&upper.join("new")), owner(&upper.join("etc/group"))), (33, 0));
    assert_eq!(fs::symlink_metadata(upper.join("new")).unwrap().gid(), 44);
    assert!(!root.join("etc/passwd").exists());
    assert_eq!(fs::read_to_string(host.path("1/fs/etc/group")).unwrap(), "lower");
    // The host's root is nobody there.
    assert!(fs::write(root.join("host"), "").is_err());
    host.undo();
}

#[test]
fn without_a_mapping_owners_are_the_hosts() {
    let mut host = Host::new();
    let image = host.image();
    chown(host.path("1/fs/etc/group"), Some(7), Some(7)).unwrap();
    let share = host.share(Owners::Host);
    let placed = share.add_rootfs(&mut host.journal, &id("c1"), &[image]).unwrap();
    let root = share.path().join(&placed.path);
    assert_eq!(owner(&root.join("etc/group")), 7);
    fs::write(root.join("new"), "").unwrap();
    assert!(host.path("3/fs/new").exists());
    host.undo();
}

#[test]
fn an_image_of_many_layers_with_long_names_is_mounted() {
    let mut host = Host::new();
    let name = |index: u32| format!("{}/{index}", "long".repeat(30));
    let layers: Vec<_> = (0..60).map(|index| host.file(&format!("{}/f{index}", name(index)), "")).collect();
    let lowers: Vec<_> = layers.iter().map(|file| file.parent().unwrap().to_str().unwrap()).collect();
    let options = vec![format!("lowerdir={}", lowers.join(":"))];
    assert!(options[0].len() > 4096);
    let image = Mount { kind: "overlay".into(), source: "overlay".into(), options, ..Mount::default() };
    let share = host.share(Owners::Mapped(RANGE));
    let placed = share.add_rootfs(&mut host.journal, &id("c1"), &[image]).unwrap();
    assert_eq!(fs::read_dir(share.path().join(placed.path)).unwrap().count(), 60);
    host.undo();
}

#[test]
fn mounts_of_a_root_file_system_stack_and_stay_inside() {
    let mut host = Host::new();
    host.file("root/etc/hostname", "");
    fs::create_dir(host.path("root/data")).unwrap();
    symlink("/data", host.path("root/link")).unwrap();
    symlink("../../../..", host.path("root/out")).unwrap();
    host.file("data/inside", "");
    let bind = |source: &str, target: &str, option: &str| Mount {
        kind: "bind".into(),
        source: host.path(source).to_string_lossy().into(),
        target: target.into(),
        options: vec!["rbind".into(), option.into()],
    };
    let mounts = [bind("root", "", "ro"), bind("data", "/link", "rw")];
    let escape = [bind("root", "", "rw"), bind("data", "/out", "rw")];
    let share = host.share(Owners::Mapped(RANGE));
    let placed = share.add_rootfs(&mut host.journal, &id("c1"), &mounts).unwrap();
    let root = share.path().join(placed.path);
    assert!(root.join("data/inside").exists());
    as_guest(|| {
        assert!(fs::write(root.join("etc/new"), "").is_err());
        fs::write(root.join("data/new"), "").unwrap();
    });
    share.remove(&mut host.journal, &id("c1")).unwrap();
    assert_eq!(host.mounts().len(), 1);

    // The link leads to the image's root, not to ours.
    let placed = share.add_rootfs(&mut host.journal, &id("c2"), &escape).unwrap();
    assert!(share.path().join(placed.path).join("inside").exists());
    host.undo();
}

#[test]
fn volumes_are_directories_and_files_with_their_options() {
    let mut host = Host::new();
    let file = host.file("data/file", "one");
    let directory = host.path("data");
    symlink("file", directory.join("link")).unwrap();
    let share = host.share(Owners::Mapped(RANGE));
    let journal = &mut host.journal;
    let mut add = |index, source: &Path, options: &[&str]| {
        let placed = share.add_volume(journal, &id("c1"), &volume(source, options)).unwrap();
        assert_eq!(placed, Placed { path: format!("_volumes/{index}").into(), part: None, mapped: true });
        share.path().join(placed.path)
    };
    let read_only = add(0, &directory, &["rbind", "ro"]);
    let writable = add(1, &directory, &["rbind", "rprivate"]);
    let one_file = add(2, &directory.join("link"), &["bind", "ro"]);
    assert_eq!(fs::read_to_string(&one_file).unwrap(), "one");
    as_guest(|| {
        fs::write(writable.join("new"), "two").unwrap();
        assert!(fs::write(read_only.join("new"), "three").is_err());
        assert!(fs::write(&one_file, "three").is_err());
    });
    assert_eq!(owner(&file), 0);
    assert_eq!(owner(&directory.join("new")), 0);
    assert_eq!(fs::read_to_string(read_only.join("new")).unwrap(), "two");
    host.undo();
    assert_eq!(fs::read_to_string(file).unwrap(), "one", "what was shared is not what is removed");
}

#[test]
fn containers_that_have_the_same_volume_share_one() {
    let mut host = Host::new();
    let directory = host.file("data/file", "one").parent().unwrap().to_owned();
    let elsewhere = host.directory("elsewhere");
    mount_bind_recursive(&directory, &elsewhere).unwrap();
    let own = host.file("pods/1/volumes/kubernetes.io~empty-dir/own/file", "").parent().unwrap().to_owned();
    let others =
        host.file("pods/2/volumes/kubernetes.io~empty-dir/own/file", "").parent().unwrap().to_owned();
    let share = host.share(Owners::Host);
    let journal = &mut host.journal;
    let mut add = |container: &str, source: &Path, options: &[&str]| {
        let placed = share.add_volume(journal, &id(container), &volume(source, options)).unwrap();
        placed.path.file_name().unwrap().to_str().unwrap().parse::<usize>().unwrap()
    };
    assert_eq!(add("c1", &directory, &["rbind", "rw"]), 0);
    // By whatever path, and to be read only: that is the guest's to see to, which may write by way of the first.
    assert_eq!(add("c2", &elsewhere, &["rbind", "ro"]), 0);
    assert_eq!(add("c2", &directory, &["rbind", "rslave"]), 1);
    assert_eq!(add("c2", &directory, &["bind"]), 2);
    assert_eq!(add("c2", &directory.join("file"), &["rbind", "ro"]), 3);
    assert_eq!(add("c1", &directory.join("file"), &["rbind"]), 4);
    // What is the pod's own may be written to from the first.
    assert_eq!(add("c1", &own, &["rbind", "ro"]), 5);
    assert_eq!(add("c2", &own, &["rbind"]), 5);
    // What is another's may not.
    assert_eq!(add("c1", &others, &["rbind", "ro"]), 6);
    assert!(fs::write(share.path().join("_volumes/6/new"), "").is_err());

    let there = |number: usize| share.path().join(format!("_volumes/{number}")).exists();
    share.remove(journal, &id("c1")).unwrap();
    assert_eq!([0, 1, 2, 3, 4, 5, 6].map(there), [true, true, true, true, false, true, false]);
    share.remove(journal, &id("c2")).unwrap();
    assert!(![0, 1, 2, 3, 4, 5, 6].map(there).contains(&true));
    let placed = share.add_volume(journal, &id("c1"), &volume(&directory, &["rbind"])).unwrap();
    assert_eq!(fs::read_to_string(share.path().join(placed.path).join("file")).unwrap(), "one");
    // By a path where the host itself has it read only, it is another thing, for whoever comes next, too.
    mount_remount(&elsewhere, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    let views = [&elsewhere, &directory].map(|source| {
        let placed = share.add_volume(journal, &id("c2"), &volume(source, &["rbind"])).unwrap();
        fs::write(share.path().join(placed.path).join("file"), "three").is_ok()
    });
    assert_eq!(views, [false, true]);
    unmount(&elsewhere, rustix::mount::UnmountFlags::DETACH).unwrap();
    host.undo();
}

#[test]
fn a_part_of_the_pods_own_volume_is_had_by_way_of_the_whole() {
    let mut host = Host::new();
    let file = host.file("pods/1/volumes/kubernetes.io~empty-dir/own/one/two/file", "");
    let (two, own) = (file.parent().unwrap(), host.path("pods/1/volumes/kubernetes.io~empty-dir/own"));
    let elsewhere =
        host.file("pods/1/volumes/kubernetes.io~local-volume/own/file", "").parent().unwrap().to_owned();
    let aside = |volume: &str, number: &str, part: &Path| {
        let point = host.path(&format!("pods/1/volume-subpaths/{volume}/c1/{number}"));
        fs::create_dir_all(point.parent().unwrap()).unwrap();
        let _ = if part.is_dir() { fs::create_dir(&point) } else { fs::write(&point, "") };
        mount_bind_recursive(part, &point).unwrap();
        point
    };
    let parts = [("0", two), ("1", &file), ("2", elsewhere.as_path())];
    let [directory, single, other] = parts.map(|(number, part)| aside("own", number, part));
    let share = host.share(Owners::Host);
    let journal = &mut host.journal;
    let mut add = |container: &str, source: &Path, option: &str| {
        let placed = share.add_volume(journal, &id(container), &volume(source, &["rbind", option])).unwrap();
        (placed.path.file_name().unwrap().to_str().unwrap().parse::<usize>().unwrap(), placed.part)
    };
    let part = |path: &str| Some(path.to_owned());
    // Whoever comes first, and whether it may write or not.
    assert_eq!(add("c1", &directory, "ro"), (0, part("one/two")));
    assert_eq!(add("c2", &own, "rw"), (0, None));
    assert_eq!(add("c2", &single, "rw"), (0, part("one/two/file")));
    assert_eq!(add("c1", &other, "rw"), (1, None));
    assert_eq!(add("c1", &directory, "rro"), (2, None));
    // What is not to be found there any more.
    fs::rename(two, two.with_file_name("three")).unwrap();
    assert_eq!(add("c2", &directory, "rw"), (0, part("one/three")));
    fs::rename(own.join("one/three"), elsewhere.join("three")).unwrap();
    assert_eq!(add("c3", &directory, "rw").1, None);

    share.remove(journal, &id("c1")).unwrap();
    assert!(share.path().join("_volumes/0/one").exists());
    for point in [directory, single, other] {
        unmount(&point, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    host.undo();
}

#[test]
fn what_cannot_be_a_volume_is_refused_and_leaves_nothing() {
    let mut host = Host::new();
    let share = host.share(Owners::Host);
    let before = host.journal.resources().len();
    for (source, options) in [("/nonexistent", "rbind"), ("/dev/null", "bind"), ("/tmp", "rshared")] {
        let added = share.add_volume(&mut host.journal, &id("c1"), &volume(Path::new(source), &[options]));
        assert!(added.is_err(), "{source}");
    }
    assert_eq!(host.journal.resources().len(), before);
    let none = share.add_rootfs(&mut host.journal, &id("c1"), &[]);
    assert!(matches!(none, Err(ShareError::NoRootfs)));
    let unknown = Mount { kind: "nosuchfs".into(), source: "none".into(), ..Mount::default() };
    let failed = share.add_rootfs(&mut host.journal, &id("c1"), &[unknown]);
    assert!(matches!(failed, Err(ShareError::Mount { .. })));
    share.remove(&mut host.journal, &id("c1")).unwrap();
    assert_eq!(host.journal.resources().len(), before);
    host.undo();
}

#[test]
fn what_is_mounted_on_the_host_later_comes_in_only_where_it_is_asked_for() {
    let mut host = Host::new();
    let source = host.tmpfs("source");
    mount_change(&source, MountPropagationFlags::SHARED).unwrap();
    fs::create_dir(source.join("later")).unwrap();
    let share = host.share(Owners::Mapped(RANGE));
    let journal = &mut host.journal;
    for option in ["rslave", "rprivate"] {
        share.add_volume(journal, &id("c1"), &volume(&source, &["rbind", option])).unwrap();
    }
    mount("test", source.join("later"), "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(source.join("later/file"), "").unwrap();
    assert!(share.path().join("_volumes/0/later/file").exists());
    assert!(!share.path().join("_volumes/1/later/file").exists());
    share.remove(journal, &id("c1")).unwrap();
    assert!(source.join("later/file").exists(), "what happens in the share stays there");
    unmount(&source, rustix::mount::UnmountFlags::DETACH).unwrap();
    host.undo();
}

#[test]
fn a_file_system_that_cannot_be_mapped_is_shared_to_be_read() {
    let mut host = Host::new();
    let share = host.share(Owners::Mapped(RANGE));
    let placed = share.add_volume(&mut host.journal, &id("c1"), &volume(Path::new("/proc/sys"), &["ro"]));
    let placed = placed.unwrap();
    assert!(!placed.mapped);
    assert!(share.path().join(placed.path).join("kernel").exists());
    let written = share.add_volume(&mut host.journal, &id("c1"), &volume(Path::new("/proc/sys"), &["rw"]));
    assert!(matches!(written, Err(ShareError::Unmappable { .. })));
    let bind = Mount { kind: "bind".into(), source: "/proc/sys".into(), ..Mount::default() };
    let refused = share.add_rootfs(&mut host.journal, &id("c2"), std::slice::from_ref(&bind));
    assert!(matches!(refused, Err(ShareError::Unmappable { .. })));
    assert!(!mappable(&[bind], RANGE, &host.directory("scaffold")).unwrap());
    host.undo();
}

/// As the machine's process does it when it enters its jail.
#[test]
fn mounts_come_and_go_in_a_namespace_that_was_made_before() {
    let mut host = Host::new();
    let image = host.image();
    let file = host.file("file", "content");
    let share = host.share(Owners::Mapped(RANGE));
    let inside = host.path("inside");
    fs::create_dir(&inside).unwrap();
    let (ask, asked) = mpsc::channel::<PathBuf>();
    let (answer, answered) = mpsc::channel();
    thread::scope(|scope| {
        let (served, inside) = (share.path(), &inside);
        scope.spawn(move || {
            // SAFETY: the table of descriptors stays shared.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
            mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
            mount_bind_recursive(served, inside).unwrap();
            answer.send(fs::write(inside.join("file"), "").is_ok()).unwrap();
            for path in asked {
                answer.send(inside.join(path).exists()).unwrap();
            }
        });
        assert!(!answered.recv().unwrap(), "the share itself is not the guest's to write to");
        let exists = |path: &str| {
            ask.send(path.into()).unwrap();
            answered.recv().unwrap()
        };
        let journal = &mut host.journal;
        share.add_rootfs(journal, &id("c1"), &[image]).unwrap();
        share.add_volume(journal, &id("c1"), &volume(&file, &["bind"])).unwrap();
        assert!(exists("c1/rootfs/etc/passwd") && exists("_volumes/0"));
        share.remove(journal, &id("c1")).unwrap();
        assert!(!exists("c1") && !exists("_volumes/0"));
        share.add_volume(journal, &id("c1"), &volume(&file, &["bind"])).unwrap();
        assert!(exists("_volumes/1"));
        drop(ask);
    });
    host.undo();
}
