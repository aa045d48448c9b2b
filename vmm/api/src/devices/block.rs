//! Options of a disk.

use serde::{Deserialize, Serialize};

use super::RateLimits;

/// What does the reading and writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IoEngine {
    /// A worker thread with plain system calls. Works everywhere.
    #[default]
    Sync,
    /// The kernel's io_uring(7), locked down to this disk's files and to reading, writing, syncing and
    /// allocating.
    IoUring,
}

/// When written data is safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheMode {
    /// Once the guest has flushed, as with any disk that has a cache.
    #[default]
    Writeback,
    /// Once the request is complete. The guest is told that there is no cache to flush.
    Writethrough,
    /// Never: a flush does nothing. For scratch disks that do not outlive their pod.
    Unsafe,
}

/// A disk in the machine file. Its files come as descriptors beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlockConfig {
    /// What the guest reads as the disk's serial (`/dev/disk/by-id/virtio-<id>`): at most 20 bytes.
    pub id: String,
    /// The guest cannot write. The descriptors must have been opened read-only.
    pub read_only: bool,
    /// What does the reading and writing.
    pub engine: IoEngine,
    /// When written data is safe.
    pub cache: CacheMode,
    /// Request queues, 1 to 8; 0 means 1. More than one pays only with more than one vCPU.
    pub queues: u16,
    /// Limits on requests and on the bytes that they read or write.
    pub rate_limits: RateLimits,
}

impl BlockConfig {
    /// Request queues that the disk has.
    pub fn queue_count(&self) -> u16 {
        self.queues.max(1)
    }
}
