//! Containers through the agent's library, on a plain Linux machine: what the OCI runtime specification says, clause
//! group by clause group.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use caisson_agent::container::{Error, Event, State, Stdio};
use caisson_agent::oci::Resources;
use caisson_e2e::oci::{self, Bed};
use nix::libc;
use serde_json::{Value, json};

#[tokio::test]
async fn a_container_runs_and_leaves_nothing() {
    let bed = Bed::new();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(bed.output(&bed.spec("echo hello")).await, "hello");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
    assert!(bed.runtime.list().is_empty());
}

#[tokio::test]
async fn create_and_start_are_two_steps() {
    let mut bed = Bed::new();
    let mut spec = bed.spec("touch /tmp/ran; exit 7");
    spec["annotations"] = json!({"a": "b"});
    bed.create("c", &spec, Stdio::default()).await.unwrap();
    let info = bed.runtime.list().remove(0);
    assert_eq!((info.state, info.annotations["a"].as_str()), (State::Created, "b"));
    assert!(!bed.root().join("tmp/ran").exists());
    assert!(matches!(bed.create("c", &spec, Stdio::default()).await, Err(Error::Exists(_))));
    bed.runtime.start("c").await.unwrap();
    assert_eq!(bed.runtime.wait("c", "").await.unwrap().status.code(), 7);
    assert!(bed.root().join("tmp/ran").exists());
    assert!(matches!(bed.runtime.start("c").await, Err(Error::State { actual: State::Stopped, .. })));
    assert!(matches!(bed.events.recv().await, Some(Event::Exit { exit, .. }) if exit.status.code() == 7));
    bed.runtime.remove("c", false).await.unwrap();
}

#[tokio::test]
async fn exit_codes_are_those_of_a_shell() {
    let bed = Bed::new();
    assert_eq!(bed.run(&bed.spec("exit 42")).await.unwrap().0, 42);
    bed.start(&bed.spec("sleep 100")).await;
    assert!(matches!(bed.runtime.remove("c", false).await, Err(Error::State { .. })));
    bed.runtime.signal("c", "", 9, false).await.unwrap();
    assert_eq!(bed.runtime.wait("c", "").await.unwrap().status.code(), 137);
    for all in [false, true] {
        assert!(matches!(bed.runtime.signal("c", "", 9, all).await, Err(Error::NoProcess { .. })), "{all}");
    }
    bed.runtime.remove("c", false).await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_of_create() {
    let bed = Bed::new();
    let mut spec = bed.spec("");
    spec["process"]["args"] = json!(["nonsense"]);
    assert!(matches!(bed.run(&spec).await, Err(Error::Exec { .. })));
    spec["process"]["args"] = json!(["/etc/passwd"]);
    let error = bed.run(&spec).await.unwrap_err();
    assert!(matches!(&error, Error::Exec { source, .. } if source.raw_os_error() == Some(13)), "{error:?}");
    assert!(bed.runtime.list().is_empty());
}

#[tokio::test]
async fn namespaces_are_the_containers_own() {
    let bed = Bed::new();
    let script =
        "hostname; echo $$; grep ^0:: /proc/self/cgroup; ls /sys/class/net; cat /proc/mounts | grep -c ^";
    let text = bed.output(&bed.spec(script)).await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..4], ["box", "1", "0::/", "lo"], "{text}");
}

#[tokio::test]
async fn namespaces_are_joined_by_path() {
    let bed = Bed::new();
    let mut spec = bed.spec("readlink /proc/self/ns/net; readlink /proc/self/ns/ipc");
    spec["linux"]["namespaces"][4]["path"] = json!("/proc/self/ns/net");
    spec["linux"]["namespaces"][2]["path"] = json!("/proc/self/ns/ipc");
    let ours = ["net", "ipc"].map(|kind| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap());
    let theirs = bed.output(&spec).await;
    assert_eq!(theirs, format!("{}\n{}", ours[0].display(), ours[1].display()));
    spec["linux"]["namespaces"][4]["path"] = json!("/proc/self/ns/ipc");
    let error = bed.run(&spec).await.unwrap_err();
    assert!(error.to_string().starts_with("linux.namespaces[4].path"), "{error}");
}

