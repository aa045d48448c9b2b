//! Initramfs archives (`newc` cpio, Documentation/driver-api/early-userspace/buffer-format.rst), written in process
//! so that the same inputs give the same bytes on every machine.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::host::Host;

/// File types of `st_mode`.
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// Builds the agent's initramfs from a static agent, and returns its path.
///
/// # Errors
/// When the agent can't be read or the archive can't be written.
pub(crate) fn build(host: &Host, agent: &Path) -> Result<PathBuf> {
    let output = host.products("xtask").join("caisson-initramfs.cpio");
    let program = fs::read(agent).with_context(|| format!("reading the agent {}", agent.display()))?;
    let mut archive = Archive::new(Vec::new());
    for directory in ["dev", "proc", "sys", "run"] {
        archive.directory(directory)?;
    }
    // The kernel opens it for PID 1 before devtmpfs is mounted.
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, &program)?;
    let bytes = archive.finish()?;
    fs::create_dir_all(host.products("xtask")).context("creating the directory of the initramfs")?;
    let part = output.with_extension("part");
    fs::write(&part, bytes).with_context(|| format!("writing {}", part.display()))?;
    fs::rename(&part, &output).with_context(|| format!("writing {}", output.display()))?;
    Ok(output)
}

/// A `newc` archive that is being written: owned by root, without times, inodes counted from 1.
pub(crate) struct Archive<W> {
    output: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub(crate) fn new(output: W) -> Self {
        Self { output, inode: 0 }
    }

    /// Adds a directory; its parents come first.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, S_IFDIR | 0o755, (0, 0), &[])
    }

    /// Adds a regular file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | mode, (0, 0), contents)
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device that only root may use.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, S_IFCHR | 0o600, (major, minor), &[])
    }

    /// Writes the trailer and returns the output.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.output)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
        contents: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(contents.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, format!("{path} is larger than 4 GiB"))
        })?;
        let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        self.inode += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.output.write_all(header.as_bytes())?;
        self.output.write_all(path.as_bytes())?;
        self.output.write_all(&[0])?;
        self.pad(header.len() + path.len() + 1)?;
        self.output.write_all(contents)?;
        self.pad(contents.len())
    }

    /// Headers with their name, and contents, are padded to 4 bytes.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.output.write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").unwrap();
        archive.file("bin/odd", 0o755, b"12345").unwrap();
        archive.symlink("init", "bin/odd").unwrap();
        archive.character_device("console", 5, 1).unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn cpio_reads_what_we_write() {
        let mut cpio = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&sample()).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" bin"), "{listing}");
        assert!(lines[1].starts_with("-rwxr-xr-x") && lines[1].contains(" 5 "), "{listing}");
        assert!(lines[2].starts_with('l') && lines[2].ends_with("init -> bin/odd"), "{listing}");
        assert!(lines[3].starts_with("crw-------") && lines[3].contains("5,   1"), "{listing}");
        assert_eq!(lines.len(), 4, "{listing}");
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        assert_eq!(sample(), sample());
        assert_eq!(sample().len() % 4, 0);
    }
}
