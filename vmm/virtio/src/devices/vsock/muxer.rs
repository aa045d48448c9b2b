//! All connections of one device: who is where, whose turn it is, and who has waited too long.
//!
//! Packets of the guest come in by [`Muxer::receive`], packets to it go out by [`Muxer::next_packet`], and
//! the host's sockets are looked after by [`Muxer::dispatch`] and [`Muxer::settle`]. Nothing here knows
//! queues.
//!
//! Everything is bounded: connections by [`MAX_CONNECTIONS`], what each holds by its credit, and resets by
//! [`Muxer::takes_packets`], which tells the device to leave the guest's packets where they are. Connections
//! take turns packet by packet; one that is stuck (its reader is slow, or its guest end out of credit) loses
//! its turn and no one else's.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::Instant,
};

use slab::Slab;
use tracing::{debug, warn};
use vmm_sys_util::epoll::EventSet;

use super::{
    connection::{Connection, Effect, Key, Next},
    handshake::{self, Line},
    host::{Dialer, HostEnd},
    limits::{MAX_CONNECTIONS, MAX_RESETS, Timeouts, buffer_size},
    metrics::VsockMetrics,
    packet::{HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM},
    poller::{Event, Poller, Token},
    stream::{Received, Stream},
};
use crate::buffers::GuestBuffers;

/// The first port that host-initiated connections come from; they count up from it, and it takes 2^30 of them
/// to use one again.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The most clients accepted in one go.
const ACCEPT_BATCH: usize = 64;

/// The guest offers a receive buffer with no room for data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoom;

/// A host's socket, and the connection that it is one end of.
struct Peer {
    serial: u32,
    stream: Stream,
    /// `None` until the client has said which port it wants.
    connection: Option<Connection>,
    /// What the connection's receive buffer was promised to hold.
    promised: u32,
    /// It is in the queue of those that have something to send.
    queued: bool,
    /// The guest has forgotten it; only what the guest had sent still goes to the host.
    orphaned: bool,
    deadline: Option<Instant>,
}

