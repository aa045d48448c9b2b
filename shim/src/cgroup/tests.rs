//! Real control groups, of whichever version this host has. These tests need root.

use std::collections::BTreeSet;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::thread;

use super::*;

struct Pod {
    directory: tempfile::TempDir,
    journal: Journal,
    layout: Layout,
    name: String,
}

impl Pod {
    fn new(name: &str) -> Pod {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let name = format!("caisson-test-{}-{name}", std::process::id());
        Pod { directory, journal, layout: Layout::of_host().unwrap(), name }
    }

    fn make(&mut self, below: &str) -> Cgroup {
        let path = format!("/{}/{below}", self.name);
        Cgroup::make(&mut self.journal, &self.layout, &path).unwrap()
    }

    /// Somebody else undoes the pod, who has nothing but its record.
    fn undo(&self) {
        Journal::open(self.directory.path()).unwrap().undo().unwrap();
    }

    fn is_gone(&self) -> bool {
        self.layout.hierarchies.iter().all(|hierarchy| !hierarchy.root.join(&self.name).exists())
    }
}

/// A test that fails leaves no group behind.
impl Drop for Pod {
    fn drop(&mut self) {
        for hierarchy in self.layout.hierarchies.iter().filter(|_| thread::panicking()) {
            let top = hierarchy.root.join(&self.name);
            let below = fs::read_dir(&top).into_iter().flatten().flatten().map(|entry| entry.path());
            for group in below.filter(|path| path.is_dir()).collect::<Vec<_>>() {
                let _ = Resource::Cgroup(group.clone()).undo();
            }
            let _ = fs::remove_dir(top);
        }
    }
}

fn sleeper() -> Child {
    Command::new("sleep").arg("60").spawn().unwrap()
}

fn members(group: &Cgroup) -> Vec<Vec<u32>> {
    let list = |directory: &PathBuf| {
        let text = fs::read_to_string(directory.join(MEMBERS)).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    group.directories().iter().map(list).collect()
}

#[test]
fn a_group_goes_with_all_that_is_in_it() {
    let mut pod = Pod::new("goes");
    let group = pod.make("pod1/c1");
    let mut child = sleeper();
    group.join(child.id()).unwrap();
    for members in members(&group) {
        assert_eq!(members, [child.id()]);
    }
    pod.undo();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert!(pod.is_gone());
}

#[test]
fn what_a_member_starts_is_a_member() {
    let mut pod = Pod::new("starts");
    let group = pod.make("c1");
    let files: Vec<_> = group.directories().iter().map(|directory| directory.join(MEMBERS)).collect();
    let mut shell = Command::new("sh");
    shell.args(["-c", "read line; sleep 60 & echo $!; wait"]);
    shell.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    // SAFETY: writes to files, between fork and exec of a process whose other threads hold no lock that this needs.
    unsafe { shell.pre_exec(move || files.iter().try_for_each(|file| fs::write(file, "0"))) };
    let mut shell = shell.spawn().unwrap();
    io::Write::write_all(&mut shell.stdin.take().unwrap(), b"go\n").unwrap();
    let mut output = io::BufReader::new(shell.stdout.take().unwrap());
    let mut line = String::new();
    io::BufRead::read_line(&mut output, &mut line).unwrap();
    let grandchild: u32 = line.trim().parse().unwrap();
    for members in members(&group) {
        assert!(members.contains(&grandchild), "{members:?}");
    }
    let stats = group.stats().unwrap();
    assert!(stats.cpu.is_none_or(|cpu| cpu.usage_usec > 0));
    assert!(stats.memory.is_none_or(|memory| memory.usage > 0));
    assert!(stats.pids.is_none_or(|pids| pids.current == 2));
    pod.undo();
    shell.wait().unwrap();
    assert!(pod.is_gone());
}

#[test]
fn groups_above_stay_as_long_as_others_need_them() {
    let (mut one, mut other) = (Pod::new("shared"), Pod::new("shared"));
    one.make("parent/c1");
    let kept = other.make("parent/c2");
    one.undo();
    assert!(kept.directories().iter().all(|directory| directory.exists()));
    assert!(kept.directories().iter().all(|directory| !directory.with_file_name("c1").exists()));
    // The one who made them is gone, so nobody else's record names them.
    other.undo();
    for hierarchy in &other.layout.hierarchies {
        let _ = fs::remove_dir(hierarchy.root.join(&other.name).join("parent"));
        fs::remove_dir(hierarchy.root.join(&other.name)).unwrap();
    }
}

/// On a process of its own, as it is about the calling process.
#[test]
fn a_shim_leaves_before_it_undoes_its_pod() {
    let mut pod = Pod::new("leaves");
    let group = pod.make("c1");
    let before = pod.layout.own().unwrap();
    group.join(0).unwrap();
    let own: BTreeSet<_> = pod.layout.own().unwrap().into_iter().collect();
    assert_eq!(own, group.directories().iter().cloned().collect());
    group.leave().unwrap();
    pod.undo();
    assert!(pod.is_gone());
    // Back to where the test runner had put it.
    for directory in before {
        enter(&directory, 0).unwrap();
    }
    group.leave().unwrap();
}

#[test]
fn a_group_that_is_there_is_taken_over_and_a_bad_path_refused() {
    let mut pod = Pod::new("there");
    pod.make("c1");
    pod.make("c1");
    pod.undo();
    assert!(pod.is_gone());
    let mut journal = Journal::open(pod.directory.path()).unwrap();
    let refused = Cgroup::make(&mut journal, &pod.layout, "/a/../../b");
    assert!(matches!(refused, Err(CgroupError::Path(_))));
    assert_eq!(journal.resources(), []);
}
