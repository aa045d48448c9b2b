//! The directory that a guest works in: shared by our VMM, and on a disk of its own under QEMU.
//!
//! QEMU itself has only 9p to share a directory by, which the guest's kernel does not speak, so what stands beside
//! our shared directory is ext4 on a virtio disk: what a guest would use that needs no sharing at all. Reads and
//! writes are direct, so that neither guest's own cache is measured.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// The name by which the guest mounts it.
pub(super) const TAG: &str = "share";
/// The file that is read.
const DATA: &str = "data";
/// What the image has room for beside the data.
const ROOM: u64 = 48 << 20;

/// The same content twice.
#[derive(Clone, Debug)]
pub(super) struct Share {
    pub(super) directory: PathBuf,
    pub(super) image: PathBuf,
}

impl Share {
    /// Makes both afresh below `directory`, with `len` bytes of data.
    pub(super) fn make(directory: &Path, len: u64) -> Result<Self> {
        let share = Self { directory: directory.join("share"), image: directory.join("share.ext4") };
        if share.directory.exists() {
            fs::remove_dir_all(&share.directory).context("clearing the shared directory")?;
        }
        fs::create_dir(&share.directory).context("making the shared directory")?;
        let mut data = File::create(share.directory.join(DATA)).context("making the data")?;
        let block = vec![0x5a; 1 << 20];
        for _ in 0..len >> 20 {
            data.write_all(&block).context("filling the data")?;
        }
        data.sync_all().context("filling the data")?;
        let mut format = Command::new("mke2fs");
        format.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&share.directory).arg(&share.image);
        let status = format.arg(format!("{}k", (len + ROOM) >> 10)).status().context("running mke2fs")?;
        ensure!(status.success(), "mke2fs: {status}");
        // What is still to be written of it is not the guest's.
        File::open(&share.image).and_then(|image| image.sync_all()).context("writing the image")?;
        Ok(share)
    }
}