/// See the module's description.
pub(super) struct Muxer {
    guest_cid: u64,
    poller: Poller,
    listener: Option<UnixListener>,
    /// Clients may be waiting to be accepted.
    pending_accepts: bool,
    /// The process is out of descriptors; when to try again.
    accept_at: Option<Instant>,
    dialer: Option<Box<dyn Dialer>>,
    peers: Slab<Peer>,
    keys: BTreeMap<Key, Token>,
    /// Whose turn it is next.
    ready: VecDeque<Token>,
    resets: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, Token)>,
    promised: usize,
    next_serial: u32,
    next_port: u32,
    timeouts: Timeouts,
    metrics: Arc<VsockMetrics>,
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u64,
        host: HostEnd,
        timeouts: Timeouts,
        metrics: Arc<VsockMetrics>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        if let Some(listener) = &host.listener {
            listener.set_nonblocking(true)?;
            poller.watch_listener(listener.as_raw_fd())?;
        }
        Ok(Self {
            guest_cid,
            poller,
            pending_accepts: host.listener.is_some(),
            listener: host.listener,
            accept_at: None,
            dialer: host.dialer,
            peers: Slab::new(),
            keys: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            promised: 0,
            next_serial: 0,
            next_port: 0,
            timeouts,
            metrics,
        })
    }

    /// Ready whenever [`dispatch`](Self::dispatch) has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.poller.fd()
    }

    /// Makes [`fd`](Self::fd) ready.
    pub(super) fn ring(&self) -> io::Result<()> {
        self.poller.ring()
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Drops every connection, as the guest that knew them is gone.
    pub(super) fn clear(&mut self) {
        self.metrics.closed.add(self.peers.len() as u64);
        self.peers.clear();
        self.keys.clear();
        self.ready.clear();
        self.resets.clear();
        self.deadlines.clear();
        self.promised = 0;
        self.pending_accepts = self.listener.is_some();
    }

    /// Takes in what happened to the host's sockets.
    pub(super) fn dispatch(&mut self) -> io::Result<()> {
        for event in self.poller.events()? {
            match event {
                Event::Listener => self.pending_accepts = true,
                Event::Wakeup => {}
                Event::Socket(token, events) => self.on_socket(token, events),
            }
        }
        Ok(())
    }

    /// Ends what has waited too long, accepts who waits, and sets the timer; `also` is the device's own
    /// deadline.
    pub(super) fn settle(&mut self, also: Option<Instant>) -> io::Result<()> {
        // The clock is read only when something may be due.
        if !self.deadlines.is_empty() || self.accept_at.is_some() {
            self.expire(Instant::now());
        }
        self.accept()?;
        let first = self.deadlines.first().map(|(at, _)| *at);
        self.poller.wake_at([first, self.accept_at, also].into_iter().flatten().min())
    }

    /// Whether another packet of the guest may be taken in. If not, it will be once resets have been sent.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether there may be something to send to the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Takes in a packet of the guest. `payload` is all that follows the header in its chain.
    pub(super) fn receive(&mut self, header: &Header, mut payload: GuestBuffers) {
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        if header.src_cid != self.guest_cid {
            self.metrics.dropped.inc();
            debug!(src_cid = header.src_cid, "dropping a packet that names another source");
            return;
        }
        self.metrics.tx_packets.inc();
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        match self.keys.get(&Key::of(header)).copied() {
            None if header.op() == Some(Op::Request) => self.open(header),
            None => self.refuse(header),
            Some(token) if header.op() == Some(Op::Rw) && length > payload.len() => {
                self.metrics.dropped.inc();
                self.violated(token, &"a packet shorter than it says");
            }
            Some(token) => {
                drop(payload.split_off(length));
                self.on_packet(token, header, &payload);
            }
        }
    }

    /// The next packet for the guest, its data already in `room`.
    ///
    /// # Errors
    /// When there is data and `room` is empty, so that the data could never be sent.
    pub(super) fn next_packet(&mut self, room: &mut GuestBuffers) -> Result<Option<Header>, NoRoom> {
        if let Some(reset) = self.resets.pop_front() {
            self.metrics.rx_packets.inc();
            return Ok(Some(reset));
        }
        // Each round takes a connection from the queue, or comes a step closer to its end.
        while let Some(token) = self.ready.pop_front() {
            if let Some(header) = self.packet_of(token, room)? {
                self.metrics.rx_packets.inc();
                self.metrics.rx_bytes.add(u64::from(header.len));
                self.follow_up(token);
                return Ok(Some(header));
            }
            self.follow_up(token);
        }
        Ok(None)
    }

    /// What this connection has to send now, if anything.
    fn packet_of(&mut self, token: Token, room: &mut GuestBuffers) -> Result<Option<Header>, NoRoom> {
        let guest_cid = self.guest_cid;
        let Some(peer) = self.peer(token) else { return Ok(None) };
        peer.queued = false;
        let Some(connection) = &mut peer.connection else { return Ok(None) };
        let Some(next) = connection.next(peer.stream.is_readable()) else { return Ok(None) };
        let mut length = 0;
        if let Next::Data(credit) = next {
            let most = usize::try_from(credit).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD);
            if room.is_empty() {
                return Err(NoRoom);
            }
            drop(room.split_off(most));
            match peer.stream.receive(room) {
                Received::Data(bytes) => length = bytes,
                Received::Nothing => return Ok(None),
                Received::End => {
                    connection.host_sends_no_more();
                    return Ok(None);
                }
            }
        }
        Ok(Some(connection.packet(guest_cid, next, length)))
    }

    fn on_packet(&mut self, token: Token, header: &Header, payload: &GuestBuffers) {
        let Some(Peer { stream, connection: Some(connection), promised, .. }) = self.peer(token) else {
            return;
        };
        let effect = match connection.on_packet(header) {
            Ok(effect) => effect,
            Err(violation) => return self.violated(token, &violation),
        };
        match effect {
            Effect::None | Effect::Shutdown => {}
            Effect::Data => {
                let done = stream.send(payload, *promised);
                connection.forwarded(done);
                self.metrics.tx_bytes.add(payload.len() as u64);
            }
            Effect::Accepted => {
                if !stream.send_line(&format!("OK {}\n", connection.key().host_port)) {
                    // The client has gone meanwhile, and the guest believes that it is there.
                    return self.abort(token);
                }
                self.set_deadline(token, None);
                self.metrics.opened.inc();
            }
            Effect::Reset => return self.orphan(token),
        }
        self.follow_up(token);
    }

    /// Opens a connection that the guest asks for, if someone serves the port.
    fn open(&mut self, header: &Header) {
        if self.peers.len() >= MAX_CONNECTIONS {
            return self.refuse(header);
        }
        let dialled = match &mut self.dialer {
            Some(dialer) => dialer.dial(header.dst_port),
            None => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        let opened = dialled.and_then(|socket| self.add(socket));
        match opened {
            Ok(token) => {
                let promised = self.promise();
                let connection = Connection::from_guest(header, promised);
                self.attach(token, connection, promised);
                self.metrics.opened.inc();
            }
            Err(error) => {
                debug!(port = header.dst_port, %error, "refusing a connection of the guest");
                self.refuse(header);
            }
        }
    }

    /// Answers a packet by an RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op() == Some(Op::Request) {
            self.metrics.refused.inc();
        }
        if header.op() != Some(Op::Rst) {
            self.resets.push_back(header.reset_reply());
        }
    }

    fn on_socket(&mut self, token: Token, events: EventSet) {
        let Some(peer) = self.peer(token) else { return };
        let ends = EventSet::HANG_UP | EventSet::ERROR;
        let reads = EventSet::IN | EventSet::READ_HANG_UP;
        peer.stream.set_ready(events.intersects(reads), events.intersects(ends));
        let Some(connection) = &mut peer.connection else { return self.on_handshake(token) };
        if events.intersects(EventSet::OUT | ends) {
            connection.forwarded(peer.stream.flush());
        }
        self.follow_up(token);
    }

    /// A client that has not said yet which port it wants may have done so.
    fn on_handshake(&mut self, token: Token) {
        let Some(peer) = self.peer(token) else { return };
        let mut bytes = [0; handshake::MAX_LINE];
        let read = match peer.stream.peek(&mut bytes) {
            Ok(read) => bytes.get(..read).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => &[],
        };
        match handshake::parse(read) {
            Line::Partial if !read.is_empty() && !peer.stream.is_hung_up() => {}
            Line::Connect { port, len } if peer.stream.skip(len) => {
                let key = Key { host_port: self.free_port(port), guest_port: port };
                let promised = self.promise();
                self.attach(token, Connection::from_host(key, promised), promised);
                self.set_deadline(token, Some(Instant::now() + self.timeouts.connect));
            }
            _ => {
                self.metrics.bad_handshakes.inc();
                self.end(token);
            }
        }
    }

    /// A host port that has no connection to this port of the guest. There are more ports than connections.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = FIRST_HOST_PORT | self.next_port;
            self.next_port = (self.next_port + 1) % FIRST_HOST_PORT;
            if !self.keys.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    /// Reserves a receive buffer for the next connection.
    fn promise(&mut self) -> u32 {
        let size = buffer_size(self.promised);
        self.promised += size as usize;
        size
    }

    fn attach(&mut self, token: Token, connection: Connection, promised: u32) {
        self.keys.insert(connection.key(), token);
        if let Some(peer) = self.peer(token) {
            peer.connection = Some(connection);
            peer.promised = promised;
        }
        self.follow_up(token);
    }

    /// Draws the conclusions from whatever just changed about a connection.
    fn follow_up(&mut self, token: Token) {
        let close = self.timeouts.close;
        let Some(Peer { stream, connection: Some(connection), queued, orphaned, deadline, .. }) =
            self.peer(token)
        else {
            return;
        };
        if *orphaned {
            if connection.held() == 0 {
                self.end(token);
            }
            return;
        }
        if connection.guest_is_silent() {
            stream.finish_writing();
        }
        if connection.guest_is_deaf() {
            stream.stop_reading();
        }
        if connection.is_over() {
            return self.abort(token);
        }
        if stream.refuses() {
            connection.host_takes_no_more();
        }
        if stream.is_hung_up() && !stream.is_readable() {
            connection.host_sends_no_more();
            connection.host_takes_no_more();
        }
        if !*queued && connection.next(stream.is_readable()).is_some() {
            *queued = true;
            self.ready.push_back(token);
        } else if connection.awaits_reset() && deadline.is_none() {
            self.set_deadline(token, Some(Instant::now() + close));
        }
    }

    /// The guest has forgotten the connection. What it had sent still goes to the host, however long that
    /// takes.
    fn orphan(&mut self, token: Token) {
        let Some(Peer { stream, connection: Some(connection), orphaned, .. }) = self.peer(token) else {
            return;
        };
        let key = connection.key();
        *orphaned = true;
        stream.stop_reading();
        self.keys.remove(&key);
        self.set_deadline(token, None);
        self.follow_up(token);
    }

    fn violated(&mut self, token: Token, what: &dyn std::fmt::Display) {
        self.metrics.violations.inc();
        if let Some(connection) = self.peer(token).and_then(|peer| peer.connection.as_ref()) {
            warn!(key = ?connection.key(), "the guest broke the protocol: {what}");
        }
        self.abort(token);
    }

    /// Ends a connection for both sides.
    fn abort(&mut self, token: Token) {
        let guest_cid = self.guest_cid;
        let reset = self.peer(token).and_then(|peer| Some(peer.connection.as_ref()?.reset(guest_cid)));
        self.resets.extend(reset);
        self.end(token);
    }

    fn expire(&mut self, now: Instant) {
        while let Some(&(at, token)) = self.deadlines.first() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            self.metrics.timeouts.inc();
            let connection = self.peer(token).and_then(|peer| peer.connection.as_ref());
            // A guest that offers no buffers never hears of a connection, so resets would only pile up.
            if connection.is_some_and(Connection::is_known) {
                self.abort(token);
            } else {
                self.end(token);
            }
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
            self.pending_accepts = true;
        }
    }

    /// Accepts clients that wait, as far as there is room for them.
    fn accept(&mut self) -> io::Result<()> {
        for _ in 0..ACCEPT_BATCH {
            let Some(listener) = &self.listener else { return Ok(()) };
            if !self.pending_accepts || self.peers.len() >= MAX_CONNECTIONS {
                return Ok(());
            }
            match listener.accept().and_then(|(socket, _)| self.add(socket)) {
                Ok(token) => {
                    self.set_deadline(token, Some(Instant::now() + self.timeouts.handshake));
                    self.on_handshake(token);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.pending_accepts = false,
                // The client has gone, or a signal came: the next one may be there.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR)) => {}
                Err(error) => {
                    warn!(%error, "accepting a connection to the guest");
                    self.pending_accepts = false;
                    self.accept_at = Some(Instant::now() + self.timeouts.accept);
                }
            }
        }
        // More may be waiting, and everyone else, too.
        self.poller.ring()
    }

    fn add(&mut self, socket: UnixStream) -> io::Result<Token> {
        let entry = self.peers.vacant_entry();
        let slot = u32::try_from(entry.key()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let token = Token { slot, serial: self.next_serial };
        self.poller.watch_socket(socket.as_raw_fd(), token)?;
        self.next_serial = self.next_serial.wrapping_add(1);
        entry.insert(Peer {
            serial: token.serial,
            stream: Stream::new(socket),
            connection: None,
            promised: 0,
            queued: false,
            orphaned: false,
            deadline: None,
        });
        Ok(token)
    }

    /// Closes the host's end and forgets the connection.
    fn end(&mut self, token: Token) {
        self.set_deadline(token, None);
        let slot = token.slot as usize;
        if self.peer(token).is_none() {
            return;
        }
        let Some(peer) = self.peers.try_remove(slot) else { return };
        self.promised = self.promised.saturating_sub(peer.promised as usize);
        if let Some(connection) = peer.connection {
            self.metrics.closed.inc();
            // An orphan's ports may be another connection's by now.
            if !peer.orphaned {
                self.keys.remove(&connection.key());
            }
        }
    }

    fn set_deadline(&mut self, token: Token, deadline: Option<Instant>) {
        let Some(peer) = self.peer(token) else { return };
        let before = std::mem::replace(&mut peer.deadline, deadline);
        if let Some(at) = before {
            self.deadlines.remove(&(at, token));
        }
        if let Some(at) = deadline {
            self.deadlines.insert((at, token));
        }
    }

    /// Connections, and bytes allocated for them; checks that the books agree.
    #[cfg(test)]
    pub(super) fn holdings(&self) -> (usize, usize) {
        let promised: usize = self.peers.iter().map(|(_, peer)| peer.promised as usize).sum();
        assert_eq!(promised, self.promised);
        assert!(self.keys.len() <= self.peers.len() && self.deadlines.len() <= self.peers.len());
        for (_, peer) in &self.peers {
            assert!(peer.stream.backlog() <= peer.promised as usize);
        }
        (self.peers.len(), self.peers.iter().map(|(_, peer)| peer.stream.backlog()).sum())
    }

    fn peer(&mut self, token: Token) -> Option<&mut Peer> {
        self.peers.get_mut(token.slot as usize).filter(|peer| peer.serial == token.serial)
    }
}
