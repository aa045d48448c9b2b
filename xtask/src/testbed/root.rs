//! What the testbed boots: Debian's own kernel, an initramfs that finds the disk, and a root per variant.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::{Variant, qemu::Qemu};
use crate::{
    apt::{PrivateApt, Suite},
    cache::Key,
    clients,
    host::Host,
    initramfs::Archive,
    proc,
    tools::{self, Need},
};

/// What the root has on top of a minimal Debian.
const PACKAGES: &[&str] = &[
    // What we are held against, and what starts us.
    "containerd",
    "containernetworking-plugins",
    "crun",
    "qemu-system-x86",
    "runc",
    // Other engines, which start containers by containerd or without it, and a registry to pull from. Nothing of this, nor
    // systemd, starts by itself: PID 1 is init.sh.
    "conmon",
    "docker-cli",
    "docker-registry",
    "docker.io",
    "netavark",
    "podman",
    "systemd",
    // Networks.
    "bridge-utils",
    "conntrack",
    "curl",
    "ethtool",
    "iperf3",
    "iproute2",
    "iptables",
    "iputils-ping",
    "netcat-openbsd",
    "nftables",
    "socat",
    "tcpdump",
    // Disks and file systems.
    "acl",
    "attr",
    "dmsetup",
    "e2fsprogs",
    "erofs-utils",
    "fio",
    "mount",
    "thin-provisioning-tools",
    // Clients and load.
    "postgresql-client",
    "redis-tools",
    "stress-ng",
    // Looking around.
    "bpftool",
    "busybox-static",
    "ca-certificates",
    "cpio",
    "file",
    "jq",
    "kmod",
    "less",
    "lsof",
    "procps",
    "psmisc",
    "python3-minimal",
    "strace",
    "util-linux",
    "xz-utils",
    "zstd",
];

/// Files that nobody reads in a testbed.
const LEFT_OUT: [&str; 4] =
    ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*"];

/// Modules of Debian's kernel that the testbed and the tests may want, by the start of their path below `kernel/`.
/// What they depend on is taken too.
const MODULES: &[&str] = &[
    "arch/x86/kvm/",
    "drivers/block/loop",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio",
    "drivers/firmware/qemu_fw_cfg",
    "drivers/md/dm-",
    "drivers/net/dummy",
    "drivers/net/ipvlan/",
    "drivers/net/macvlan",
    "drivers/net/macvtap",
    "drivers/net/tap",
    "drivers/net/tun",
    "drivers/net/veth",
    "drivers/net/virtio_net",
    "drivers/net/vxlan/",
    "drivers/vhost/",
    "drivers/virtio/",
    "crypto/crc32c",
    "fs/9p/",
    "fs/erofs/",
    "fs/ext4/",
    "fs/fuse/",
    "fs/overlayfs/",
    "net/802/",
    "net/8021q/",
    "net/9p/",
    "net/bridge/",
    "net/ipv4/",
    "net/ipv6/",
    "net/llc/",
    "net/netfilter/",
    "net/packet/",
    "net/sched/",
    "net/unix/",
    "net/vmw_vsock/",
    "net/core/",
];

/// The same of what only older kernels have as modules.
const OLDER_MODULES: &[&str] = &["drivers/char/virtio_console", "drivers/virtio/virtio_pci"];

/// What the initramfs loads, in this order, each after what it depends on.
const BOOT_MODULES: [&str; 6] =
    ["virtio_blk", "virtio_pci", "virtio_console", "crc32c_generic", "crc32c_intel", "ext4"];

/// The size of the root's file system. It is sparse, and what is not in it yet costs nothing.
const ROOT_SIZE: &str = "12G";

/// A testbed that is ready to boot.
#[derive(Debug)]
pub(crate) struct Testbed {
    /// What emulates it.
    pub(crate) qemu: Qemu,
    /// Debian's kernel.
    pub(crate) kernel: PathBuf,
    /// The initramfs that mounts the root.
    pub(crate) initramfs: PathBuf,
    /// The root's ext4 image, never written to.
    pub(crate) root: PathBuf,
}

