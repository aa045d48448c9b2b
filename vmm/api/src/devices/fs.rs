//! Options of a shared directory.

use std::time::Duration;

use serde::{Deserialize, Serialize};

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
    #[must_use]
    pub fn timeout(self) -> Duration {
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
    #[must_use]
    pub fn descriptor_limit(&self, possible: usize) -> usize {
        match usize::try_from(self.max_descriptors) {
            Ok(0) | Err(_) => possible,
            Ok(limit) => limit.min(possible),
        }
    }
}