#[tokio::test]
async fn default_devices_are_there_and_no_others_open() {
    let bed = Bed::new();
    let mut spec = bed.spec(
        "echo x > /dev/null && head -c 3 /dev/zero | wc -c; readlink /dev/fd; readlink /dev/ptmx; ls -l /dev/mine; \
         cat /dev/mine 2>&1; true",
    );
    let device = json!({"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4});
    spec["linux"]["devices"] = json!([device]);
    let text = bed.output(&spec).await;
    assert!(text.contains("/proc/self/fd\npts/ptmx"), "{text}");
    assert!(text.contains("crw-r-----") && text.contains("10, 229"), "{text}");
    assert!(text.contains("Operation not permitted"), "the device filter lets it through: {text}");
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"}]);
    let text = bed
        .run(&{
            spec["process"]["args"] =
                json!(["sh", "-c", "dd if=/dev/mine of=/dev/null count=0 && echo read"]);
            spec
        })
        .await
        .unwrap()
        .1;
    assert!(text.contains("read"), "{text}");
}

#[tokio::test]
async fn the_root_and_paths_are_protected() {
    let bed = Bed::new();
    let mut spec = bed.spec(
        "touch /x 2>&1; cat /proc/kcore | head -c 1; echo masked; ls /proc/acpi; echo 1 > /proc/sys/kernel/panic; \
         touch /sys/x; mount -t tmpfs x /tmp; true",
    );
    spec["root"]["readonly"] = json!(true);
    let text = bed.output(&spec).await;
    assert!(text.contains("/x: Read-only file system"), "{text}");
    assert!(text.contains("/proc/sys/kernel/panic: Read-only"), "{text}");
    assert!(text.contains("mount: permission denied") || text.contains("Operation not permitted"), "{text}");
}

#[tokio::test]
async fn mounts_have_their_options() {
    let bed = Bed::new();
    let volume = bed.dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "content").unwrap();
    let mut spec = bed.spec(
        "cat /deep/volume/file /one; touch /deep/volume/x; touch /rw/new && echo written; grep /tmp2 /proc/mounts",
    );
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/deep/volume", "source": volume, "options": ["rbind", "ro", "rprivate"]}),
    );
    mounts.push(
        json!({"destination": "/one", "type": "bind", "source": volume.join("file"), "options": ["bind"]}),
    );
    mounts.push(
        json!({"destination": "/rw", "source": volume, "options": ["rbind", "rw", "nosuid", "noexec"]}),
    );
    mounts.push(json!({"destination": "/tmp2", "type": "tmpfs", "options": ["size=64k", "noexec", "nodev"]}));
    let text = bed.run(&spec).await.unwrap().1;
    assert!(text.contains("contentcontent"), "{text}");
    assert!(text.contains("/deep/volume/x: Read-only"), "{text}");
    assert!(text.contains("written"), "{text}");
    assert!(text.contains("noexec") && text.contains("size=64k"), "{text}");
    spec["mounts"][0]["options"] = json!(["warp=1"]);
    assert!(bed.run(&spec).await.unwrap_err().to_string().starts_with("mounts[0]"));
}

#[tokio::test]
async fn users_groups_and_capabilities() {
    let bed = Bed::new();
    let mut spec =
        bed.spec("id -u; id -G; umask; pwd; echo $HOME; grep -E 'Cap|NoNew' /proc/self/status; chown 0 /tmp");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 7], "umask": 0o027});
    spec["process"]["cwd"] = json!("/made/for/it");
    spec["process"]["capabilities"]["ambient"] = json!(["CAP_KILL"]);
    spec["process"]["capabilities"]["inheritable"] = json!(["CAP_KILL"]);
    let text = bed.run(&spec).await.unwrap().1;
    assert!(text.starts_with("1000\n1000 5 7\n0027\n/made/for/it\n/home/user\n"), "{text}");
    for line in [
        "CapInh:\t0000000000000020",
        "CapPrm:\t0000000000000020",
        "CapBnd:\t00000000000000e3",
        "CapAmb:\t0000000000000020",
        "NoNewPrivs:\t1",
        "Operation not permitted",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test]
