use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes of the tag in the configuration space.
pub const TAG_BYTES: usize = 36;
/// The most request queues that a device may have, beside the one for urgent requests.
pub const MAX_QUEUES: u16 = 8;
/// Entries of each queue: a request of 1 MiB in pages, and its headers, fits without indirect descriptors.
pub const QUEUE_SIZE: u16 = 512;
/// Descriptors of the process that are kept from shared directories, for everything else that it has open: the
/// connections of a socket device alone can be 1,024, and each queue of each slot has one.
const RESERVED_DESCRIPTORS: usize = 2048;

/// How many descriptors shared directories may take of a process that may have `limit` of them: all but those that
/// are kept for other things, or half of what there is when that is little.
pub(super) fn spare_descriptors(limit: usize) -> usize {
    limit - RESERVED_DESCRIPTORS.min(limit / 2)
}

/// For how long the guest believes what it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// Not at all: every look is a request, and file contents are not cached. Files can then not be mapped shared.
    Never,
    /// Names and attributes for a second; contents until the file's size or time of change is another.
    #[default]
    Auto,
    /// For a day. For directories that nobody else changes.
    Always,
}

impl CachePolicy {
    /// How long names and attributes stay valid.
    pub(super) fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// A shared directory in the machine file. The directory comes as a descriptor beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FsConfig {
    /// What the guest mounts it by: 1 to 36 bytes.
    pub tag: String,
    /// Request queues, 1 to 8; 0 means 1. More than one pays only with more than one vCPU and worker.
    pub queues: u16,
    /// For how long the guest believes what it was told.
    pub cache: CachePolicy,
    /// Whatever would change something is refused with EROFS.
    pub read_only: bool,
    /// The most descriptors (files that are open or looked up) that the guest may have the device hold, after which
    /// it gets ENFILE. 0, and anything above it, means what the process may have open (RLIMIT_NOFILE) less what it
    /// needs itself. A guest holds whatever is in its dentry cache, so this is better thousands than hundreds; with
    /// several shared directories their sum should be below the limit of the process.
    pub max_descriptors: u32,
}

impl FsConfig {
    /// Request queues that the device has.
    pub fn queue_count(&self) -> u16 {
        self.queues.max(1)
    }

    /// The limit in force where `possible` descriptors are to be had.
    pub(super) fn descriptor_limit(&self, possible: usize) -> usize {
        match usize::try_from(self.max_descriptors) {
            Ok(0) | Err(_) => possible,
            Ok(limit) => limit.min(possible),
        }
    }

    /// The configuration space (VIRTIO 1.3, section 5.11.4): the tag, padded with zeros, and the request queues.
    pub(super) fn space(&self) -> [u8; TAG_BYTES + 4] {
        let mut space = [0; TAG_BYTES + 4];
        let (tag, queues) = space.split_at_mut(TAG_BYTES);
        tag.iter_mut().zip(self.tag.bytes()).for_each(|(to, from)| *to = from);
        queues.copy_from_slice(&u32::from(self.queue_count()).to_le_bytes());
        space
    }
}
