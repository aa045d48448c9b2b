//! A newcomer's machine: Debian 12 with Rust and nothing else, an empty cache, and the two commands of the README.
//!
//! It takes hours, which is longer than nextest allows a test, so nothing starts it but its name:
//! `cargo test --package xtask --test fresh -- --ignored --nocapture`, as root. The machine is a root of its own on a file
//! that has no name, in namespaces of its own: whatever ends the test ends all of it, and gives its disk back.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    path::Path,
    process::{Command, Stdio},
};

/// Bytes of its disk, of which only what is written is taken.
const DISK: &str = "40G";

/// What a newcomer installs before Rust, on top of a minimal Debian.
const PACKAGES: &str = "ca-certificates,gcc,git,libc6-dev";

/// Makes the machine. `$1` is the size of its disk, `$2` its packages, `$3` the Rust toolchain, `$4` the workspace.
const MAKE: &str = r#"
set -eu
mount --make-rprivate /
disk=$(mktemp /var/tmp/fresh-XXXXXX)
trap 'rm -f "$disk"' EXIT
truncate --size "$1" "$disk"
mke2fs -q -F -t ext4 -E lazy_itable_init=1,lazy_journal_init=1 "$disk"
mount -o loop "$disk" /mnt
rm "$disk"
trap - EXIT
root=/mnt/root
echo "==> making a bare Debian 12" >&2
apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) main' 'Created-By: Packages' | sort -u |
    grep -E ' bookworm(-security|-updates)? main$' > /mnt/sources.list
TMPDIR=/mnt mmdebstrap --quiet --mode=root --variant=minbase --include="$2" \
    --aptopt='APT::Install-Recommends "false"' bookworm "$root" /mnt/sources.list
cp --remove-destination /etc/resolv.conf /etc/hosts "$root/etc/"
# Authorities that this machine trusts in addition.
cp --archive /etc/ssl/certs/. "$root/etc/ssl/certs/"
# A root that is no mount has no propagation to change, which unshare does in there.
mount --bind "$root" "$root"
mkdir "$root/opt/rust" "$root/src"
mount --bind -o ro "$3" "$root/opt/rust"
git -c safe.directory='*' clone --quiet --no-hardlinks "$4" "$root/src"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
echo "==> entering it" >&2
"#;

/// Enters it: the environment is a login's, and what the network asks for.
const ENTER: &str = r#"
exec env -i HOME=/root TERM=dumb PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
    chroot /mnt/root sh -euc "$5"
"#;

/// Runs `commands` in the machine, with its output on ours.
fn on_a_fresh_machine(commands: &str) -> bool {
    let toolchain = Command::new("rustc").args(["--print", "sysroot"]).output().unwrap();
    let toolchain = String::from_utf8(toolchain.stdout).unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // unshare dies with us, and all that it started with it.
    let mut machine = Command::new("setpriv");
    machine.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--mount-proc"]);
    machine.args(["--kill-child=SIGKILL", "sh", "-c", &format!("{MAKE}{ENTER}"), "sh"]);
    machine.args([DISK, PACKAGES, toolchain.trim()]).arg(workspace).arg(commands);
    machine.stdin(Stdio::null()).status().unwrap().success()
}

#[test]
#[ignore = "takes hours; started by its name"]
fn a_fresh_debian_runs_the_commands_of_the_readme() {
    let readme = include_str!("../../README.md");
    for command in ["cargo xtask demo", "cargo xtask test"] {
        assert!(readme.contains(command), "the README no longer has {command}");
    }
    assert!(on_a_fresh_machine("cd /src; cargo xtask demo; cargo xtask test"));
}
