//! Layers: the tar files that an image is stacked of.

use std::{
    fs::{self, File},
    io::{BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{Context, Result, bail};
use tar::{Builder, EntryType, Header};

use super::EPOCH;

/// The users that a container's own tools expect to find.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\n\
                      nobody:x:65534:65534:nobody:/:/bin/false\ntester:x:1000:1000:tester:/home/tester:/bin/sh\n";
const GROUP: &str =
    "root:x:0:\ndaemon:x:1:\ntty:x:5:\nnogroup:x:65534:\ntester:x:1000:\nextra:x:2000:tester\n";

/// Writes a layer of a static busybox, links for these applets, and the few files that a shell wants.
///
/// # Errors
/// When the file can't be written.
pub(super) fn busybox(binary: &[u8], applets: &[String], output: &Path) -> Result<()> {
    let mut layer =
        Builder::new(File::create(output).with_context(|| format!("creating {}", output.display()))?);
    for (directory, mode) in [
        ("bin/", 0o755),
        ("dev/", 0o755),
        ("etc/", 0o755),
        ("home/", 0o755),
        ("proc/", 0o755),
        ("root/", 0o700),
        ("sys/", 0o755),
        ("tmp/", 0o1777),
        ("var/", 0o755),
    ] {
        append(&mut layer, directory, EntryType::Directory, mode, &[])?;
    }
    append(&mut layer, "bin/busybox", EntryType::Regular, 0o755, binary)?;
    append(&mut layer, "etc/passwd", EntryType::Regular, 0o644, PASSWD.as_bytes())?;
    append(&mut layer, "etc/group", EntryType::Regular, 0o644, GROUP.as_bytes())?;
    for applet in applets {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    layer.into_inner()?;
    Ok(())
}

/// Reads one regular file out of a tar file.
///
/// # Errors
/// When it is not there.
pub(super) fn read_file(archive: &Path, path: &Path) -> Result<Vec<u8>> {
    let file = File::open(archive).with_context(|| format!("opening {}", archive.display()))?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, file));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let found = entry.path()?.strip_prefix(".").is_ok_and(|p| p == path) || entry.path()? == path;
        if found && entry.header().entry_type() == EntryType::Regular {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            return Ok(content);
        }
    }
    bail!("there is no file {}", path.display())
}

/// Makes a file executable by its owner.
///
/// # Errors
/// As chmod(2).
pub(super) fn make_executable(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).context("making a file executable")
}

fn append(layer: &mut Builder<File>, path: &str, kind: EntryType, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = header(kind, mode, content.len().try_into()?);
    layer.append_data(&mut header, path, content).with_context(|| format!("adding {path}"))
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(EPOCH);
    header.set_size(size);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("layer.tar");
        busybox(b"\x7fELF", &["sh".into()], &path)?;
        assert_eq!(read_file(&path, Path::new("bin/busybox"))?, b"\x7fELF");
        assert!(read_file(&path, Path::new("bin/sh")).is_err(), "a link is no regular file");
        Ok(())
    }

    #[test]
    fn same_inputs_same_bytes() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let (a, b) = (directory.path().join("a"), directory.path().join("b"));
        busybox(b"x", &["sh".into()], &a)?;
        busybox(b"x", &["sh".into()], &b)?;
        assert_eq!(fs::read(a)?, fs::read(b)?);
        Ok(())
    }
}
