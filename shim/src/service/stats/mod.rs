//! What a container uses, as one of containerd's two messages: those of either version of control groups.
//!
//! The guest's control groups are of version 2. containerd and its clients understand both messages from any container,
//! but what they export to Prometheus is of the node's own version, and leaves out what comes in the other's message.

mod v1;
mod v2;

use std::sync::LazyLock;

use caisson_protocol::v1::StatsResponse;
use containerd_shim_protos::protobuf::{self, Message, well_known_types::any::Any};

use crate::cgroup;
use crate::pod::PodError;

/// The node's version does not change while it runs.
static IS_UNIFIED: LazyLock<bool> = LazyLock::new(cgroup::is_unified);

/// The message of the node's version, as containerd wants it packed.
///
/// # Errors
/// Never for numbers, of which it is made.
pub(super) fn any(stats: StatsResponse) -> Result<Any, PodError> {
    let (type_url, value) = if *IS_UNIFIED {
        (v2::TYPE, encode(&v2::metrics(stats))?)
    } else {
        (v1::TYPE, encode(&v1::metrics(stats))?)
    };
    Ok(Any { type_url: type_url.into(), value, ..Default::default() })
}

fn encode(message: &impl Message) -> Result<Vec<u8>, PodError> {
    let failed = |error: protobuf::Error| PodError::Invalid(format!("encode statistics: {error}"));
    message.write_to_bytes().map_err(failed)
}
