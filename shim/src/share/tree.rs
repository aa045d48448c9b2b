//! The files of a volume that a kubelet writes, in the order in which it writes them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use caisson_protocol::v1::{TreeEntry, tree_entry::Kind};

use super::kubelet::DATA;
use super::{ShareError, at};

/// The most that is copied, in bytes; a secret or config map has 1 MiB at most, a projected volume may have several.
const MAX_BYTES: u64 = 3 << 20;
/// The most entries that are copied.
const MAX_ENTRIES: usize = 4096;
/// Directories in each other.
const MAX_DEPTH: usize = 16;

/// What the volume at `root` holds: the directory that its link `..data` names, then this link, then those that go through
/// it. Whoever follows that order swaps the whole at once.
///
/// # Errors
/// When it can't be read, which may be so while the kubelet writes; and when it is too large, or has names that are not
/// UTF-8.
pub fn read(root: &Path) -> Result<Vec<TreeEntry>, ShareError> {
    let mut reader = Reader { root, entries: Vec::new(), bytes: 0 };
    let current = fs::read_link(root.join(DATA)).map_err(at("read the link", root))?;
    reader.add(&current, 0)?;
    reader.add(Path::new(DATA), 0)?;
    for name in reader.names(Path::new(""))? {
        if !name.starts_with("..") {
            reader.add(Path::new(&name), 0)?;
        }
    }
    Ok(reader.entries)
}

struct Reader<'a> {
    root: &'a Path,
    entries: Vec<TreeEntry>,
    bytes: u64,
}

impl Reader<'_> {
    fn add(&mut self, path: &Path, depth: usize) -> Result<(), ShareError> {
        let full = self.root.join(path);
        let refused = |why: &str| at("copy", &full)(io::Error::new(io::ErrorKind::InvalidData, why));
        let text = path.to_str().ok_or_else(|| refused("its name is not UTF-8"))?;
        let found = fs::symlink_metadata(&full).map_err(at("look at", &full))?;
        let kind = if found.is_symlink() {
            let target = fs::read_link(&full).map_err(at("read the link", &full))?;
            Kind::Symlink(target.to_str().ok_or_else(|| refused("its target is not UTF-8"))?.to_owned())
        } else if found.is_dir() {
            Kind::Directory(true)
        } else if found.is_file() {
            self.bytes = self.bytes.saturating_add(found.len());
            if self.bytes > MAX_BYTES {
                return Err(refused("the volume is too large"));
            }
            Kind::File(fs::read(&full).map_err(at("read", &full))?)
        } else {
            return Err(refused("it is neither a file nor a directory nor a link"));
        };
        let is_directory = matches!(kind, Kind::Directory(_));
        let mode = found.mode() & 0o7777;
        let entry =
            TreeEntry { path: text.to_owned(), kind: Some(kind), mode, uid: found.uid(), gid: found.gid() };
        self.entries.push(entry);
        if self.entries.len() > MAX_ENTRIES || depth > MAX_DEPTH {
            return Err(refused("the volume has too many files"));
        }
        if is_directory {
            for name in self.names(path)? {
                self.add(&path.join(name), depth + 1)?;
            }
        }
        Ok(())
    }

    fn names(&self, directory: &Path) -> Result<Vec<String>, ShareError> {
        let full = self.root.join(directory);
        let list = || {
            let mut names = Vec::new();
            for entry in fs::read_dir(&full)? {
                let name = entry?.file_name().into_string();
                names.push(
                    name.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a name is not UTF-8"))?,
                );
            }
            names.sort_unstable();
            Ok(names)
        };
        list().map_err(at("list", &full))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn volume() -> tempfile::TempDir {
        let volume = tempfile::tempdir().unwrap();
        let at = |name: &str| volume.path().join(name);
        fs::create_dir_all(at("..2026/deep")).unwrap();
        fs::create_dir(at("..old")).unwrap();
        fs::write(at("..2026/key"), "value").unwrap();
        fs::write(at("..2026/deep/er"), "x").unwrap();
        symlink("..2026", at("..data")).unwrap();
        symlink("..data/key", at("key")).unwrap();
        symlink("..data/deep", at("deep")).unwrap();
        volume
    }

    #[test]
    fn the_link_is_swapped_when_all_is_there() {
        let volume = volume();
        let entries = read(volume.path()).unwrap();
        let paths: Vec<_> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["..2026", "..2026/deep", "..2026/deep/er", "..2026/key", "..data", "deep", "key"]);
        assert_eq!(entries[3].kind, Some(Kind::File(b"value".to_vec())));
        assert_eq!(entries[6].kind, Some(Kind::Symlink("..data/key".into())));
    }

    #[test]
    fn what_is_too_large_or_strange_is_not_copied() {
        let large = volume();
        fs::File::create(large.path().join("..2026/large")).unwrap().set_len(MAX_BYTES).unwrap();
        assert!(read(large.path()).is_err());
        let strange = volume();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            strange.path().join("..2026/fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(read(strange.path()).is_err());
        assert!(read(&strange.path().join("..2026")).is_err(), "no link");
    }
}
