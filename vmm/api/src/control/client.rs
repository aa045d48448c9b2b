//! The typed client of the control API.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use super::{
    metrics::Metrics,
    protocol::{Command, Failure, Message, Reply, Request, Resize, RestoreCommand, VERSION},
    socket,
};
use crate::{
    config::{DeviceConfig, FileSource, MachineConfig},
    exit::ExitReason,
};

/// Why a request got no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed.
    #[error("talking to the machine")]
    Io(#[from] io::Error),
    /// The machine answered something else than its protocol has.
    #[error("the machine's answer")]
    Protocol(#[from] serde_json::Error),
    /// The machine is gone.
    #[error("the machine has closed the connection")]
    Closed,
    /// The machine ended before it answered.
    #[error("the machine has ended: {0}")]
    Ended(ExitReason),
    /// The machine refused, or failed to do it.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// The answer is not one to this request.
    #[error("unexpected answer")]
    Unexpected,
}

/// A connection to a machine. Calls block until the machine has answered.
pub struct Client {
    socket: OwnedFd,
    next_id: u64,
    ended: Option<ExitReason>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self::new(socket::connect_to(path)?))
    }

    /// Uses a connected socket, as made by socketpair(2) with `SOCK_SEQPACKET`.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, next_id: 1, ended: None }
    }

    /// Sends a command with descriptors and waits for its answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn call(&mut self, command: Command, descriptors: &[BorrowedFd<'_>]) -> Result<Reply, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let data = serde_json::to_vec(&Request { version: VERSION, id, command })?;
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        socket::send(self.socket.as_fd(), &data, &raw, true)?;
        loop {
            match self.receive()? {
                Message::Response { id: answered, result } if answered == id => return Ok(result?),
                Message::Response { .. } => return Err(ClientError::Unexpected),
                Message::Exit(reason) => self.ended = Some(reason),
            }
        }
    }

    fn receive(&self) -> Result<Message, ClientError> {
        match (socket::receive(self.socket.as_fd(), true)?, &self.ended) {
            (Some(packet), _) => Ok(serde_json::from_slice(&packet.data)?),
            (None, Some(reason)) => Err(ClientError::Ended(reason.clone())),
            (None, None) => Err(ClientError::Closed),
        }
    }

    fn done(&mut self, command: Command, descriptors: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        match self.call(command, descriptors)? {
            Reply::Done => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Makes the machine. `fd:N` in `config` is the N-th of `descriptors`.
    ///
    /// # Errors
    /// See [`ClientError`]; so for every call.
    pub fn create(
        &mut self,
        config: MachineConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.done(Command::Create(Box::new(config)), descriptors)
    }

    /// Makes the machine from a snapshot, paused.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn restore(
        &mut self,
        command: RestoreCommand,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.done(Command::Restore(command), descriptors)
    }

    /// Starts the machine.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn boot(&mut self) -> Result<(), ClientError> {
        self.done(Command::Boot, &[])
    }

    /// Plugs a device, and returns its slot and the name of its platform device in the guest's sysfs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn plug(
        &mut self,
        slot: Option<u8>,
        device: DeviceConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(u8, String), ClientError> {
        match self.call(Command::Plug { slot, device }, descriptors)? {
            Reply::Plugged { slot, guest_name } => Ok((slot, guest_name)),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Unplugs the device in a slot, whose driver has let go of it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn unplug(&mut self, slot: u8, force: bool) -> Result<(), ClientError> {
        self.done(Command::Unplug { slot, force }, &[])
    }

    /// Has a disk take the size that its file has by now; returns it, in bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn refresh_capacity(&mut self, slot: u8) -> Result<u64, ClientError> {
        match self.call(Command::RefreshCapacity { slot }, &[])? {
            Reply::Capacity { bytes } => Ok(bytes),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Changes the machine's size.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn resize(&mut self, resize: Resize) -> Result<(), ClientError> {
        self.done(Command::Resize(resize), &[])
    }

    /// Brings all processors to rest.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.done(Command::Pause, &[])
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.done(Command::Resume, &[])
    }

    /// Saves the paused machine into two files.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn snapshot(&mut self, state: BorrowedFd<'_>, memory: BorrowedFd<'_>) -> Result<(), ClientError> {
        let command =
            Command::Snapshot { state: FileSource::Descriptor(0), memory: FileSource::Descriptor(1) };
        self.done(command, &[state, memory])
    }

    /// Counters and sizes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn metrics(&mut self) -> Result<Metrics, ClientError> {
        match self.call(Command::Metrics, &[])? {
            Reply::Metrics(metrics) => Ok(*metrics),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Ends the machine.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn shutdown(&mut self) -> Result<(), ClientError> {
        self.done(Command::Shutdown, &[])
    }

    /// Waits until the machine ends by itself.
    ///
    /// # Errors
    /// When the connection ends without a word.
    pub fn wait(&mut self) -> Result<ExitReason, ClientError> {
        loop {
            if let Some(reason) = self.ended.take() {
                return Ok(reason);
            }
            if let Message::Exit(reason) = self.receive()? {
                return Ok(reason);
            }
        }
    }
}