/// Builds what a variant boots, unless the cache has it.
///
/// # Errors
/// When packages can't be fetched or a tool fails.
pub(crate) fn build(host: &Host, variant: Variant) -> Result<Testbed> {
    tools::require(&[Need::Testbed])?;
    if variant == Variant::Newest {
        // Not part of the root: it is shared with the machine, and found first.
        clients::build(host, clients::Module::Containerd)?;
    }
    let roots_kernel = kernel(host, ROOTS_KERNEL)?;
    let root = root(host, variant.root(), &roots_kernel)?;
    let (kernel, modules) = match variant.kernel() {
        ROOTS_KERNEL => (roots_kernel, Modules::InRoot),
        suite => (kernel(host, suite)?, Modules::Along),
    };
    let key = Key::new("testbed-initramfs-2")
        .with(root.to_string_lossy().as_bytes())
        .with(kernel.to_string_lossy().as_bytes())
        .with(BOOT_MODULES.join(" "))
        .with(INITRAMFS_SCRIPT)
        .with(INIT_SCRIPT);
    let initramfs = host.cache.entry("testbed-initramfs", &key, |output| {
        let archive = initramfs(&kernel, &root.join("busybox"), modules)?;
        fs::write(output.join("initramfs"), archive).context("writing the testbed's initramfs")
    })?;
    Ok(Testbed {
        qemu: Qemu::unpack(host)?,
        kernel: kernel.join("vmlinuz"),
        initramfs: initramfs.join("initramfs"),
        root: root.join("root.ext4"),
    })
}

/// The first thing that runs in the testbed.
const INITRAMFS_SCRIPT: &str = include_str!("guest/initramfs.sh");

/// Its PID 1 from then on.
const INIT_SCRIPT: &str = include_str!("guest/init.sh");

/// The suite whose kernel's modules are in the roots.
const ROOTS_KERNEL: Suite = Suite::Trixie;

/// Where a kernel's modules are when the testbed boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Modules {
    /// In the root.
    InRoot,
    /// In the initramfs, which puts them there.
    Along,
}

/// A root file system that has this kernel's modules, with busybox and a list of its packages beside it.
fn root(host: &Host, suite: Suite, kernel: &Path) -> Result<PathBuf> {
    let mut key =
        Key::new("testbed-root-1").with(suite.name()).with(PACKAGES.join(" ")).with(LEFT_OUT.join(" "));
    key = key.with(ROOT_SIZE).with(kernel.to_string_lossy().as_bytes());
    host.cache.entry("testbed-root", &key, |output| {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "building the testbed's root needs root (mmdebstrap and mke2fs -d)"
        );
        let scratch = host.cache.scratch()?;
        let tree = scratch.path().join("root");
        bootstrap(host, suite, &tree)?;
        fs::copy(tree.join("bin/busybox"), output.join("busybox")).context("keeping the static busybox")?;
        fs::write(output.join("packages"), installed(&tree)?).context("keeping the list of packages")?;
        image(host, kernel, &tree, &output.join("root.ext4"))
    })
}

/// Debian's kernel and its modules, unpacked.
fn kernel(host: &Host, suite: Suite) -> Result<PathBuf> {
    let apt = PrivateApt::open(&host.cache, suite)?;
    let package = apt.dependency("linux-image-amd64", "linux-image-")?;
    let version = apt.version(&package)?;
    let modules = if suite == Suite::Bookworm { &[MODULES, OLDER_MODULES].concat() } else { MODULES };
    let key = Key::new("testbed-kernel-1").with(&package).with(&version).with(modules.join(" "));
    host.cache.entry("testbed-kernel", &key, |output| {
        let scratch = host.cache.scratch()?;
        apt.unpack(&package, scratch.path())?;
        let release = package.trim_start_matches("linux-image-");
        fs::copy(scratch.path().join(format!("boot/vmlinuz-{release}")), output.join("vmlinuz"))
            .context("keeping the testbed's kernel")?;
        // Packages from before Debian 13 have them in /lib.
        let usr = Some(scratch.path().join("usr")).filter(|usr| usr.join("lib/modules").exists());
        let above = usr.as_deref().unwrap_or(scratch.path());
        let from = above.join("lib/modules").join(release);
        let to = output.join("lib/modules").join(release);
        let mut index = proc::contained("depmod");
        index.arg("--basedir").arg(above).arg(release);
        proc::run_logged("indexing the testbed's kernel modules", &mut index, &host.log("testbed-depmod"))?;
        take_modules(&from, &to, modules)?;
        // Compressed modules are slow to load on an emulated processor, and so are large ones.
        let script = "find \"$1\" -name '*.ko.xz' -exec xz --decompress {} + && \
                      find \"$1\" -name '*.ko' -exec strip --strip-debug {} + && depmod --basedir \"$2\" \"$3\"";
        let mut unpack = proc::contained("sh");
        unpack.args(["-c", script, "sh"]).arg(&to).arg(output).arg(release);
        proc::run_logged("unpacking the testbed's kernel modules", &mut unpack, &host.log("testbed-kernel"))
    })
}