async fn limits_of_the_process() {
    let bed = Bed::new();
    let mut spec = bed.spec("ulimit -n; cat /proc/self/oom_score_adj");
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
    spec["process"]["oomScoreAdj"] = json!(123);
    assert_eq!(bed.output(&spec).await, "77\n123");
}

#[tokio::test]
async fn priorities_of_the_process() {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const BEST_EFFORT: libc::c_long = 2;
    const SCHED_BATCH: libc::c_int = 3;
    let bed = Bed::new();
    let mut spec = bed.spec("sleep 100");
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 5});
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 3});
    bed.start(&spec).await;
    let pid = i32::try_from(bed.runtime.list()[0].pid).unwrap();
    // SAFETY: no pointers.
    let io = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, pid) };
    assert_eq!(io, BEST_EFFORT << 13 | 5);
    // SAFETY: no pointers.
    let (policy, nice) = unsafe {
        (libc::sched_getscheduler(pid), libc::getpriority(libc::PRIO_PROCESS, pid.cast_unsigned()))
    };
    assert_eq!((policy, nice), (SCHED_BATCH, 3));
    bed.runtime.remove("c", true).await.unwrap();
}

#[tokio::test]
async fn mounts_map_ids() {
    let bed = Bed::new();
    let volume = bed.dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    std::os::unix::fs::chown(&volume, Some(1000), Some(2000)).unwrap();
    fs::write(volume.join("theirs"), "").unwrap();
    std::os::unix::fs::chown(volume.join("theirs"), Some(1005), Some(2005)).unwrap();
    let mut spec = bed.spec("stat -c '%u:%g' /volume/theirs; touch /volume/new");
    let map = |id: u32| json!([{"containerID": id, "hostID": id + 300_000, "size": 1000}]);
    let mount = json!({
        "destination": "/volume", "source": volume, "options": ["bind", "idmap"],
        "uidMappings": map(1000), "gidMappings": map(2000),
    });
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec["process"]["user"] = json!({"uid": 301_000, "gid": 302_000});
    assert_eq!(bed.output(&spec).await, "301005:302005");
    let made = std::os::unix::fs::MetadataExt::uid(&fs::metadata(volume.join("new")).unwrap());
    assert_eq!(made, 1000, "what the container makes has the unmapped owner");
    spec["mounts"][5]["gidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 0}]);
    let error = bed.run(&spec).await.unwrap_err();
    assert!(error.to_string().starts_with("mounts[5].uidMappings"), "{error}");
}

#[tokio::test]
async fn sysctls_and_names() {
    let bed = Bed::new();
    let mut spec = bed.spec("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax /proc/sys/kernel/domainname");
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.msgmax": "4242"});
    spec["domainname"] = json!("nis");
    assert_eq!(bed.output(&spec).await, "80\n4242\nnis");
}

#[tokio::test]
async fn seccomp_answers_for_the_kernel() {
    let bed = Bed::new();
    let mut spec = bed.spec("mkdir /tmp/a; kill -0 $$ && echo alive");
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    for no_new_privileges in [true, false] {
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let text = bed.output(&spec).await;
        assert!(text.contains("No space left") && text.contains("alive"), "{text}");
    }
}

#[tokio::test]
async fn a_user_namespace_maps_ids() {
    let bed = Bed::new();
    let mut spec =
        bed.spec("id -u; cat /proc/self/uid_map; echo x > /dev/null && echo null; touch /tmp/mine; hostname");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    fs::set_permissions(bed.root().join("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(bed.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(bed.root(), Some(100_000), Some(100_000)).unwrap();
    std::os::unix::fs::chown(bed.root().join("dev"), Some(100_000), Some(100_000)).unwrap();
    let text = bed.output(&spec).await;
    assert!(text.starts_with("0\n") && text.contains("100000"), "{text}");
    assert!(text.contains("null") && text.ends_with("box"), "{text}");
    spec["process"]["args"] = json!(["sleep", "100"]);
    bed.start(&spec).await;
    let text = bed.exec("id -u; cat /proc/self/uid_map; stat -c %u /proc/1", json!({})).await.unwrap().1;
    assert!(text.starts_with("0\n") && text.contains("100000") && text.ends_with("\n0"), "{text}");
    bed.runtime.remove("c", true).await.unwrap();
}

#[tokio::test]
async fn a_time_namespace_shifts_clocks() {
    let bed = Bed::new();
    let mut spec = bed.spec("cat /proc/uptime");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}});
    let uptime = |text: &str| text.split(' ').next().unwrap().parse::<f64>().unwrap();
    assert!(uptime(&bed.output(&spec).await) > 1_000_000.0);
    spec["process"]["args"] = json!(["sleep", "100"]);
    bed.start(&spec).await;
    assert!(uptime(&bed.exec("cat /proc/uptime", json!({})).await.unwrap().1) > 1_000_000.0);
    bed.runtime.remove("c", true).await.unwrap();
}

