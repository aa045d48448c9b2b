use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::metrics::Counter;

/// A shared directory's counters.
#[derive(Debug, Default, Serialize)]
pub struct FsMetrics {
    /// Requests that were taken up.
    pub requests: Counter,
    /// The same by what they ask for, as far as that is known; those that were never made are left out.
    pub operations: Operations,
    /// Bytes of all requests.
    pub request_bytes: Counter,
    /// Bytes of all replies.
    pub reply_bytes: Counter,
    /// Requests that were refused unread: malformed, too large, or of a kind that is not served.
    pub refused: Counter,
}

/// FUSE's operations, each where its opcode is (`linux/fuse.h`). No name: there is none.
const NAMES: [&str; 53] = [
    "",
    "lookup",
    "forget",
    "getattr",
    "setattr",
    "readlink",
    "symlink",
    "",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "rename",
    "link",
    "open",
    "read",
    "write",
    "statfs",
    "release",
    "",
    "fsync",
    "setxattr",
    "getxattr",
    "listxattr",
    "removexattr",
    "flush",
    "init",
    "opendir",
    "readdir",
    "releasedir",
    "fsyncdir",
    "getlk",
    "setlk",
    "setlkw",
    "access",
    "create",
    "interrupt",
    "bmap",
    "destroy",
    "ioctl",
    "poll",
    "notify_reply",
    "batch_forget",
    "fallocate",
    "readdirplus",
    "rename2",
    "lseek",
    "copy_file_range",
    "setupmapping",
    "removemapping",
    "syncfs",
    "tmpfile",
    "statx",
];

/// A counter for each of FUSE's operations.
#[derive(Debug)]
pub struct Operations([Counter; NAMES.len()]);

impl Default for Operations {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl Operations {
    /// Counts a request with this opcode, which may be anything.
    pub(super) fn count(&self, opcode: u32) {
        if let Some(counter) = usize::try_from(opcode).ok().and_then(|opcode| self.0.get(opcode)) {
            counter.inc();
        }
    }

    /// Each operation that there were requests for, and how many.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = NAMES.iter().zip(&self.0).map(|(name, counter)| (*name, counter.get()));
        counts.filter(|(name, count)| !name.is_empty() && *count > 0)
    }
}

impl Serialize for Operations {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        self.iter().try_for_each(|(name, count)| map.serialize_entry(name, &count))?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use fuse_backend_rs::abi::fuse_abi::Opcode;

    use super::*;

    #[test]
    fn each_operation_is_counted_under_its_name() {
        let operations = Operations::default();
        for opcode in [1, 1, Opcode::Lseek as u32, 52, 0, 7, 53, u32::MAX] {
            operations.count(opcode);
        }
        let text = serde_json::to_string(&operations).unwrap();
        assert_eq!(text, r#"{"lookup":2,"lseek":1,"statx":1}"#);
    }

    #[test]
    fn names_stand_where_the_opcodes_are() {
        let named = |opcode: Opcode| NAMES[opcode as usize];
        for opcode in
            [Opcode::Fsync, Opcode::Init, Opcode::Create, Opcode::Readdirplus, Opcode::CopyFileRange]
        {
            let name = format!("{opcode:?}").to_lowercase();
            assert_eq!(named(opcode).replace('_', ""), name);
        }
    }
}
