//! The connections of a running machine.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use vmm_sys_util::epoll::EventSet;

use super::{
    protocol::{Failure, FailureKind, Message, Request, VERSION},
    socket,
};
use crate::machine::poller::{Poller, Token};

/// The most controllers at once.
const MAX_CONTROLLERS: usize = 16;

/// A request and where it came from.
pub(super) struct Incoming {
    pub(super) controller: u32,
    pub(super) request: Request,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// All controllers. None of them can stall the machine: one that does not read its responses is dropped.
pub(super) struct Controllers {
    poller: Arc<Poller>,
    listener: Option<OwnedFd>,
    connected: BTreeMap<u32, OwnedFd>,
    next: u32,
}

impl Controllers {
    pub(super) fn new(poller: Arc<Poller>) -> Self {
        Self { poller, listener: None, connected: BTreeMap::new(), next: 0 }
    }

    /// Takes a socket, which listens or is connected.
    pub(super) fn add(&mut self, socket: OwnedFd) -> io::Result<()> {
        if socket::is_listening(socket.as_fd())? {
            self.poller.add(socket.as_raw_fd(), EventSet::IN, Token::Listener)?;
            self.listener = Some(socket);
            return Ok(());
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.poller.add(socket.as_raw_fd(), EventSet::IN, Token::Controller(number))?;
        self.connected.insert(number, socket);
        Ok(())
    }

    /// Someone connects.
    pub(super) fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match socket::accept(listener.as_fd()) {
            Ok(socket) if self.connected.len() < MAX_CONTROLLERS => {
                if let Err(error) = self.add(socket) {
                    tracing::warn!(%error, "controller could not be watched");
                }
            }
            Ok(_) => tracing::warn!("too many controllers, one was refused"),
            Err(error) => tracing::warn!(%error, "controller could not connect"),
        }
    }

    /// Someone has sent something. What is no request is answered here.
    pub(super) fn receive(&mut self, controller: u32) -> Option<Incoming> {
        let socket = self.connected.get(&controller)?;
        match socket::receive(socket.as_fd(), false) {
            Ok(Some((data, descriptors))) => match parse(&data) {
                Ok(request) => Some(Incoming { controller, request, descriptors }),
                Err((id, failure)) => {
                    self.send(controller, &Message::Response { id, result: Err(failure) });
                    None
                }
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok(None) | Err(_) => {
                self.remove(controller);
                None
            }
        }
    }

    pub(super) fn send(&mut self, controller: u32, message: &Message) {
        let Some(socket) = self.connected.get(&controller) else { return };
        let sent = serde_json::to_vec(message)
            .map_err(io::Error::from)
            .and_then(|data| socket::send(socket.as_fd(), &data, &[], false));
        if let Err(error) = sent {
            tracing::warn!(%error, "controller dropped");
            self.remove(controller);
        }
    }

    pub(super) fn send_all(&mut self, message: &Message) {
        for controller in self.connected.keys().copied().collect::<Vec<_>>() {
            self.send(controller, message);
        }
    }

    fn remove(&mut self, controller: u32) {
        if let Some(socket) = self.connected.remove(&controller) {
            self.poller.remove(socket.as_raw_fd());
        }
    }

    /// Whether anyone could still send a request.
    pub(super) fn any(&self) -> bool {
        self.listener.is_some() || !self.connected.is_empty()
    }
}

/// Reads a request; what is none comes back as a failure with the id that it had, or 0.
pub(super) fn parse(data: &[u8]) -> Result<Request, (u64, Failure)> {
    #[derive(serde::Deserialize)]
    struct Envelope {
        version: u32,
        #[serde(default)]
        id: u64,
    }
    let invalid = |message: String| Failure { kind: FailureKind::Invalid, message };
    let envelope: Envelope =
        serde_json::from_slice(data).map_err(|error| (0, invalid(format!("not a request: {error}"))))?;
    if envelope.version != VERSION {
        let message = format!("protocol version {}, this is version {VERSION}", envelope.version);
        return Err((envelope.id, invalid(message)));
    }
    serde_json::from_slice(data).map_err(|error| (envelope.id, invalid(format!("not a request: {error}"))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::protocol::{Command, Resize};

    #[test]
    fn another_version_is_refused_before_its_content_is_looked_at() {
        let (id, failure) = parse(br#"{"version":2,"id":9,"command":{"teleport":{}}}"#).unwrap_err();
        assert_eq!((id, failure.kind), (9, FailureKind::Invalid));
        assert!(failure.message.contains("version 2"), "{failure}");
    }

    #[test]
    fn unknown_commands_and_keys_are_errors_with_the_requests_id() {
        for text in [
            r#"{"version":1,"id":5,"command":"explode"}"#,
            r#"{"version":1,"id":5,"command":{"resize":{"cpu":2}}}"#,
        ] {
            let (id, _) = parse(text.as_bytes()).unwrap_err();
            assert_eq!(id, 5);
        }
    }

    #[test]
    fn requests_survive_the_round_trip() {
        let request = Request {
            version: VERSION,
            id: 7,
            command: Command::Resize(Resize { cpus: Some(2), ..Resize::default() }),
        };
        assert_eq!(parse(&serde_json::to_vec(&request).unwrap()).unwrap(), request);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(data: Vec<u8>) {
            let _ = parse(&data);
        }
    }
}
