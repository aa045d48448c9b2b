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

use anyhow::{Context, Result, bail, ensure};
use caisson_e2e::{
    ctr,
    guest_share::Script,
    vmm::{Vmm, Workshop},
};
use caisson_vmm_api::{
    config::{DeviceConfig, FileSource, FsDevice},
    control::metrics::Counter,
    devices::FsConfig,
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

/// A directory to share: a greeting, a link to what only the host has, and 24 MiB that are not all the same.
fn directory(workshop: &Workshop) -> Result<(std::path::PathBuf, String)> {
    let path = workshop.path("shared");
    fs::create_dir(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o777))?;
    fs::write(path.join("greeting"), "hello\n")?;
    symlink("/etc/debian_version", path.join("outside"))?;
    let mut big = File::create(path.join("big"))?;
    let block = caisson_e2e::vsock::pattern(1 << 20);
    for _ in 0..24 {
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

/// What a guest does once something is mounted at `later` on the host, and when it is gone again.
const LATER: &str = "
while [ ! -e later/inside ]; do usleep 10000; done; echo mounted: $(cat later/inside)
[ $(stat -c %d later) != $(stat -c %d .) ] || echo failed: the same device
[ $(stat -c %d later) = $(stat -c %d later/inside) ] || echo failed: another device
grep -q ' /mnt/later ' /proc/mounts || echo failed: no mount of its own
[ $(stat -f -c %b later) = 256 ] || echo failed: it is as large as the share
refuse rmdir later; refuse ln greeting later/hard
echo mine > later/mine; exec 3< later/mine
echo looked around
while [ -e later ]; do usleep 100000; done
[ \"$(cat <&3)\" = mine ] || echo failed: what was open is closed
exec 3<&-
usleep 200000
echo let go
sleep 1000";

/// Descriptors that the process in a jail has for files of this name.
fn held(vmm: &Vmm, name: &str) -> Result<usize> {
    let supervisor = vmm.pid();
    let inside = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
    let names = fs::read_dir(format!("/proc/{}/fd", inside.trim()))?
        .map_while(Result::ok)
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    Ok(names.filter(|path| path.ends_with(name)).count())
}

fn run(command: &str, arguments: &[&str], path: &Path) -> Result<()> {
    let status = std::process::Command::new(command).args(arguments).arg(path).status()?;
    ensure!(status.success(), "{command}: {status}");
    Ok(())
}

#[test]
fn a_jail_serves_its_share_and_what_is_mounted_there_later() -> Result<()> {
    let workshop = Workshop::new(&GUEST.replace("sleep 1000", LATER))?;
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
    run("mount", &["-t", "tmpfs", "-o", "size=1m,mode=777", "later"], &later)?;
    let written = fs::write(later.join("inside"), "later\n").context("writing");
    let seen = written.and_then(|()| vmm.expect("looked around"));
    let held_before = held(&vmm, "inside")?;
    // First the mount has to go, whatever came of it.
    run("umount", &["--lazy"], &later)?;
    seen?;
    ensure!(vmm.transcript.iter().any(|line| line == "mounted: later"), "{}", vmm.tail());
    fs::remove_dir(&later)?;
    vmm.expect("let go")?;
    let trouble: Vec<_> = vmm.transcript.iter().filter(|line| line.contains("failed:")).collect();
    ensure!(trouble.is_empty(), "{trouble:#?}");
    // A guest that finds a directory gone forgets what was in it, and the mount with that.
    ensure!(
        held_before == 1 && held(&vmm, "inside")? == 0,
        "{held_before} before, {} now",
        held(&vmm, "inside")?
    );
    Ok(())
}

/// Reads the file `big` each time that the host says so.
const READER: &str = "
for round in 1 2 3; do
  while [ ! -e $DIR/$round ]; do usleep 20000; done
  echo round $round: $(md5sum < $DIR/big)
done";

/// What the share's device has answered so far, in bytes.
fn answered(vmm: &mut Vmm) -> Result<u64> {
    let metrics = vmm.client.metrics()?;
    let bytes = metrics.slots.values().find_map(|device| device.counter("fs", "reply_bytes"));
    let Some(Counter::Single(bytes)) = bytes else { bail!("no share's metrics: {metrics:?}") };
    Ok(*bytes)
}

#[test]
fn what_nobody_has_changed_is_read_once() -> Result<()> {
    const SIZE: usize = 8 << 20;
    let mut guest = Script { text: READER, ..Script::default() }.boot()?;
    let directory = guest.directory.clone();
    let fill = |byte| fs::write(directory.join("big"), vec![byte; SIZE]);
    let mut read = |round: &str| -> Result<(usize, String)> {
        let before = answered(&mut guest.vmm)?;
        fs::write(directory.join(round), "")?;
        let line = guest.vmm.expect(&format!("round {round}"))?;
        let bytes = usize::try_from(answered(&mut guest.vmm)? - before)?;
        Ok((bytes, line.split(": ").nth(1).unwrap_or_default().to_owned()))
    };
    fill(1)?;
    let (first, sum) = read("1")?;
    ensure!(first >= SIZE, "{first} bytes of the file were enough");
    let (second, same) = read("2")?;
    ensure!(second < SIZE / 8 && same == sum, "{second} bytes were read once more");
    fill(2)?;
    let (third, other) = read("3")?;
    ensure!(third >= SIZE && other != sum, "of what has changed {third} bytes were read, and are {other}");
    Ok(())
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
