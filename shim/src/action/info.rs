//! What this binary is.

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use super::ActionError;

/// The runtime's name, by which containerd finds this binary.
const NAME: &str = "io.containerd.caisson.v2";

/// For people.
pub fn version() -> String {
    format!("containerd-shim-caisson-v2 {}\n", env!("CARGO_PKG_VERSION"))
}

/// For containerd: its `RuntimeInfo`.
///
/// # Errors
/// Never for a message of strings.
pub fn description() -> Result<Vec<u8>, ActionError> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..RuntimeVersion::default() };
    let info =
        RuntimeInfo { name: NAME.into(), version: MessageField::some(version), ..RuntimeInfo::default() };
    Ok(info.write_to_bytes()?)
}
