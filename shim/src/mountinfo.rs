//! The mounts in sight of a thread, proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The table: of this thread's mount namespace.
pub const PATH: &str = "/proc/thread-self/mountinfo";

/// A line of it, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's id.
    pub id: u64,
    /// The file system's device, `major:minor`.
    pub device: Vec<u8>,
    /// The directory in the file system that is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// The file system's own options, with commas between them.
    pub options: String,
}

/// Reads the table. Names in it need not be UTF-8.
///
/// # Errors
/// The kernel's.
pub fn read() -> io::Result<Vec<u8>> {
    fs::read(PATH)
}

/// The mounts of a table, in its order. Lines of another form are left out.
pub fn parse(table: &[u8]) -> impl Iterator<Item = Mount> {
    table.split(|byte| *byte == b'\n').filter_map(Mount::parse)
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Mount> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let _parent = fields.next()?;
        let device = fields.next()?.to_owned();
        let (root, point) = (unescape(fields.next()?), unescape(fields.next()?));
        // The mount's own options, and optional fields up to a hyphen.
        let mut file_system = fields.skip_while(|field| *field != b"-").skip(1);
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        let kind = text(file_system.next()?);
        let _source = file_system.next()?;
        Some(Mount { id, device, root, point, kind, options: text(file_system.next()?) })
    }
}

/// Undoes the kernel's octal escapes of white space and backslashes.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = code.filter(|_| *first == b'\\').and_then(|code| u8::from_str_radix(code, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = tail.get(if escaped.is_some() { 3 } else { 0 }..).unwrap_or_default();
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn escapes_are_undone_and_what_is_none_is_kept() {
        for (field, path) in [("a\\040b\\134", "a b\\"), ("a\\04", "a\\04"), ("\\9990", "\\9990"), ("", "")] {
            assert_eq!(unescape(field.as_bytes()), Path::new(path), "{field}");
        }
    }

    #[test]
    fn what_is_no_line_is_left_out() {
        let mounts: Vec<_> = parse(b"nonsense\n1 2\n\n7 1 0:50 /a\\040b /c rw - tmpfs none rw\n").collect();
        let only = Mount {
            id: 7,
            device: b"0:50".to_vec(),
            root: "/a b".into(),
            point: "/c".into(),
            kind: "tmpfs".into(),
            options: "rw".into(),
        };
        assert_eq!(mounts, [only]);
        assert!(parse(&read().unwrap()).any(|mount| mount.point == Path::new("/")));
    }
}
