//! The control connection of `caisson-vmm`, as far as the measurements need it: JSON in packets.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde_json::{Value, json};

/// The version of the protocol that is spoken.
const VERSION: u32 = 1;

/// A connection to a machine.
pub(super) struct Control {
    socket: OwnedFd,
    last: u64,
}

impl Control {
    /// A connection, and the end that becomes the machine's.
    pub(super) fn pair() -> Result<(Self, OwnedFd)> {
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .context("making a control connection")?;
        Ok((Self { socket, last: 0 }, theirs))
    }

    /// Has `command` carried out.
    pub(super) fn call(&mut self, command: &Value) -> Result<()> {
        self.last += 1;
        let request = json!({ "version": VERSION, "id": self.last, "command": command }).to_string();
        send(self.socket.as_raw_fd(), request.as_bytes(), MsgFlags::MSG_NOSIGNAL)
            .context("sending a request")?;
        let mut packet = vec![0; 64 << 10];
        let count = loop {
            match recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => {}
                received => break received.map_err(io::Error::from).context("receiving the response")?,
            }
        };
        let packet = packet.get(..count).unwrap_or_default();
        let message: Value = serde_json::from_slice(packet).context("reading the response")?;
        if message.pointer("/response/result/Ok").is_none() {
            bail!("{command}: {message}");
        }
        Ok(())
    }
}
