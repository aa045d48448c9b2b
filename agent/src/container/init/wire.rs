//! What the agent and a helper say to each other over a socket pair: Protocol Buffers, each message behind its length.
//!
//! The agent sends a [`Setup`], then an [`Order`] for every [`Answer`] that asks for one. The helper's messages have
//! a byte before them which carries a descriptor, or none. End of file after [`Order::START`] means that the program
//! runs: the helper's end is close-on-exec.

use std::io::{self, Read, Write};
use std::os::fd::RawFd;

use prost::Message;

use crate::container::error::Failure;
use crate::container::seccomp::Filter;

/// The helper's end of the socket pair.
pub(crate) const SOCKET: RawFd = 3;

/// Upper bound of a message: the biggest specification that the protocol lets through is smaller.
const MAX_MESSAGE: u32 = 64 << 20;

/// What process to make.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Setup {
    #[prost(oneof = "Process", tags = "1, 2")]
    pub(crate) process: Option<Process>,
}

/// Kinds of processes.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Process {
    #[prost(message, tag = "1")]
    First(ContainerSetup),
    #[prost(message, tag = "2")]
    Exec(ExecSetup),
}

/// A container and its first process.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContainerSetup {
    /// The container's control group.
    #[prost(string, tag = "1")]
    pub(crate) cgroup: String,
    /// Directory of the root file system.
    #[prost(string, tag = "2")]
    pub(crate) rootfs: String,
    /// The configuration, JSON.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) spec: Vec<u8>,
    #[prost(message, optional, tag = "4")]
    pub(crate) filter: Option<Filter>,
}

/// A process in a running container.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExecSetup {
    /// The container's first process.
    #[prost(uint32, tag = "1")]
    pub(crate) init: u32,
    #[prost(bool, tag = "2")]
    pub(crate) user_namespace: bool,
    #[prost(bool, tag = "3")]
    pub(crate) time_namespace: bool,
    /// The argument of personality(2).
    #[prost(uint64, optional, tag = "4")]
    pub(crate) personality: Option<u64>,
    /// The `process` object, JSON.
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) process: Vec<u8>,
    #[prost(message, optional, tag = "6")]
    pub(crate) filter: Option<Filter>,
}

/// The agent's word to a helper.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Order {
    /// Execute the program. Otherwise: what was asked for is done.
    #[prost(bool, tag = "1")]
    pub(crate) start: bool,
}

impl Order {
    pub(crate) const CONTINUE: Order = Order { start: false };
    pub(crate) const START: Order = Order { start: true };
}

/// A helper's word to the agent.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Answer {
    #[prost(oneof = "Word", tags = "1, 2, 3, 4")]
    pub(crate) word: Option<Word>,
}

/// What a helper has to say.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Word {
    /// New user or time namespaces are there and want their id maps and clock offsets.
    #[prost(message, tag = "1")]
    Unshared(()),
    /// The process was forked; its pid in the agent's PID namespace.
    #[prost(uint32, tag = "2")]
    Forked(u32),
    /// The process waits for [`Order::START`]. Carries the terminal, if there is one.
    #[prost(message, tag = "3")]
    Ready(()),
    /// It ended here.
    #[prost(message, tag = "4")]
    Failed(Failure),
}

/// Writes a message.
pub(crate) fn send(stream: &mut impl Write, message: &impl Message) -> io::Result<()> {
    stream.write_all(&encode(message)?)
}

/// A message with its length.
pub(crate) fn encode(message: &impl Message) -> io::Result<Vec<u8>> {
    let body = message.encode_to_vec();
    match u32::try_from(body.len()) {
        Ok(length) if length <= MAX_MESSAGE => Ok([&length.to_le_bytes(), &*body].concat()),
        _ => Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
    }
}

/// Reads a message.
pub(crate) fn receive<T: Message + Default>(stream: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MAX_MESSAGE {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let mut bytes = Vec::new();
    if stream.take(length.into()).read_to_end(&mut bytes)? < length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    T::decode(&*bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let answer = Answer { word: Some(Word::Forked(7)) };
        let bytes = encode(&answer).unwrap();
        assert_eq!(receive::<Answer>(&mut bytes.as_slice()).unwrap(), answer);
    }

    #[test]
    fn cut_and_oversized_messages_are_errors() {
        let bytes = encode(&Order::START).unwrap();
        assert!(receive::<Order>(&mut &bytes[..bytes.len() - 1]).is_err());
        assert!(receive::<Order>(&mut [0xff; 16].as_slice()).is_err());
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = receive::<Answer>(&mut bytes.as_slice());
            let _ = receive::<Setup>(&mut bytes.as_slice());
        }
    }
}
