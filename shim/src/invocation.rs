//! How containerd calls the shim's binary, and how `start` answers.
//!
//! containerd passes Go-style flags (`-namespace NAME`, one dash) with the action behind them, and the rest in the
//! environment. It reads the answer of `start` from stdout *and* stderr together, so nothing else may be written.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::id::Id;

/// The command line that containerd makes.
#[derive(Clone, Debug, Parser, PartialEq, Eq)]
#[command(name = "containerd-shim-caisson-v2", disable_version_flag = true)]
pub struct Invocation {
    /// The containerd namespace of the container.
    #[arg(long)]
    pub namespace: Option<Id>,
    /// The container's identifier.
    #[arg(long)]
    pub id: Option<Id>,
    /// containerd's gRPC socket.
    #[arg(long, default_value = "")]
    pub address: String,
    /// The binary that publishes events to containerds without a ttrpc socket, of which there is none any more: accepted,
    /// and not used.
    #[arg(long, default_value = "")]
    pub publish_binary: String,
    /// The bundle. Without it, the working directory is the bundle.
    #[arg(long)]
    pub bundle: Option<PathBuf>,
    /// Where a shim that is up listens.
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// A configuration file, of the runtime handler.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Log in detail.
    #[arg(long)]
    pub debug: bool,
    /// Print the runtime's description as protobuf.
    #[arg(long)]
    pub info: bool,
    /// Print the version.
    #[arg(short = 'v')]
    pub version: bool,
    /// What to do. None: serve.
    pub action: Option<Action>,
}

/// What containerd wants the binary to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Start a shim, or find the pod's, and print its address.
    Start,
    /// Remove what a container left, whether its shim lives or not.
    Delete,
    /// What `delete` does, in a process of its own.
    #[value(hide = true)]
    Undo,
    /// Make the template that standard input describes, or without a description the one of a pod that asks for nothing.
    Template,
}

impl Invocation {
    /// Reads a command line, with the program's name in front.
    ///
    /// # Errors
    /// For a flag or an action that containerd does not pass, and for bad identifiers.
    pub fn parse_from_go(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, clap::Error> {
        Invocation::try_parse_from(double_dashes(arguments))
    }
}

/// Rewrites Go's `-flag` to the `--flag` of everyone else; single letters stay as they are. A flag's value stays too,
/// even when it begins with a dash.
fn double_dashes(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    const BOOLEAN: [&str; 4] = ["debug", "info", "v", "h"];
    let mut is_value = true; // The program's own name is no flag.
    let mut rewritten = Vec::new();
    for argument in arguments {
        let flag = argument.to_str().and_then(|text| text.strip_prefix('-')).filter(|_| !is_value);
        let Some(flag) = flag else {
            is_value = false;
            rewritten.push(argument);
            continue;
        };
        let name = flag.strip_prefix('-').unwrap_or(flag);
        is_value = !name.contains('=') && !BOOLEAN.contains(&name);
        rewritten.push(if name.len() > 1 { format!("--{name}").into() } else { argument });
    }
    rewritten
}

/// How containerd wants the answer of `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyFormat {
    /// The address alone: containerd before task API v3.
    Address,
    /// A JSON object with version, address and protocol.
    Json,
}

/// What the address of a unix socket begins with, as a URI.
pub const UNIX: &str = "unix://";

/// The newest task API that the shim serves.
pub const TASK_API_VERSION: u32 = 3;

#[derive(Serialize)]
struct JsonReply<'a> {
    version: u32,
    address: &'a str,
    protocol: &'static str,
}

impl ReplyFormat {
    /// From `MAX_SHIM_VERSION` of the environment: unset or unreadable means a containerd that predates it.
    pub fn from_max_version(variable: Option<&str>) -> ReplyFormat {
        match variable.and_then(|text| text.parse::<u32>().ok()) {
            Some(version) if version >= TASK_API_VERSION => ReplyFormat::Json,
            _ => ReplyFormat::Address,
        }
    }

    /// What `start` prints, for a shim that listens at `address` (`unix://PATH`).
    ///
    /// # Errors
    /// Never for text that JSON can hold, which all of Rust's is.
    pub fn reply(self, address: &str) -> serde_json::Result<String> {
        match self {
            ReplyFormat::Address => Ok(address.to_owned()),
            ReplyFormat::Json => {
                serde_json::to_string(&JsonReply { version: TASK_API_VERSION, address, protocol: "ttrpc" })
            }
        }
    }
}

