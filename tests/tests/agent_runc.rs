//! The same specifications under runc and under the agent: the answers are the same.

#![allow(clippy::unwrap_used)]

use caisson_e2e::oci::Bed;
use serde_json::{Value, json};

/// What a container of this script says under both.
async fn both(bed: &Bed, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> Option<String> {
    // runc copies the two streams one by one.
    let mut spec = bed.spec(&format!("exec 2>&1; {script}"));
    // runc's default without rules differs from version to version.
    spec["linux"]["resources"]["devices"] = json!([{"allow": false, "access": "rwm"}]);
    change(&mut spec);
    let ours = bed.run(&spec).await.unwrap();
    let runcs = bed.run_under_runc(&spec);
    (ours != runcs).then(|| format!("{name}:\nruncs {} {}\nours {} {}", runcs.0, runcs.1, ours.0, ours.1))
}

fn user(spec: &mut Value) {
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 7], "umask": 0o027});
    spec["process"]["cwd"] = json!("/tmp");
}

fn limits(spec: &mut Value) {
    spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_STACK", "soft": 4 << 20, "hard": 8 << 20},
    ]);
    spec["process"]["oomScoreAdj"] = json!(321);
    spec["linux"]["resources"]["memory"] =
        json!({"limit": 64 << 20, "swap": 64 << 20, "reservation": 1 << 20});
    spec["linux"]["resources"]["cpu"] = json!({"quota": 50_000, "period": 100_000});
    spec["linux"]["resources"]["pids"] = json!({"limit": 33});
}

fn capabilities(spec: &mut Value) {
    let set = json!(["CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_KILL"]);
    spec["process"]["capabilities"] = json!({"bounding": set, "effective": set, "permitted": set, "inheritable": set, "ambient": ["CAP_KILL"]});
}

fn seccomp(spec: &mut Value) {
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 1, "value": 18, "op": "SCMP_CMP_EQ"}]},
        ],
    });
}

fn nothing(_: &mut Value) {}

