use caisson_vmm_api::devices::FsConfig;

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

/// The configuration space (VIRTIO 1.3, section 5.11.4): the tag, padded with zeros, and the request queues.
pub(super) fn space(config: &FsConfig) -> [u8; TAG_BYTES + 4] {
    let mut space = [0; TAG_BYTES + 4];
    let (tag, queues) = space.split_at_mut(TAG_BYTES);
    tag.iter_mut().zip(config.tag.bytes()).for_each(|(to, from)| *to = from);
    queues.copy_from_slice(&u32::from(config.queue_count()).to_le_bytes());
    space
}