/// Where the shim of a pod listens: below `directory`, one name for each containerd, namespace and pod.
///
/// Hashed, because a unix socket's path is limited to 107 bytes (unix(7)) while identifiers may be long.
pub fn socket_path(directory: &Path, containerd: &str, namespace: &Id, pod: &Id) -> PathBuf {
    // Some calls have the address as a URI, and some as a path.
    let containerd = containerd.strip_prefix(UNIX).unwrap_or(containerd);
    let mut hash = Sha256::new();
    // containerd's address may hold any byte but NUL, so NUL keeps the parts apart.
    for part in [containerd, namespace.as_str(), pod.as_str()] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    directory.join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> Result<Invocation, clap::Error> {
        Invocation::parse_from_go(line.iter().map(OsString::from))
    }

    #[test]
    fn reads_what_containerd_passes() {
        let line = [
            "/usr/bin/containerd-shim-caisson-v2",
            "-namespace",
            "k8s.io",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "c1",
            "-debug",
            "start",
        ];
        let invocation = parse(&line).unwrap();
        assert_eq!(invocation.namespace.unwrap().as_str(), "k8s.io");
        assert_eq!(invocation.id.unwrap().as_str(), "c1");
        assert_eq!(invocation.address, "/run/containerd/containerd.sock");
        assert_eq!(invocation.publish_binary, "/usr/bin/containerd");
        assert!(invocation.debug);
        assert_eq!(invocation.action, Some(Action::Start));
    }

    #[test]
    fn reads_empty_and_equals_values() {
        let invocation =
            parse(&["shim", "-publish-binary", "", "--id=c2", "-bundle=/b", "-namespace", "n", "delete"])
                .unwrap();
        assert_eq!(invocation.publish_binary, "");
        assert_eq!(invocation.id.unwrap().as_str(), "c2");
        assert_eq!(invocation.bundle.unwrap(), Path::new("/b"));
        assert_eq!(invocation.action, Some(Action::Delete));
    }

    #[test]
    fn short_flags_stay() {
        assert!(parse(&["shim", "-v"]).unwrap().version);
        assert!(parse(&["shim", "-info"]).unwrap().info);
    }

    #[test]
    fn refuses_unknown_flags_actions_and_paths_as_identifiers() {
        assert!(parse(&["shim", "-colour", "start"]).is_err());
        assert!(parse(&["shim", "explode"]).is_err());
        assert!(parse(&["shim", "-id", "../../etc", "delete"]).is_err());
        assert!(parse(&["shim", "-id"]).is_err());
    }

    #[test]
    fn a_value_with_a_dash_is_not_rewritten() {
        let rewritten = double_dashes(["shim", "-address", "-odd", "-id", "c"].map(OsString::from));
        assert_eq!(rewritten, ["shim", "--address", "-odd", "--id", "c"].map(OsString::from));
    }

    #[test]
    fn answers_in_the_form_that_is_understood() {
        for old in [None, Some("2"), Some(""), Some("x")] {
            let format = ReplyFormat::from_max_version(old);
            assert_eq!(format.reply("unix:///s").unwrap(), "unix:///s");
        }
        let reply = ReplyFormat::from_max_version(Some("3")).reply("unix:///s").unwrap();
        assert_eq!(reply, r#"{"version":3,"address":"unix:///s","protocol":"ttrpc"}"#);
    }

    #[test]
    fn sockets_are_apart_and_short() {
        let id = |text: &str| text.parse::<Id>().unwrap();
        let long = id(&"p".repeat(76));
        let path = socket_path(Path::new("/run/containerd/s"), "/run/c.sock", &id("n"), &long);
        assert!(path.as_os_str().len() <= 107);
        let pair = |namespace, pod| socket_path(Path::new("/s"), "/c", &id(namespace), &id(pod));
        assert_ne!(pair("ab", "c"), pair("a", "bc"));
        assert_eq!(pair("a", "b"), pair("a", "b"));
        let of = |address| socket_path(Path::new("/s"), address, &id("n"), &id("p"));
        assert_eq!(of("unix:///run/c.sock"), of("/run/c.sock"));
    }
}