#[tokio::test]
async fn hooks_run_in_the_container_before_its_program() {
    let bed = Bed::new();
    let mut spec = bed.spec("cat /tmp/hooks; echo program");
    spec["annotations"] = json!({"a": "b"});
    let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["WHO=me"]});
    let first = hook("cat > /tmp/state; echo $0 $WHO $(/bin/id -u) $$ $PATH > /tmp/hooks");
    spec["hooks"] = json!({"startContainer": [first, hook("echo second >> /tmp/hooks")]});
    let text = bed.output(&spec).await;
    assert!(text.starts_with("sh me 0 ") && text.ends_with("second\nprogram"), "{text}");
    let state: Value =
        serde_json::from_str(&fs::read_to_string(bed.root().join("tmp/state")).unwrap()).unwrap();
    let told = [&state["id"], &state["status"], &state["pid"], &state["annotations"]["a"]];
    assert_eq!(told, [&json!("c"), &json!("created"), &json!(1), &json!("b")]);

    let mut slow = hook("sleep 100");
    slow["timeout"] = json!(1);
    for (hook, reason) in [(hook("exit 3"), "ended with exit status: 3"), (slow, "took longer")] {
        spec["hooks"] = json!({"startContainer": [hook]});
        let error = bed.run(&spec).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("hooks.startContainer[0]: {reason}")), "{error}");
    }
}

#[tokio::test]
async fn the_root_has_its_propagation() {
    let bed = Bed::new();
    for (propagation, tag) in [("shared", "shared:"), ("rprivate", ""), ("unbindable", "unbindable")] {
        let mut spec = bed.spec("grep ' / / ' /proc/self/mountinfo || grep -m 1 ' / ' /proc/self/mountinfo");
        spec["linux"]["rootfsPropagation"] = json!(propagation);
        let line = bed.output(&spec).await;
        // Optional fields stand between the options and a dash.
        let (fields, _) = line.split_once(" - ").unwrap();
        let fields: Vec<_> = fields.split(' ').skip(6).collect();
        assert!(
            fields.first().map_or(tag.is_empty(), |field| field.starts_with(tag)),
            "{propagation}: {line}"
        );
        assert_eq!(fields.is_empty(), tag.is_empty(), "{propagation}: {line}");
    }
}

#[tokio::test]
async fn further_limits_hold_or_are_refused_by_name() {
    let bed = Bed::new();
    let mut spec = bed.spec("sleep 100");
    spec["linux"]["resources"] = json!({
        "cpu": {"cpus": "0", "mems": "0", "idle": 1},
        "unified": {"memory.high": "33554432", "cgroup.max.depth": "3"},
    });
    bed.start(&spec).await;
    let read = |file: &str| fs::read_to_string(bed.cgroup.join("c").join(file)).unwrap();
    assert_eq!(
        ["cpuset.cpus", "cpuset.mems", "cpu.idle", "memory.high", "cgroup.max.depth"].map(read),
        ["0\n", "0\n", "1\n", "33554432\n", "3\n"]
    );
    bed.runtime.remove("c", true).await.unwrap();
    for (resources, member) in [
        (json!({"rdma": {"mlx5_0": {"hcaHandles": 1}}}), "rdma"),
        (json!({"cpu": {"cpus": "4000"}}), "cpu.cpus"),
        (json!({"unified": {"memory.high": "much"}}), "unified[memory.high]"),
        (json!({"memory": {"limit": 1 << 20, "swap": 1 << 19}}), "memory.swap"),
        (json!({"network": {"classID": 1}}), "network"),
    ] {
        spec["linux"]["resources"] = resources;
        let error = bed.run(&spec).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("linux.resources.{member}")), "{member}: {error}");
    }
}

