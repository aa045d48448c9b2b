//! Ways out of a container that others left open, each tried on a plain Linux machine and on the guest's kernel.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use caisson_agent::container::Stdio;
use caisson_e2e::oci::{self, Bed};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde_json::{Value, json};

/// CVE-2019-5736: the runtime's own program, reached through a process that it starts, must not be writable.
#[tokio::test]
async fn the_helper_can_not_be_overwritten() {
    let bed = Bed::new();
    let program = Path::new(&std::env::var_os("CAISSON_BIN").unwrap()).join("caisson-agent");
    let before = fs::read(&program).unwrap();
    let mut spec = bed.spec("");
    // The kernel opens the interpreter of this script as the helper's own program.
    fs::write(bed.root().join("bin/evil"), "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(bed.root().join("bin/evil"), fs::Permissions::from_mode(0o755)).unwrap();
    spec["process"]["args"] = json!(["/bin/evil"]);
    let _ = bed.run(&spec).await;
    bed.start(&bed.spec("while :; do for p in /proc/[0-9]*; do echo owned 2>/dev/null > $p/exe; done; done"))
        .await;
    for _ in 0..5 {
        let _ = bed.exec("true", json!({"args": ["/bin/true"]})).await;
    }
    bed.runtime.remove("c", true).await.unwrap();
    assert!(fs::read(&program).unwrap() == before);
}

/// CVE-2024-21626: no descriptor of the runtime's leads out, be it as the working directory.
#[tokio::test]
async fn no_descriptor_leads_out() {
    let bed = Bed::new();
    let text = bed.output(&bed.spec("ls /proc/self/fd")).await;
    // The fourth is that of ls itself.
    assert_eq!(text, "0\n1\n2\n3");
    for fd in 3..12 {
        let mut spec = bed.spec("pwd; ls ..");
        spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
        assert!(bed.run(&spec).await.is_err(), "{fd}");
    }
    assert!(bed.runtime.list().is_empty());
}

/// CVE-2021-30465, CVE-2019-19921, CVE-2023-27561 and CVE-2023-28642: links in the image do not send mounts elsewhere.
#[tokio::test]
async fn links_do_not_move_mounts() {
    let bed = Bed::new();
    let outside = bed.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, bed.root().join("link")).unwrap();
    symlink("../../../../../../../../..", bed.root().join("up")).unwrap();
    let mut spec = bed.spec("ls -d /up/bin /up/proc");
    for destination in ["/link/a/b", "/up/made"] {
        let mount = json!({"destination": destination, "type": "tmpfs", "source": "x"});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    let _ = bed.run(&spec).await;
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!Path::new("/made").exists());
    for (name, mount) in [("proc", 0), ("sys", 3)] {
        fs::remove_dir(bed.root().join(name)).unwrap();
        symlink("/tmp", bed.root().join(name)).unwrap();
        let error = bed.run(&bed.spec("true")).await.unwrap_err();
        assert!(error.to_string().starts_with(&format!("mounts[{mount}].destination")), "{error}");
        fs::remove_file(bed.root().join(name)).unwrap();
        fs::create_dir(bed.root().join(name)).unwrap();
    }
}

/// CVE-2024-45310: mount points are made inside, whoever exchanges a directory on their way for a link meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mount_points_are_made_inside() {
    let bed = Bed::new();
    let (outside, race, link) =
        (bed.dir.path().join("outside"), bed.root().join("race"), bed.root().join("link"));
    fs::create_dir(&outside).unwrap();
    fs::create_dir(&race).unwrap();
    symlink(&outside, &link).unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let exchange = {
        let ended = ended.clone();
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                renameat2(AT_FDCWD, &race, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
                std::thread::yield_now();
            }
        })
    };
    for round in 0..6 {
        let mut spec = bed.spec("true");
        let mounts = spec["mounts"].as_array_mut().unwrap();
        let file = format!("/race/{round}/file");
        mounts.push(json!({"destination": file, "source": "/etc/hostname", "options": ["bind"]}));
        mounts.push(json!({"destination": format!("/race/{round}/dir/a"), "type": "tmpfs", "source": "x"}));
        // Either it is made inside, or it is an error.
        let _ = bed.run(&spec).await;
    }
    ended.store(true, Ordering::Relaxed);
    exchange.join().unwrap();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

/// CVE-2022-29162: no process has capabilities that a program which it executes could inherit by a file's, unless asked
/// for.
#[tokio::test]
async fn nothing_is_inheritable_unasked() {
    let bed = Bed::new();
    bed.start(&bed.spec("grep CapInh /proc/self/status > /tmp/first; sleep 100")).await;
    let none = "CapInh:\t0000000000000000";
    // The first process may still be on its way.
    let script = "until [ -s /tmp/first ]; do sleep 0.1; done; grep CapInh /proc/self/status";
    assert_eq!(bed.exec(script, json!({})).await.unwrap().1, none);
    assert_eq!(fs::read_to_string(bed.root().join("tmp/first")).unwrap().trim(), none);
    bed.runtime.remove("c", true).await.unwrap();
}

