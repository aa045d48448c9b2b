//! What the agent and a helper say to each other over a socket pair: JSON, each message behind its length.
//!
//! The agent sends a [`Setup`], then an [`Order`] for every [`Answer`] that asks for one. The helper's messages have
//! a byte before them which carries a descriptor, or none. End of file after [`Order::Start`] means that the program
//! runs: the helper's end is close-on-exec.

use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::container::error::Failure;
use crate::container::seccomp::Filter;
use crate::oci;

/// The helper's end of the socket pair.
pub(crate) const SOCKET: RawFd = 3;

/// Upper bound of a message: the biggest specification that the protocol lets through is smaller.
const MAX_MESSAGE: u32 = 64 << 20;

/// What process to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Setup {
    Container(Box<ContainerSetup>),
    Exec(Box<ExecSetup>),
}

/// A container and its first process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ContainerSetup {
    pub(crate) id: String,
    pub(crate) cgroup: PathBuf,
    pub(crate) spec: oci::Spec,
    pub(crate) filter: Option<Filter>,
}

/// A process in a running container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecSetup {
    /// The container's first process.
    pub(crate) init: u32,
    pub(crate) user_namespace: bool,
    pub(crate) time_namespace: bool,
    pub(crate) personality: Option<oci::linux::Personality>,
    pub(crate) process: oci::Process,
    pub(crate) filter: Option<Filter>,
}

/// The agent's word to a helper.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// What was asked for is done.
    Continue,
    /// Execute the program.
    Start,
}

/// A helper's word to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// New user or time namespaces are there and want their id maps and clock offsets.
    Unshared,
    /// The process was forked; its pid in the agent's PID namespace.
    Forked(u32),
    /// The process waits for [`Order::Start`]. Carries the terminal, if there is one.
    Ready,
    /// It ended here.
    Failed(Failure),
}

/// Writes a message.
pub(crate) fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    stream.write_all(&encode(message)?)
}

/// A message with its length.
pub(crate) fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len().saturating_sub(4)).unwrap_or(u32::MAX);
    if length > MAX_MESSAGE {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let (head, _) = bytes.split_at_mut(4);
    head.copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Reads a message.
pub(crate) fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MAX_MESSAGE {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let mut bytes = Vec::new();
    stream.take(u64::from(length)).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let bytes = encode(&Answer::Forked(7)).unwrap();
        let answer: Answer = receive(&mut bytes.as_slice()).unwrap();
        assert!(matches!(answer, Answer::Forked(7)));
    }

    #[test]
    fn cut_and_oversized_messages_are_errors() {
        let bytes = encode(&Order::Start).unwrap();
        assert!(receive::<Order>(&mut &bytes[..bytes.len() - 1]).is_err());
        assert!(receive::<Order>(&mut [0xff; 16].as_slice()).is_err());
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = receive::<Answer>(&mut bytes.as_slice());
        }
    }
}