fn take_modules(from: &Path, to: &Path, wanted: &[&str]) -> Result<()> {
    let dependencies = fs::read_to_string(from.join("modules.dep")).context("reading modules.dep")?;
    for file in closure(&dependencies, wanted) {
        let target = to.join(file);
        let parent = target.parent().context("a module has no directory")?;
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        fs::copy(from.join(file), &target).with_context(|| format!("keeping {file}"))?;
    }
    for index in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(from.join(index), to.join(index)).with_context(|| format!("keeping {index}"))?;
    }
    Ok(())
}

/// The modules whose path below `kernel/` starts with one of the prefixes, and what they need, by a `modules.dep`.
fn closure<'a>(dependencies: &'a str, prefixes: &[&str]) -> BTreeSet<&'a str> {
    let wanted = |path: &str| {
        let path = path.trim_start_matches("kernel/");
        prefixes.iter().any(|prefix| path.starts_with(prefix))
    };
    let lines = dependencies.lines().filter_map(|line| line.split_once(':')).filter(|(path, _)| wanted(path));
    // modules.dep lists the dependencies of dependencies too.
    lines.flat_map(|(path, needs)| needs.split_whitespace().chain([path])).collect()
}

/// Installs the packages into a directory. The bootstrap mounts in its own namespace, so that no end of it leaves a
/// mount on the host.
fn bootstrap(host: &Host, suite: Suite, tree: &Path) -> Result<()> {
    let mut mmdebstrap = proc::contained("mmdebstrap");
    mmdebstrap.args(["--mode=root", "--variant=minbase", "--components=main", "--format=directory"]);
    mmdebstrap.arg(format!("--include={}", PACKAGES.join(",")));
    for option in ["Acquire::Check-Valid-Until \"false\"", "Acquire::Languages \"none\""] {
        mmdebstrap.arg(format!("--aptopt={option}"));
    }
    for path in LEFT_OUT {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    mmdebstrap.arg(suite.name()).arg(tree).args(suite.sources()?);
    let what = format!("installing the testbed's {} root", suite.name());
    proc::run_logged(&what, &mut mmdebstrap, &host.log(&format!("testbed-root-{}", suite.name())))
}

/// The names and versions of what is installed.
fn installed(tree: &Path) -> Result<String> {
    let mut query = proc::dies_with_us("dpkg-query", Signal::SIGKILL);
    query.arg(format!("--admindir={}", tree.join("var/lib/dpkg").display()));
    proc::output(query.args(["--show", "--showformat=${Package} ${Version}\n"]))
}

/// Turns a root directory and the kernel's modules into an ext4 image.
fn image(host: &Host, kernel: &Path, tree: &Path, output: &Path) -> Result<()> {
    let mut copy = proc::dies_with_us("cp", Signal::SIGKILL);
    proc::run(copy.arg("--archive").arg(kernel.join("lib/modules")).arg(tree.join("usr/lib/")))?;
    let mut mke2fs = proc::contained("mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "testbed"]);
    mke2fs.args(["-E", "lazy_itable_init=1,root_owner=0:0", "-d"]).arg(tree).arg(output).arg(ROOT_SIZE);
    proc::run_logged("writing the testbed's root image", &mut mke2fs, &host.log("testbed-image"))
}

/// The archive with busybox, the modules for the root disk, and the two scripts.
fn initramfs(kernel: &Path, busybox: &Path, whose: Modules) -> Result<Vec<u8>> {
    let releases = fs::read_dir(kernel.join("lib/modules")).context("listing the testbed's modules")?;
    let modules = releases.flatten().next().context("the testbed's kernel has no modules")?.path();
    let mut archive = Archive::new(Vec::new());
    for directory in ["bin", "dev", "proc", "newroot", "modules"] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox).context("reading busybox")?)?;
    archive.symlink("bin/sh", "busybox")?;
    archive.file("init", 0o755, INITRAMFS_SCRIPT.as_bytes())?;
    archive.file("init.sh", 0o755, INIT_SCRIPT.as_bytes())?;
    let dependencies = fs::read_to_string(modules.join("modules.dep")).context("reading modules.dep")?;
    let mut order = String::new();
    for path in load_order(&dependencies, &BOOT_MODULES)? {
        let name = path.rsplit('/').next().unwrap_or(path);
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &fs::read(modules.join(path)).context("reading a module")?,
        )?;
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    if whose == Modules::Along {
        archive.directory("along")?;
        tree(&mut archive, &kernel.join("lib/modules"), "along")?;
    }
    Ok(archive.finish()?)
}

