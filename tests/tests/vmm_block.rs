//! Disks: what a guest writes is what the host finds, with both I/O engines.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use caisson_e2e::vmm::{Vmm, Workshop};

/// Fills an ext4 file system from four writers at once, compares, and leaves one file; then trims.
const EXT4_GUEST: &str = "
mkdir /mnt
mount -t ext4 /dev/vda /mnt || echo failed to mount
for i in 1 2 3 4; do
  (dd if=/dev/urandom of=/mnt/a$i bs=64k count=96; cp /mnt/a$i /mnt/b$i; sync) 2>/dev/null &
done
wait
echo 3 > /proc/sys/vm/drop_caches
for i in 1 2 3 4; do cmp /mnt/a$i /mnt/b$i || echo files $i differ; done
echo kept: $(sha256sum < /mnt/a1)
umount /mnt || echo failed to unmount
echo written
mount -t ext4 /dev/vda /mnt
rm /mnt/a[234] /mnt/b*
sync
fstrim /mnt || echo failed to trim
umount /mnt
echo trimmed";

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

fn ext4(engine: &str) -> Result<()> {
    let workshop = Workshop::new(EXT4_GUEST)?;
    let disk = workshop.disk("disk", "", 256 << 20)?;
    run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=1"]).arg(&disk))?;
    let devices = format!("[[devices]]\nblock.files = [{disk:?}]\nblock.options.engine = '{engine}'\n");
    let mut vmm = Vmm::boot(workshop.config(&devices)?)?;
    let kept = vmm.expect("kept:")?;
    vmm.expect("written")?;
    vmm.expect("trimmed")?;
    let complaints: Vec<_> = vmm
        .transcript
        .iter()
        .filter(|line| line.starts_with("failed to ") || line.ends_with(" differ"))
        .collect();
    ensure!(complaints.is_empty(), "{complaints:?}");
    vmm.wait()?;

    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&disk))?;
    let copy = workshop.path("copy");
    let dump = format!("dump /a1 {}", copy.display());
    run(Command::new("debugfs").args(["-R", &dump]).arg(&disk))?;
    let sum = run(Command::new("sha256sum").arg(&copy))?;
    let sum = sum.split_whitespace().next().context("no checksum")?;
    ensure!(kept.contains(sum), "the guest wrote {kept}, the host reads {sum}");
    // One file of 6 MiB is left of 48 MiB, and the journal.
    let allocated = allocated(&disk)?;
    ensure!(allocated < 32 << 20, "{allocated} bytes are allocated after the trim");
    Ok(())
}

#[test]
fn ext4_is_whole_after_heavy_writing_by_a_worker_thread() -> Result<()> {
    ext4("sync")
}

#[test]
fn ext4_is_whole_after_heavy_writing_by_io_uring() -> Result<()> {
    ext4("io_uring")
}

#[test]
fn two_erofs_layers_are_one_read_only_disk() -> Result<()> {
    let layers = tempfile::tempdir()?;
    let mut images = Vec::new();
    for (name, text) in [("lower", "from below"), ("upper", "from above")] {
        let tree = layers.path().join(name);
        fs::create_dir(&tree)?;
        fs::write(tree.join("says"), text)?;
        let image = layers.path().join(format!("{name}.erofs"));
        run(Command::new("mkfs.erofs").arg(&image).arg(&tree))?;
        images.push(image);
    }
    // A first file that is not a whole number of sectors is padded to one.
    let lower = fs::metadata(&images[0])?.len();
    fs::OpenOptions::new().append(true).open(&images[0]).and_then(|mut file| {
        use std::io::Write;
        file.write_all(b"tail")
    })?;
    let offset = (lower + 4).next_multiple_of(512);
    let workshop = Workshop::new(&format!(
        "mkdir /lower /upper
        mount -t erofs -o ro /dev/vda /lower && echo lower: $(cat /lower/says)
        mknod /dev/loop7 b 7 7
        losetup -r -o {offset} /dev/loop7 /dev/vda && mount -t erofs -o ro /dev/loop7 /upper
        echo upper: $(cat /upper/says)
        dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null && echo written || echo refused
        echo ro=$(cat /sys/block/vda/ro)"
    ))?;
    let devices = format!("[[devices]]\nblock.files = {images:?}\nblock.options.read_only = true\n");
    let mut vmm = Vmm::boot(workshop.config(&devices)?)?;
    vmm.expect("lower: from below")?;
    vmm.expect("upper: from above")?;
    vmm.expect("refused")?;
    vmm.expect("ro=1")?;
    Ok(())
}
