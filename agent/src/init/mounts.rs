//! The file systems of a minimal system.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot};

use super::InitError;

/// Where the control groups are.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The group of the agent itself: processes are in leaves only, or the root could not enable its controllers.
const AGENT_GROUP: &str = "agent";

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const NOTHING: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

const MOUNTS: [Mount; 8] = [
    Mount { kind: "proc", target: "/proc", flags: NOTHING, data: "" },
    Mount { kind: "sysfs", target: "/sys", flags: NOTHING, data: "" },
    Mount { kind: "cgroup2", target: CGROUP_ROOT, flags: NOTHING, data: "nsdelegate,memory_recursiveprot" },
    Mount { kind: "devtmpfs", target: "/dev", flags: MsFlags::MS_NOSUID, data: "mode=0755" },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "gid=5,mode=0620,ptmxmode=0666",
    },
    Mount {
        kind: "tmpfs",
        target: "/dev/shm",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=0755",
    },
    Mount {
        kind: "tmpfs",
        target: "/tmp",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
];

/// Parameters of the kernel.
const PARAMETERS: [(&str, &str); 2] = [
    // No process of this machine gets an io_uring(7): its sockets pass by the filter that keeps containers from vsock.
    // That filter refuses rings as well, also where a privileged container changes this parameter back.
    ("/proc/sys/kernel/io_uring_disabled", "2"),
    // A processor keeps free pages for itself, on a small machine up to an eighth of all memory. The host is not told
    // that those are free, and does not get them back.
    ("/proc/sys/vm/percpu_pagelist_high_fraction", "1024"),
];

/// Turns the initramfs into a minimal system. To be called while the process has one thread.
///
/// # Errors
/// When the kernel lacks one of the file systems.
pub fn prepare() -> Result<(), InitError> {
    umask(Mode::empty());
    leave_rootfs()?;
    for each in &MOUNTS {
        fs::create_dir_all(each.target).map_err(InitError::new("make", each.target))?;
        let mounted = mount(Some(each.kind), each.target, Some(each.kind), each.flags, Some(each.data));
        match mounted {
            // The kernel mounts devtmpfs itself when it is configured to.
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => return Err(InitError::new("mount", each.target)(errno.into())),
        }
    }
    for (link, to) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match std::os::unix::fs::symlink(to, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(InitError::new("link", link)(error));
            }
            _ => {}
        }
    }
    fs::create_dir_all("/etc").map_err(InitError::new("make", "/etc"))?;
    umask(Mode::from_bits_truncate(0o022));
    for (parameter, value) in PARAMETERS {
        match fs::write(parameter, value) {
            // A kernel that is older, or built without.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, "{parameter} is not set"),
            Ok(()) => {}
        }
    }
    prepare_cgroups()
}

/// Makes a tmpfs the root: `pivot_root(2)`, which containers need, refuses to work on the initramfs itself.
fn leave_rootfs() -> Result<(), InitError> {
    const ROOT: &str = "/sysroot";
    let failed = |action| move |errno: nix::errno::Errno| InitError::new(action, ROOT)(errno.into());
    fs::create_dir_all(ROOT).map_err(InitError::new("make", ROOT))?;
    mount(Some("rootfs"), ROOT, Some("tmpfs"), MsFlags::empty(), Some("mode=0755,size=16m"))
        .map_err(failed("mount"))?;
    chdir(ROOT).map_err(failed("enter"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(failed("move"))?;
    chroot(".").map_err(failed("chroot to"))?;
    chdir("/").map_err(failed("enter"))
}

/// Every controller is on for children of the root, and the agent is in a leaf.
fn prepare_cgroups() -> Result<(), InitError> {
    let root = Path::new(CGROUP_ROOT);
    let agent = root.join(AGENT_GROUP);
    let failed = |action: &'static str| InitError::new(action, CGROUP_ROOT);
    fs::create_dir_all(&agent).map_err(failed("make a group in"))?;
    fs::write(agent.join("cgroup.procs"), "1").map_err(failed("move PID 1 in"))?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).map_err(failed("read"))?;
    for controller in controllers.split_whitespace() {
        // One by one: a controller that can not be delegated must not keep the others from it.
        if let Err(error) = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::warn!(controller, %error, "controller is not enabled");
        }
    }
    Ok(())
}