/// Adds all files and directories below `from` to the archive's directory `to`.
fn tree(archive: &mut Archive<Vec<u8>>, from: &Path, to: &str) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(from)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    // The same bytes on every machine.
    names.sort();
    for name in names {
        let (from, to) = (from.join(&name), format!("{to}/{}", name.to_string_lossy()));
        if from.is_dir() {
            archive.directory(&to)?;
            tree(archive, &from, &to)?;
        } else {
            let contents = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
            archive.file(&to, 0o644, &contents)?;
        }
    }
    Ok(())
}

/// The files to load for these modules, dependencies first, by a `modules.dep`. Modules that are not there are built
/// into the kernel or unknown to it, but the first must be there.
fn load_order<'a>(dependencies: &'a str, modules: &[&str]) -> Result<Vec<&'a str>> {
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for module in modules {
        let found = dependencies.lines().filter_map(|line| line.split_once(':')).find(|(path, _)| {
            let name = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".ko");
            name.replace('-', "_") == *module
        });
        let Some((path, needs)) = found else {
            if order.is_empty() {
                bail!("the testbed's kernel has no module {module}");
            }
            continue;
        };
        // The deepest dependency is listed last.
        for file in needs.split_whitespace().rev().chain([path]) {
            if seen.insert(file) {
                order.push(file);
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_loaded_first_and_once() {
        let dependencies = "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko\n\
                            kernel/fs/jbd2/jbd2.ko:\nkernel/lib/crc16.ko:\n\
                            kernel/drivers/block/virtio-blk.ko: kernel/lib/crc16.ko\n";
        let order = load_order(dependencies, &["virtio_blk", "built_in", "ext4"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| path.rsplit('/').next().unwrap()).collect();
        assert_eq!(names, ["crc16.ko", "virtio-blk.ko", "jbd2.ko", "ext4.ko"]);
    }

    #[test]
    fn modules_come_with_what_they_need() {
        let dependencies = "kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/drivers/crypto/ccp/ccp.ko.xz\n\
                            kernel/drivers/crypto/ccp/ccp.ko.xz:\nkernel/drivers/gpu/big.ko.xz:\n";
        let files: Vec<_> = closure(dependencies, &["arch/x86/kvm/"]).into_iter().collect();
        assert_eq!(files, ["kernel/arch/x86/kvm/kvm-amd.ko.xz", "kernel/drivers/crypto/ccp/ccp.ko.xz"]);
    }

    #[test]
    fn a_kernel_without_the_root_disk_is_an_error() {
        load_order("kernel/fs/ext4/ext4.ko:\n", &["virtio_blk", "ext4"]).unwrap_err();
    }
}