#[tokio::test]
async fn runc_answers_the_same() {
    type Change = fn(&mut Value);
    let cases: [(&str, &str, Change); 22] = [
        ("exit code", "exit 42", nothing),
        ("a child's signals", "sh -c 'kill -9 $$'; echo $?; sh -c 'kill -TERM $$'; echo $?", nothing),
        ("environment", "env | sort; echo $0 $#", nothing),
        ("streams", "ls /proc/self/fd", nothing),
        ("names", "hostname; cat /proc/sys/kernel/domainname", nothing),
        ("processes", "echo $$ /proc/[0-9]*; cut -d' ' -f4-7 /proc/self/stat", nothing),
        ("signal masks", "grep -E '^Sig(Blk|Ign)' /proc/self/status", nothing),
        ("user", "id -u; id -g; id -G; umask; pwd; echo $HOME; touch /x", user),
        ("capabilities", "grep -E 'Cap|NoNew' /proc/self/status", nothing),
        ("ambient capabilities", "grep -E 'Cap|NoNew' /proc/self/status", capabilities),
        ("capabilities of a user", "grep -E 'Cap|NoNew' /proc/self/status", |spec| {
            user(spec);
            capabilities(spec);
            spec["process"]["noNewPrivileges"] = json!(false);
        }),
        (
            "limits of the process",
            "ulimit -n; ulimit -Hn; ulimit -c; ulimit -s; cat /proc/self/oom_score_adj",
            limits,
        ),
        (
            "limits of the control group",
            "cd /sys/fs/cgroup; cat memory.max memory.low cpu.max pids.max; cat /proc/self/cgroup; touch x 2>&1",
            limits,
        ),
        // What lies over masked paths is a matter of taste.
        ("mounts", "cut -d' ' -f2-4 /proc/mounts | grep -vE '^/ |^/proc/(kcore|keys|acpi) ' | sort", nothing),
        // runc's link to /proc/kcore is none of the specification's.
        (
            "devices",
            "stat -c '%n %F %t:%T %a %u:%g' /dev/* /dev/pts/* | grep -v ^/dev/core
             for link in fd stdin stdout stderr ptmx; do readlink /dev/$link; done",
            nothing,
        ),
        (
            "device rules",
            "cat /dev/mine; echo $?; head -c 2 /dev/zero | wc -c; echo x > /dev/full; stat -c '%F %t:%T %a' /dev/mine",
            |spec| {
                spec["linux"]["devices"] =
                    json!([{"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640}]);
            },
        ),
        (
            "proc",
            "ls /proc/sys /proc/acpi; stat -c '%n %F %s' /proc/kcore /proc/keys; head -c 1 /proc/kcore; \
             echo 1 > /proc/sys/kernel/panic; ls /proc/sys/net/ipv4/conf",
            nothing,
        ),
        ("sys", "ls /sys /sys/class/net; touch /sys/x", nothing),
        (
            "a read-only root",
            "touch /x; touch /tmp/x; touch /dev/x; cut -d' ' -f4 /proc/mounts | head -n 1 | cut -d, -f1",
            |spec| spec["root"]["readonly"] = json!(true),
        ),
        ("sysctls", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax", |spec| {
            spec["linux"]["sysctl"] =
                json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.msgmax": "4242"});
        }),
        ("seccomp", "mkdir /tmp/a; kill -0 $$ && echo alive; kill -18 $$; echo $?", seccomp),
        (
            "mount options",
            "cut -d' ' -f2-4 /proc/mounts | grep /own | sort; touch /own/ro/x; stat -c %a /own/tmp",
            |spec| {
                let mounts = spec["mounts"].as_array_mut().unwrap();
                let options = ["size=64k", "mode=1770", "noexec", "nodev", "nosuid"];
                mounts.push(
                    json!({"destination": "/own/tmp", "type": "tmpfs", "source": "x", "options": options}),
                );
                let options = ["rbind", "ro", "nosuid", "noexec"];
                mounts.push(
                    json!({"destination": "/own/ro", "type": "bind", "source": "/etc", "options": options}),
                );
            },
        ),
    ];
    let bed = Bed::new();
    let mut differences = Vec::new();
    for (name, script, change) in cases {
        differences.extend(both(&bed, name, script, change).await);
    }
    assert!(differences.is_empty(), "{}", differences.join("\n\n"));
}

/// What can not be run is an error of both, and leaves nothing.
#[tokio::test]
async fn runc_refuses_the_same() {
    let bed = Bed::new();
    let cases: [fn(&mut Value); 5] = [
        |spec| spec["process"]["args"] = json!(["nonsense"]),
        |spec| spec["process"]["args"] = json!(["/etc/passwd"]),
        |spec| spec["process"]["cwd"] = json!("/proc/self/fd/7"),
        |spec| spec["linux"]["sysctl"] = json!({"vm.swappiness": "1"}),
        |spec| spec["process"]["rlimits"] = json!([{"type": "RLIMIT_WARP", "soft": 1, "hard": 1}]),
    ];
    for (number, change) in cases.into_iter().enumerate() {
        let mut spec = bed.spec("true");
        change(&mut spec);
        assert!(bed.run(&spec).await.is_err(), "{number}: ours runs");
        let (code, text) = bed.run_under_runc(&spec);
        assert!(code != 0, "{number}: runc runs: {text}");
        assert!(bed.runtime.list().is_empty());
    }
}

/// Every action and every comparison of a filter, by what the kernel makes of it.
#[tokio::test]
async fn runcs_library_compiles_the_same_filters() {
    let bed = Bed::new();
    let mut differences = Vec::new();
    let actions = ["ALLOW", "ERRNO", "TRAP", "TRACE", "LOG", "KILL", "KILL_THREAD", "KILL_PROCESS"];
    for action in actions {
        let script = "sh -c 'mkdir /tmp/a'; echo $?; rm -rf /tmp/a";
        let change = |spec: &mut Value| {
            let rule = json!({"names": ["mkdir", "mkdirat"], "action": format!("SCMP_ACT_{action}")});
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        };
        differences.extend(both(&bed, action, script, change).await);
    }
    // Signals 0 to 18 to itself, of which those that end it or stop it are left out.
    let script = "for signal in 0 17 18; do kill -$signal $$; echo $signal $?; done";
    let argument =
        |op: &str, value: u64, two: u64| json!({"index": 1, "value": value, "valueTwo": two, "op": op});
    let conditions = [
        ("equal", json!([argument("SCMP_CMP_EQ", 17, 0)])),
        ("not equal", json!([argument("SCMP_CMP_NE", 17, 0)])),
        ("less", json!([argument("SCMP_CMP_LT", 17, 0)])),
        ("less or equal", json!([argument("SCMP_CMP_LE", 17, 0)])),
        ("greater", json!([argument("SCMP_CMP_GT", 17, 0)])),
        ("greater or equal", json!([argument("SCMP_CMP_GE", 17, 0)])),
        ("masked", json!([argument("SCMP_CMP_MASKED_EQ", 16, 16)])),
        ("alternatives", json!([argument("SCMP_CMP_EQ", 17, 0), argument("SCMP_CMP_EQ", 18, 0)])),
        ("both", json!([argument("SCMP_CMP_EQ", 17, 0), {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}])),
    ];
    for (name, args) in conditions {
        let change = |spec: &mut Value| {
            let rule = json!({"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "args": args});
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
                "syscalls": [rule],
            });
        };
        differences.extend(both(&bed, name, script, change).await);
    }
    assert!(differences.is_empty(), "{}", differences.join("\n\n"));
}
