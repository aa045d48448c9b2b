//! The contract between the host (shim, CLI) and `caisson-agent`.
//!
//! - [`v1`]: the gRPC services and messages, generated from `proto/`; every verb and status code is described there.
//! - `client`: the host's end: typed clients of all services (feature `client`, on by default).
//! - [`server`]: the agent's end: calls of any method.
//! - [`connect`]: the `CONNECT <port>` handshake of the unix socket behind a vsock device, both sides.
//! - [`stream`]: the handshake of byte streams, both sides.
//! - [`ports`], [`limits`]: constants that both ends keep to.

#[cfg(feature = "client")]
pub mod client;
pub mod connect;
pub mod limits;
pub mod ports;
pub mod server;
pub mod stream;

/// Generated gRPC services and messages of protocol version 1.
#[allow(missing_docs, rustdoc::all, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("caisson.agent.v1");
}

/// The lowest protocol version that this crate speaks.
pub const MIN_PROTOCOL: u32 = 1;
/// The highest protocol version that this crate speaks.
pub const MAX_PROTOCOL: u32 = 1;
/// Directory under which an agent that is PID 1 keeps its state and mounts.
pub const DEFAULT_ROOT: &str = "/run/caisson";

#[cfg(test)]
mod tests {
    /// What the protocol's files say of each verb: its name and the comment above it.
    fn verbs() -> Vec<(String, String)> {
        let files = [
            include_str!("../proto/agent.proto"),
            include_str!("../proto/container.proto"),
            include_str!("../proto/machine.proto"),
        ];
        let mut verbs = Vec::new();
        for file in files {
            let mut comment = String::new();
            for line in file.lines().map(str::trim) {
                if let Some(text) = line.strip_prefix("//") {
                    comment.push_str(text);
                } else if let Some(verb) = line.strip_prefix("rpc ") {
                    let name = verb.split('(').next().unwrap().to_owned();
                    verbs.push((name, std::mem::take(&mut comment)));
                } else {
                    comment.clear();
                }
            }
        }
        verbs
    }

    #[test]
    fn every_verb_says_which_status_codes_it_gives() {
        const CODES: [&str; 11] = [
            "INVALID_ARGUMENT",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "FAILED_PRECONDITION",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "DEADLINE_EXCEEDED",
            "ABORTED",
            "INTERNAL",
        ];
        let verbs = verbs();
        assert!(verbs.len() > 40, "{} verbs", verbs.len());
        for (verb, comment) in verbs {
            let (purpose, codes) =
                comment.split_once(" Codes: ").unwrap_or_else(|| panic!("{verb}: no codes"));
            assert!(!purpose.trim().is_empty(), "{verb}: no purpose");
            let known = CODES.iter().any(|code| codes.contains(code));
            assert!(known || codes.contains("none of its own") || codes.contains("as "), "{verb}: {codes}");
            let shouted =
                codes.split(|c: char| !(c.is_ascii_uppercase() || c == '_')).filter(|word| word.len() > 4);
            for word in shouted {
                assert!(CODES.contains(&word) || word.starts_with("SIG"), "{verb}: there is no code {word}");
            }
        }
    }
}