#[tokio::test]
async fn the_execution_domain_is_set() {
    let bed = Bed::new();
    let mut spec = bed.spec("cat /proc/self/personality > /tmp/first; sleep 100");
    spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    bed.start(&spec).await;
    // The first process may still be on its way.
    let script = "until [ -s /tmp/first ]; do sleep 0.1; done; cat /proc/self/personality /tmp/first";
    assert_eq!(bed.exec(script, json!({})).await.unwrap().1, "00000008\n00000008");
    bed.runtime.remove("c", true).await.unwrap();
}

#[tokio::test]
async fn a_terminal_is_the_controlling_one() {
    let bed = Bed::new();
    let mut spec = bed.spec(
        "stty size; ls -l /dev/console | head -c 1; echo tty > /dev/tty; [ -t 0 ] && read x && echo got $x",
    );
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"width": 100, "height": 30});
    let terminal = bed.create("c", &spec, Stdio::default()).await.unwrap().expect("a terminal");
    bed.runtime.start("c").await.unwrap();
    let mut terminal = File::from(terminal);
    terminal.write_all(b"word\n").unwrap();
    let text = tokio::task::spawn_blocking(move || {
        let (mut text, mut buffer) = (Vec::new(), [0; 256]);
        // EIO is the end.
        while let Ok(count @ 1..) = terminal.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    assert_eq!(bed.runtime.wait("c", "").await.unwrap().status.code(), 0);
    let text = text.await.unwrap();
    assert!(text.contains("30 100\r\nctty\r\n") && text.contains("got word"), "{text:?}");
    bed.runtime.remove("c", false).await.unwrap();
}

#[tokio::test]
async fn exec_has_the_same_properties() {
    let bed = Bed::new();
    bed.start(&bed.spec("sleep 100")).await;
    let script = "hostname; cat /proc/self/cgroup; grep -E 'CapBnd|NoNew' /proc/self/status; cat /proc/1/cmdline; exit 9";
    let (code, text) = bed.exec(script, json!({})).await.unwrap();
    assert_eq!(code, 9);
    for part in ["box", "0::/", "CapBnd:\t00000000000000e3", "NoNewPrivs:\t1", "sleep"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let user = json!({"user": {"uid": 1000, "gid": 1000}, "cwd": "/tmp"});
    assert_eq!(bed.exec("id -u; pwd", user).await.unwrap().1, "1000\n/tmp");
    let missing = bed.exec("", json!({"args": ["nonsense"]})).await;
    assert!(matches!(missing, Err(Error::Exec { .. })), "{missing:?}");
    let processes = bed.runtime.processes("c").unwrap();
    assert!(processes.iter().any(|process| process.exec.as_deref() == Some("")), "{processes:?}");
    bed.runtime.remove("c", true).await.unwrap();
}

#[tokio::test]
async fn limits_hold_and_are_reported() {
    let bed = Bed::new();
    let mut spec = bed.spec("sleep 100");
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20, "swap": 64 << 20, "reservation": 1 << 20},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000}, "pids": {"limit": 20},
    });
    bed.start(&spec).await;
    let stats = bed.runtime.stats("c").unwrap();
    assert_eq!(stats.memory.unwrap().usage_limit, 64 << 20);
    assert_eq!(stats.pids.unwrap().limit, 20);
    let read = |file: &str| fs::read_to_string(bed.cgroup.join("c").join(file)).unwrap();
    assert_eq!(
        [read("cpu.max"), read("cpu.weight"), read("memory.low")],
        ["50000 100000\n", "100\n", "1048576\n"]
    );
    let update = Resources::from_json(br#"{"pids": {"limit": 30}}"#).unwrap();
    bed.runtime.update("c", update).await.unwrap();
    assert_eq!(read("pids.max"), "30\n");
    bed.runtime.remove("c", true).await.unwrap();
}

