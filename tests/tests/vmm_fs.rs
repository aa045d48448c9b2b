//! Shared directories on real KVM, with Linux's own virtio-fs driver on the other side.

use std::{
    fs::{self, File, Permissions},
    io::Write,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    ctr,
    vmm::{Vmm, Workshop},
};
use caisson_vmm::{
    config::{DeviceConfig, FileSource, FsDevice},
    devices::fs::FsConfig,
};

/// What a guest does with the share `test`, which has a file `greeting`. It prints `done` at the end.
const GUEST: &str = "
mkdir /mnt; mount -t virtiofs test /mnt || { echo no mount; sleep 1000; }
cd /mnt
check() { \"$@\" > /tmp.out 2>&1 || echo \"failed: $*: $(cat /tmp.out)\"; }
refuse() { \"$@\" > /dev/null 2>&1 && echo \"went well: $*\"; }
check grep -q hello greeting
check sh -c 'echo written > new; cat new new > twice; mv twice moved; ln moved linked; ln -s new symbolic'
check test \"$(cat symbolic)\" = written
check test \"$(stat -c %h linked)\" = 2
check mkdir -p a/b/c; check rmdir a/b/c; refuse rmdir a
check chmod 640 new; check chown 12:34 new; check touch -d '2001-02-03 04:05:06' new
check mkfifo pipe; refuse mknod device c 1 3
check dd if=/dev/zero of=sparse bs=1 count=1 seek=10485759 conv=notrunc
check test \"$(stat -c %s sparse)\" = 10485760
check cp /bin/busybox true; check ./true
i=0; while [ $i -lt 300 ]; do echo $i > many.$i; i=$((i + 1)); done
check test \"$(ls | grep -c many)\" = 300
rm many.*; check test -z \"$(ls | grep many)\"
refuse cat outside
check test -n \"$(df /mnt | grep test)\"
md5sum big | cut -d' ' -f1
echo done
sleep 1000";

fn share(directory: Option<FileSource>) -> DeviceConfig {
    let options = FsConfig { tag: "test".into(), ..FsConfig::default() };
    DeviceConfig::Fs(FsDevice { directory, options })
}

/// A directory to share: a greeting, a link to what only the host has, and 100 MiB that are not all the same.
fn directory(workshop: &Workshop) -> Result<(std::path::PathBuf, String)> {
    let path = workshop.path("shared");
    fs::create_dir(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o777))?;
    fs::write(path.join("greeting"), "hello\n")?;
    symlink("/etc/debian_version", path.join("outside"))?;
    let mut big = File::create(path.join("big"))?;
    let block = caisson_e2e::vsock::pattern(1 << 20);
    for _ in 0..100 {
        big.write_all(&block)?;
    }
    let sum = ctr::run(std::process::Command::new("md5sum").arg(path.join("big")))?.stdout;
    Ok((path, sum.split(' ').next().unwrap_or_default().to_owned()))
}

/// Awaits the end of [`GUEST`], and looks at what it left.
fn finish(vmm: &mut Vmm, directory: &Path, sum: &str) -> Result<()> {
    vmm.expect("done")?;
    let trouble: Vec<_> =
        vmm.transcript.iter().filter(|line| line.contains("failed:") || line.contains("went well")).collect();
    ensure!(trouble.is_empty(), "{trouble:#?}");
    ensure!(vmm.transcript.iter().any(|line| line == sum), "the big file came through as\n{}", vmm.tail());
    ensure!(fs::read_to_string(directory.join("moved"))? == "written\nwritten\n");
    ensure!(fs::read_link(directory.join("symbolic"))? == Path::new("new"));
    let new = directory.join("new").metadata()?;
    ensure!(new.mode() & 0o777 == 0o640 && new.mtime() == 981_173_106, "{new:?}");
    let sparse = directory.join("sparse").metadata()?;
    ensure!(sparse.len() == 10 << 20 && sparse.blocks() < 64, "{sparse:?}");
    ensure!(!directory.join("device").exists());
    Ok(())
}

#[test]
fn a_shared_directory_is_a_file_system() -> Result<()> {
    let workshop = Workshop::new(GUEST)?;
    let (directory, sum) = directory(&workshop)?;
    let mut config = workshop.config("")?;
    config.devices.push(share(Some(FileSource::Path(directory.clone()))));
    let mut vmm = Vmm::boot(config)?;
    finish(&mut vmm, &directory, &sum)?;
    let owner = directory.join("new").metadata()?;
    ensure!((owner.uid(), owner.gid()) == (12, 34), "{owner:?}");
    Ok(())
}

#[test]
fn a_jail_serves_its_share_and_what_is_mounted_there_later() -> Result<()> {
    let workshop = Workshop::new(&GUEST.replace(
        "sleep 1000",
        "while [ ! -e later/inside ]; do usleep 10000; done; echo mounted: $(cat later/inside)\nsleep 1000",
    ))?;
    let (directory, sum) = directory(&workshop)?;
    fs::create_dir(directory.join("later"))?;
    let mut vmm = Vmm::start_jailed_with(&format!("share = {directory:?}\nid_count = 65536\n"), &workshop)?;
    let mut config = workshop.config("")?;
    config.devices.push(share(None));
    vmm.boot_in_jail(config, &workshop)?;
    // Its ids are others on the host, so what it owns is only what it made itself.
    finish(&mut vmm, &directory, &sum)?;
    let owner = directory.join("new").metadata()?;
    ensure!(owner.uid() > 0x7000_0000, "{owner:?}");

    let later = directory.join("later");
    let mount = ["mount", "-t", "tmpfs", "later"];
    let status = std::process::Command::new(mount[0]).args(&mount[1..]).arg(&later).status()?;
    ensure!(status.success(), "mounting: {status}");
    let written = fs::write(later.join("inside"), "later\n").context("writing");
    let seen = written.and_then(|()| vmm.expect("mounted: later"));
    // First the mount has to go, whatever came of it.
    let status = std::process::Command::new("umount").arg("--lazy").arg(&later).status()?;
    ensure!(status.success(), "unmounting: {status}");
    seen.map(drop)
}

#[test]
fn what_a_jail_cannot_serve_is_refused() -> Result<()> {
    let workshop = Workshop::new("sleep 1000")?;
    let directory = workshop.path("shared");
    fs::create_dir(&directory)?;
    let file = File::open(&directory)?;
    for (jail, given, says) in [
        ("", None, "without a share"),
        (&*format!("share = {directory:?}\n"), Some(FileSource::Descriptor(0)), "its own share alone"),
    ] {
        let mut vmm = Vmm::start_jailed_with(jail, &workshop)?;
        vmm.boot_in_jail(workshop.config("")?, &workshop)?;
        let error = vmm.client.plug(None, share(given), &[file.as_fd()]).err().context("it was plugged")?;
        ensure!(error.to_string().contains(says), "{error}");
        vmm.client.metrics()?;
    }
    let mut vmm = Vmm::boot(workshop.config("")?)?;
    ensure!(vmm.client.plug(None, share(None), &[]).is_err());
    let not_one = File::open("/etc/passwd")?;
    ensure!(vmm.client.plug(None, share(Some(FileSource::Descriptor(0))), &[not_one.as_fd()]).is_err());
    Ok(())
}
