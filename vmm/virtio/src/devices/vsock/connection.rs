//! One connection as the two ends see it: a state machine without a socket, a queue or a clock.
//!
//! ```text
//!  host-initiated: Requesting ──REQUEST──▶ Waiting ──RESPONSE──▶ Open
//!  guest-initiated: ───────────────────REQUEST─────────────────▶ Open (a RESPONSE is due)
//! ```
//!
//! An open connection ends direction by direction. When the guest has ended both, an RST confirms it, but
//! only after the last byte has gone on to the host. When the host has, the guest confirms it in the same
//! way.

use super::{
    credit::{Overrun, ReceiveCredit, SendCredit},
    packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM},
};

/// What tells one connection from another, as there is one guest and one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// The port on our side.
    pub(super) host_port: u32,
    /// The port in the guest.
    pub(super) guest_port: u32,
}

impl Key {
    /// The connection that a packet from the guest is about.
    pub(super) fn of(header: &Header) -> Self {
        Self { host_port: header.dst_port, guest_port: header.src_port }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The host wants it; the guest has not heard of it.
    Requesting,
    /// The guest has yet to answer.
    Waiting,
    Open,
}

/// What a packet of the guest means for the host's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The guest accepted: tell the host.
    Accepted,
    /// The payload is for the host.
    Data,
    /// The guest ended a direction.
    Shutdown,
    /// The guest ended it all, and has forgotten the connection.
    Reset,
}

/// The guest broke the protocol; the connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error(transparent)]
    Credit(#[from] Overrun),
    #[error("a packet that this state of the connection does not allow")]
    Unexpected,
    #[error("an unknown operation")]
    Operation,
}

/// What a connection would send to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Request,
    Response,
    /// What has ended: SHUTDOWN_* flags.
    Shutdown(u32),
    /// As much data as there is, and no more than this.
    Data(u32),
    CreditUpdate,
    CreditRequest,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    key: Key,
    state: State,
    send: SendCredit,
    receive: ReceiveCredit,
    /// What the guest said it has ended (SHUTDOWN_* flags, from its view).
    guest_ended: u32,
    /// What the host has ended (SHUTDOWN_* flags, from its view).
    host_ended: u32,
    /// What of `host_ended` the guest was told.
    told_ended: u32,
    response_due: bool,
    credit_due: bool,
    /// A CREDIT_REQUEST is on its way.
    asked: bool,
}

impl Connection {
    /// A connection that the host opens. `buf_alloc`: how many bytes from the guest it may hold.
    pub(super) fn from_host(key: Key, buf_alloc: u32) -> Self {
        Self {
            key,
            state: State::Requesting,
            send: SendCredit::default(),
            receive: ReceiveCredit::new(buf_alloc),
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
            response_due: false,
            credit_due: false,
            asked: false,
        }
    }

    /// A connection that the guest opened by `request`, and the host accepted.
    pub(super) fn from_guest(request: &Header, buf_alloc: u32) -> Self {
        let mut new = Self::from_host(Key::of(request), buf_alloc);
        new.state = State::Open;
        new.response_due = true;
        new.send.update(request.buf_alloc, request.fwd_cnt);
        new
    }

    /// Which connection it is.
    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// Whether the guest has heard of it.
    pub(super) fn is_known(&self) -> bool {
        self.state != State::Requesting
    }

    /// Takes in a packet of the guest.
    pub(super) fn on_packet(&mut self, header: &Header) -> Result<Effect, Violation> {
        let op = header.op().ok_or(Violation::Operation)?;
        if op != Op::Rst {
            self.send.update(header.buf_alloc, header.fwd_cnt);
            self.asked &= self.send.available() == 0;
        }
        match (op, self.state) {
            (Op::Rst, _) => Ok(Effect::Reset),
            (Op::Response, State::Waiting) => {
                self.state = State::Open;
                Ok(Effect::Accepted)
            }
            (Op::Rw, State::Open) if self.guest_ended & SHUTDOWN_SEND == 0 => {
                self.receive.receive(header.len)?;
                Ok(if header.len == 0 { Effect::None } else { Effect::Data })
            }
            (Op::Shutdown, State::Open) => {
                self.guest_ended |= header.flags & SHUTDOWN_BOTH;
                Ok(Effect::Shutdown)
            }
            (Op::CreditRequest, State::Open) => {
                self.credit_due = true;
                Ok(Effect::None)
            }
            (Op::CreditUpdate, State::Open) => Ok(Effect::None),
            _ => Err(Violation::Unexpected),
        }
    }