/// CVE-2025-31133: what covers masked paths is never the image's.
#[tokio::test]
async fn masks_are_not_the_images() {
    let bed = Bed::new();
    let mut spec = bed.spec("stat -c %t:%T /proc/keys; cat /dev/null");
    let device = json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 5}]);
    spec["linux"]["devices"] = device;
    // A null device that is something else is an error, and the mask would be the agent's in any case.
    assert!(bed.run(&spec).await.unwrap_err().to_string().starts_with("linux.devices[0]"));
    let text = bed.output(&bed.spec("stat -c %t:%T /proc/keys")).await;
    assert_eq!(text, "1:3");
}

/// CVE-2025-52565: the console is a terminal of the kernel's, and it goes where the container's /dev is.
#[tokio::test]
async fn consoles_are_not_the_images() {
    let bed = Bed::new();
    // A /dev of the container's making stays between two containers: a volume.
    let dev = bed.dir.path().join("dev");
    fs::create_dir_all(dev.join("pts")).unwrap();
    let mut spec = bed.spec("true");
    spec["process"]["terminal"] = json!(true);
    spec["mounts"][1] = json!({"destination": "/dev", "source": dev, "options": ["rbind", "rw"]});
    let devpts = spec["mounts"].as_array_mut().unwrap().remove(2);
    let failure = async |spec: Value| bed.create("c", &spec, Stdio::default()).await.unwrap_err().to_string();

    // A multiplexer that is no device, another device, or leads elsewhere.
    fs::write(dev.join("pts/ptmx"), "bait").unwrap();
    assert!(failure(spec.clone()).await.starts_with("process.terminal"));
    fs::remove_file(dev.join("pts/ptmx")).unwrap();
    symlink("/proc/self/fd/0", dev.join("pts/ptmx")).unwrap();
    assert!(failure(spec.clone()).await.starts_with("process.terminal"));
    fs::remove_file(dev.join("pts/ptmx")).unwrap();
    let (mode, zero) = (nix::sys::stat::Mode::from_bits_truncate(0o666), nix::sys::stat::makedev(1, 5));
    nix::sys::stat::mknod(&dev.join("pts/ptmx"), nix::sys::stat::SFlag::S_IFCHR, mode, zero).unwrap();
    assert!(failure(spec.clone()).await.starts_with("process.terminal"));
    fs::remove_file(dev.join("pts/ptmx")).unwrap();

    // With a real one: the console's place is a link into what is to be masked.
    spec["mounts"].as_array_mut().unwrap().insert(2, devpts);
    for target in ["/proc/keys", "/proc/self/attr/exec", "../bin/busybox"] {
        symlink(target, dev.join("console")).unwrap();
        let error = failure(spec.clone()).await;
        assert!(error.starts_with("process.terminal: mount /dev/console"), "{error}");
        fs::remove_file(dev.join("console")).unwrap();
    }
    assert!(bed.runtime.list().is_empty());
    let terminal = bed.create("c", &spec, Stdio::default()).await.unwrap();
    assert!(terminal.is_some());
    bed.runtime.remove("c", true).await.unwrap();
}

/// CVE-2025-52881: writes meant for procfs do not go where the container's procfs leads.
#[tokio::test]
async fn parameters_are_written_by_the_agents_procfs() {
    let bed = Bed::new();
    let mut spec = bed.spec("cat /proc/sys/kernel/msgmax");
    spec["linux"]["sysctl"] = json!({"kernel.msgmax": "4243"});
    // A procfs of the image's making.
    spec["mounts"].as_array_mut().unwrap().remove(0);
    spec["linux"]["maskedPaths"] = json!([]);
    spec["linux"]["readonlyPaths"] = json!([]);
    fs::create_dir_all(bed.root().join("proc/sys/kernel")).unwrap();
    fs::write(bed.root().join("proc/sys/kernel/msgmax"), "bait").unwrap();
    assert_eq!(bed.output(&spec).await, "bait");
}

#[tokio::test]
async fn containers_have_no_vsock() {
    let bed = Bed::new();
    // busybox has no tool for it: the filter's presence shows in the status, its rules are tested beside the code.
    let mut spec = bed.spec("grep -E '^Seccomp' /proc/self/status");
    spec["process"]["noNewPrivileges"] = json!(false);
    let text = bed.output(&spec).await;
    assert!(text.contains("Seccomp:\t2") && text.contains("Seccomp_filters:\t1"), "{text}");
}

/// The same tests on the guest's kernel.
#[test]
fn all_of_this_holds_in_a_machine_of_our_own() {
    oci::holds_in_a_machine("all_of_this_holds_in_a_machine_of_our_own");
}
