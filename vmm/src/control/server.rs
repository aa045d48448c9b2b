//! The connections of a running machine.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
};

use caisson_vmm_api::control::{
    protocol::{Failure, FailureKind, Message, Request, VERSION},
    socket::{self, MAX_MESSAGE, Packet},
};
use vmm_sys_util::epoll::EventSet;

use crate::machine::poller::{Poller, Token};

/// For how long nobody is let in when the process is out of descriptors, in milliseconds.
const REOPEN_MS: i32 = 100;

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
    /// Nobody could be let in, so the listener is left alone for a moment: it stays ready, and would keep the
    /// event loop busy.
    closed: bool,
    connected: BTreeMap<u32, OwnedFd>,
    next: u32,
}

impl Controllers {
    pub(super) fn new(poller: Arc<Poller>) -> Self {
        Self { poller, listener: None, closed: false, connected: BTreeMap::new(), next: 0 }
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
            Err(error) => {
                tracing::warn!(%error, "controller could not connect");
                self.poller.remove(listener.as_raw_fd());
                self.closed = true;
            }
        }
    }

    /// How long to wait for events at most, in milliseconds (-1: without end), before
    /// [`reopen`](Self::reopen) is to be called.
    pub(super) fn patience(&self) -> i32 {
        if self.closed { REOPEN_MS } else { -1 }
    }

    /// Looks again whether someone can be let in.
    pub(super) fn reopen(&mut self) {
        let Some(listener) = self.listener.as_ref().filter(|_| self.closed) else { return };
        let watched = self.poller.add(listener.as_raw_fd(), EventSet::IN, Token::Listener);
        self.closed = watched.is_err();
    }

    /// Someone has sent something. What is no request is answered here.
    pub(super) fn receive(&mut self, controller: u32) -> Option<Incoming> {
        let socket = self.connected.get(&controller)?;
        match socket::receive(socket.as_fd(), false) {
            Ok(Some(packet)) => match read(packet) {
                Ok((request, descriptors)) => Some(Incoming { controller, request, descriptors }),
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

/// Reads a packet that came whole.
fn read(packet: Packet) -> Result<(Request, Vec<OwnedFd>), (u64, Failure)> {
    let Packet { data, descriptors, truncated } = packet;
    let request = parse(&data);
    if truncated {
        let id = request.map_or_else(|(id, _)| id, |request| request.id);
        let message = format!("more than {MAX_MESSAGE} bytes, or more descriptors than can be open here");
        return Err((id, Failure { kind: FailureKind::Invalid, message }));
    }
    request.map(|request| (request, descriptors))
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
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use proptest::prelude::*;

    use super::*;
    use caisson_vmm_api::{control::protocol::Command, control::protocol::Resize};

    #[test]
    fn a_request_that_came_in_part_is_answered() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap();
        let mut controllers = Controllers::new(Arc::new(Poller::new().unwrap()));
        controllers.add(ours).unwrap();
        let mut request = br#"{"version":1,"id":5,"command":"metrics"}"#.to_vec();
        request.resize(MAX_MESSAGE + 1, b' ');
        nix::unistd::write(&theirs, &request).unwrap();
        assert!(controllers.receive(0).is_none());
        let answer = socket::receive(theirs.as_fd(), false).unwrap().unwrap().data;
        let Message::Response { id: 5, result: Err(failure) } = serde_json::from_slice(&answer).unwrap()
        else {
            panic!("{}", String::from_utf8_lossy(&answer));
        };
        assert_eq!(failure.kind, FailureKind::Invalid);
        assert!(controllers.any(), "it may try again");
    }

    /// A socket that cannot be accepted from, as when the process is out of descriptors, is not asked all the
    /// time.
    #[test]
    fn a_listener_that_fails_is_left_alone_for_a_moment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let poller = Arc::new(Poller::new().unwrap());
        let mut controllers = Controllers::new(poller.clone());
        controllers.add(socket::listen_at(&path).unwrap()).unwrap();
        let _client = socket::connect_to(&path).unwrap();
        let ready = |poller: &Poller| poller.wait(0).unwrap().len();
        assert_eq!((ready(&poller), controllers.patience()), (1, -1));
        let listener = controllers.listener.replace(tempfile::tempfile().unwrap().into()).unwrap();
        controllers.accept();
        poller.remove(listener.as_raw_fd());
        assert_eq!(controllers.patience(), REOPEN_MS);
        controllers.listener = Some(listener);
        assert_eq!(ready(&poller), 0);
        controllers.reopen();
        assert_eq!((ready(&poller), controllers.patience()), (1, -1));
        controllers.accept();
        assert_eq!((ready(&poller), controllers.connected.len()), (0, 1));
    }

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