    /// Bytes of the guest have gone on to the host, or it no longer wants them.
    pub(super) fn forwarded(&mut self, bytes: usize) {
        self.receive.forward(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Bytes of the guest that have not.
    pub(super) fn held(&self) -> u32 {
        self.receive.held()
    }

    /// The host will send no more (all that it sent has reached the guest).
    pub(super) fn host_sends_no_more(&mut self) {
        self.host_ended |= SHUTDOWN_SEND;
    }

    /// The host takes no more.
    pub(super) fn host_takes_no_more(&mut self) {
        self.host_ended |= SHUTDOWN_RECEIVE;
    }

    /// The guest sends no more.
    pub(super) fn guest_is_silent(&self) -> bool {
        self.guest_ended & SHUTDOWN_SEND != 0
    }

    /// The guest takes no more.
    pub(super) fn guest_is_deaf(&self) -> bool {
        self.guest_ended & SHUTDOWN_RECEIVE != 0
    }

    /// The guest has ended both directions and the host has all its data: an RST is due.
    pub(super) fn is_over(&self) -> bool {
        self.guest_ended == SHUTDOWN_BOTH && self.held() == 0
    }

    /// The guest was told that the host has ended both directions, and has yet to confirm it.
    pub(super) fn awaits_reset(&self) -> bool {
        self.told_ended == SHUTDOWN_BOTH
    }

    /// What there is to send now. `readable`: whether the host may have data.
    pub(super) fn next(&self, readable: bool) -> Option<Next> {
        match self.state {
            State::Requesting => return Some(Next::Request),
            State::Waiting => return None,
            State::Open => {}
        }
        if self.guest_ended == SHUTDOWN_BOTH {
            return None;
        }
        if self.response_due {
            return Some(Next::Response);
        }
        if self.host_ended & !self.told_ended != 0 {
            return Some(Next::Shutdown(self.host_ended));
        }
        let wants_data = readable && !self.guest_is_deaf() && self.host_ended & SHUTDOWN_SEND == 0;
        match self.send.available() {
            0 if wants_data && !self.asked => return Some(Next::CreditRequest),
            0 => {}
            credit if wants_data => return Some(Next::Data(credit)),
            _ => {}
        }
        (self.credit_due || self.receive.is_news()).then_some(Next::CreditUpdate)
    }

    /// The header for `next`, with `len` bytes of data; what it says counts as said.
    pub(super) fn packet(&mut self, guest_cid: u64, next: Next, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.receive.tell();
        self.credit_due = false;
        let mut flags = 0;
        let op = match next {
            Next::Request => {
                self.state = State::Waiting;
                Op::Request
            }
            Next::Response => {
                self.response_due = false;
                Op::Response
            }
            Next::Shutdown(ended) => {
                self.told_ended = ended;
                flags = ended;
                Op::Shutdown
            }
            Next::Data(_) => {
                self.send.spend(len);
                Op::Rw
            }
            Next::CreditUpdate => Op::CreditUpdate,
            Next::CreditRequest => {
                self.asked = true;
                Op::CreditRequest
            }
        };
        Header { len, op: op as u16, flags, buf_alloc, fwd_cnt, ..self.header(guest_cid) }
    }

    /// The RST that ends it.
    pub(super) fn reset(&self, guest_cid: u64) -> Header {
        Header { op: Op::Rst as u16, ..self.header(guest_cid) }
    }

    fn header(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: TYPE_STREAM,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUFFER: u32 = 1000;

    fn guest(op: Op) -> Header {
        Header {
            op: op as u16,
            kind: TYPE_STREAM,
            src_port: 7,
            dst_port: 9,
            buf_alloc: 100,
            ..Header::default()
        }
    }

    fn data(len: u32) -> Header {
        Header { len, ..guest(Op::Rw) }
    }

    fn shutdown(flags: u32) -> Header {
        Header { flags, ..guest(Op::Shutdown) }
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(&guest(Op::Request), BUFFER);
        assert_eq!(connection.next(true), Some(Next::Response));
        connection.packet(3, Next::Response, 0);
        connection
    }

    #[test]
    fn the_host_opens() {
        let mut connection = Connection::from_host(Key { host_port: 9, guest_port: 7 }, BUFFER);
        assert_eq!(connection.next(true), Some(Next::Request));
        let request = connection.packet(3, Next::Request, 0);
        assert_eq!((request.src_cid, request.dst_cid, request.src_port, request.dst_port), (2, 3, 9, 7));
        assert_eq!((request.op(), request.buf_alloc), (Some(Op::Request), BUFFER));
        assert_eq!(connection.next(true), None);
        assert_eq!(connection.on_packet(&data(1)), Err(Violation::Unexpected));
        assert_eq!(connection.on_packet(&guest(Op::Response)), Ok(Effect::Accepted));
        assert_eq!(connection.next(true), Some(Next::Data(100)));
        assert_eq!(connection.on_packet(&guest(Op::Response)), Err(Violation::Unexpected));
    }

    #[test]
    fn data_stops_at_the_guests_credit() {
        let mut connection = open();
        assert_eq!(connection.next(false), None);
        assert_eq!(connection.next(true), Some(Next::Data(100)));
        connection.packet(3, Next::Data(100), 100);
        assert_eq!(connection.next(true), Some(Next::CreditRequest));
        connection.packet(3, Next::CreditRequest, 0);
        assert_eq!(connection.next(true), None, "one question is enough");
        connection.on_packet(&Header { fwd_cnt: 30, ..guest(Op::CreditUpdate) }).unwrap();
        assert_eq!(connection.next(true), Some(Next::Data(30)));
    }

    #[test]
    fn a_guest_that_ignores_its_credit_is_caught() {
        let mut connection = open();
        assert_eq!(connection.on_packet(&data(BUFFER)), Ok(Effect::Data));
        assert_eq!(connection.on_packet(&data(1)), Err(Violation::Credit(Overrun)));
    }

    #[test]
    fn each_direction_ends_alone() {
        let mut connection = open();
        assert_eq!(connection.on_packet(&shutdown(SHUTDOWN_SEND)), Ok(Effect::Shutdown));
        assert!(connection.guest_is_silent() && !connection.is_over());
        assert_eq!(connection.next(true), Some(Next::Data(100)), "the other direction goes on");
        assert_eq!(connection.on_packet(&data(1)), Err(Violation::Unexpected));

        let mut connection = open();
        connection.host_sends_no_more();
        assert_eq!(connection.next(true), Some(Next::Shutdown(SHUTDOWN_SEND)));
        connection.packet(3, Next::Shutdown(SHUTDOWN_SEND), 0);
        assert!(!connection.awaits_reset());
        assert_eq!(connection.on_packet(&data(1)), Ok(Effect::Data));
        connection.host_takes_no_more();
        assert_eq!(connection.next(false), Some(Next::Shutdown(SHUTDOWN_BOTH)));
        connection.packet(3, Next::Shutdown(SHUTDOWN_BOTH), 0);
        assert!(connection.awaits_reset());
    }

    #[test]
    fn the_reset_waits_for_the_last_byte() {
        let mut connection = open();
        connection.on_packet(&data(10)).unwrap();
        connection.on_packet(&shutdown(SHUTDOWN_BOTH)).unwrap();
        connection.forwarded(9);
        assert!(!connection.is_over());
        connection.forwarded(1);
        assert!(connection.is_over());
    }

    fn packets() -> impl Strategy<Value = Header> {
        (0u16..9, 0u32..5, 0u32..2 * BUFFER, any::<u32>(), 0u32..3000).prop_map(
            |(op, flags, len, buf_alloc, fwd_cnt)| Header {
                op,
                flags,
                len,
                buf_alloc,
                fwd_cnt,
                ..guest(Op::Rw)
            },
        )
    }

    proptest! {
        /// Whatever arrives and however the host acts: bytes held stay within the buffer, data to the guest
        /// within what it allowed, nothing follows the end of a direction, and sending comes to an end by
        /// itself.
        #[test]
        fn keeps_its_bounds(
            host_initiated: bool, steps in proptest::collection::vec((packets(), 0usize..500, 0u8..8), 0..200),
        ) {
            let key = Key { host_port: 9, guest_port: 7 };
            let mut connection =
                if host_initiated { Connection::from_host(key, BUFFER) } else { Connection::from_guest(&guest(Op::Request), BUFFER) };
            let mut sent_end = false;
            for (packet, forwarded, host) in steps {
                match connection.on_packet(&packet) {
                    Ok(Effect::Reset) | Err(_) => break,
                    Ok(_) => {}
                }
                prop_assert!(connection.held() <= BUFFER);
                connection.forwarded(forwarded);
                match host {
                    0 => connection.host_sends_no_more(),
                    1 => connection.host_takes_no_more(),
                    _ => {}
                }
                let mut rounds = 0;
                // A host with 100 bytes of data at a time.
                while let Some(next) = connection.next(rounds < 4) {
                    let len = if let Next::Data(credit) = next {
                        prop_assert!(!sent_end && !connection.guest_is_deaf());
                        credit.min(100)
                    } else {
                        0
                    };
                    let header = connection.packet(3, next, len);
                    sent_end |= header.op() == Some(Op::Shutdown) && header.flags & SHUTDOWN_SEND != 0;
                    rounds += 1;
                    prop_assert!(rounds < 12);
                }
            }
        }
    }
}