/// The first disk of this machine.
fn disk() -> (u32, u32) {
    let mut names: Vec<_> =
        fs::read_dir("/sys/block").unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.starts_with("vd") || name.starts_with("sd"));
    names.sort();
    let numbers = fs::read_to_string(format!("/sys/block/{}/dev", names.first().expect("a disk"))).unwrap();
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    (major.parse().unwrap(), minor.parse().unwrap())
}

#[tokio::test]
async fn limits_of_disks_and_huge_pages() {
    let bed = Bed::new();
    let (major, minor) = disk();
    let limit = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let mut spec = bed.spec("sleep 100");
    spec["linux"]["resources"] = json!({
        "blockIO": {
            "weight": 500, "throttleReadBpsDevice": limit(1 << 20), "throttleWriteBpsDevice": limit(2 << 20),
            "throttleReadIOPSDevice": limit(100), "throttleWriteIOPSDevice": limit(200),
        },
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
    });
    bed.start(&spec).await;
    let read = |file: &str| fs::read_to_string(bed.cgroup.join("c").join(file)).unwrap();
    assert_eq!(read("io.max"), format!("{major}:{minor} rbps=1048576 wbps=2097152 riops=100 wiops=200\n"));
    let weight =
        if bed.cgroup.join("c/io.bfq.weight").exists() { read("io.bfq.weight") } else { read("io.weight") };
    assert!(weight == "default 500\n" || weight == "default 4950\n", "{weight}");
    assert_eq!([read("hugetlb.2MB.max"), read("hugetlb.2MB.rsvd.max")], ["4194304\n", "4194304\n"]);
    let pages = bed.runtime.stats("c").unwrap().hugetlb;
    assert!(pages.iter().any(|pages| (&*pages.page_size, pages.max) == ("2MB", 4 << 20)), "{pages:?}");
    let update = json!({"blockIO": {"throttleReadBpsDevice": limit(0)}});
    bed.runtime.update("c", Resources::from_json(update.to_string().as_bytes()).unwrap()).await.unwrap();
    assert!(read("io.max").contains("rbps=max wbps=2097152"), "{}", read("io.max"));
    bed.runtime.remove("c", true).await.unwrap();

    spec["linux"]["resources"] = json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]});
    let error = bed.run(&spec).await.unwrap_err().to_string();
    assert!(error.starts_with("linux.resources.hugepageLimits"), "{error}");
}

#[tokio::test]
async fn lack_of_memory_is_reported_before_the_exit() {
    let mut bed = Bed::new();
    let mut spec = bed.spec("tail /dev/zero");
    spec["process"]["args"] = json!(["tail", "/dev/zero"]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    assert_eq!(bed.run(&spec).await.unwrap().0, 137);
    assert!(matches!(bed.events.recv().await, Some(Event::Oom { kills: 1.., .. })));
    assert!(matches!(bed.events.recv().await, Some(Event::Exit { .. })));
}

#[tokio::test]
async fn pause_stops_and_resume_goes_on() {
    let bed = Bed::new();
    bed.start(&bed.spec("while :; do :; done")).await;
    bed.runtime.pause("c").await.unwrap();
    let used = || bed.runtime.stats("c").unwrap().cpu.unwrap().usage_usec;
    let before = used();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(used(), before);
    assert!(matches!(bed.runtime.pause("c").await, Err(Error::State { actual: State::Paused, .. })));
    assert!(matches!(bed.exec("true", json!({})).await, Err(Error::State { .. })));
    bed.runtime.resume("c").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(used() > before);
    bed.runtime.pause("c").await.unwrap();
    bed.runtime.remove("c", true).await.unwrap();
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    let bed = Bed::new();
    let mut spec = bed.spec("true");
    spec["linux"]["resources"] = json!({"unified": {"no.such": "1"}});
    let error = bed.run(&spec).await.unwrap_err();
    assert!(error.to_string().starts_with("linux.resources.unified[no.such]"), "{error}");
    assert!(bed.runtime.list().is_empty());
    assert_eq!(bed.output(&bed.spec("echo again")).await, "again");
}

/// The same tests on the guest's kernel.
#[test]
fn all_of_this_holds_in_a_machine_of_our_own() {
    oci::holds_in_a_machine("all_of_this_holds_in_a_machine_of_our_own");
}
