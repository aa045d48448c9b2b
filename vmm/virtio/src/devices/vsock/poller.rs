//! The one descriptor that stands for all of the device's: an epoll instance with the listener, the
//! connections, a timer and a doorbell in it.
//!
//! All are watched edge-triggered and never changed afterwards, so a connection costs one epoll_ctl(2) in its
//! life, and a socket that nobody can serve now (no credit, no receive buffer) does not wake anyone again.
//! The timer and the doorbell need not be read for the same reason.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
    timerfd::TimerFd,
};

/// The most events taken in at once.
const BATCH: usize = 64;

/// Names a connection for as long as it lives, and nothing afterwards: slots are used again, serials are not
/// soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Token {
    /// Where the connection is.
    pub(super) slot: u32,
    /// Which of those that were there.
    pub(super) serial: u32,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Clients wait to be accepted.
    Listener,
    /// The timer went off, or the doorbell was rung.
    Wakeup,
    /// A connection's socket changed.
    Socket(Token, EventSet),
}

const LISTENER: u64 = u64::MAX;
const WAKEUP: u64 = u64::MAX - 1;

/// See the module's description.
pub(super) struct Poller {
    epoll: Epoll,
    doorbell: EventFd,
    timer: TimerFd,
    armed: Option<Instant>,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let poller = Self {
            epoll: Epoll::new()?,
            doorbell: EventFd::new(EFD_NONBLOCK)?,
            timer: TimerFd::new().map_err(io::Error::from)?,
            armed: None,
        };
        poller.watch(poller.doorbell.as_raw_fd(), EventSet::IN, WAKEUP)?;
        poller.watch(poller.timer.as_raw_fd(), EventSet::IN, WAKEUP)?;
        Ok(poller)
    }

    /// The descriptor to wait on for all.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Watches a listening socket.
    pub(super) fn watch_listener(&self, fd: RawFd) -> io::Result<()> {
        self.watch(fd, EventSet::IN, LISTENER)
    }

    /// Watches a connection's socket, until it is closed.
    pub(super) fn watch_socket(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        self.watch(fd, events, (u64::from(token.serial) << 32) | u64::from(token.slot))
    }

    fn watch(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, data))
    }

    /// Makes the descriptor ready, for work that was put off.
    pub(super) fn ring(&self) -> io::Result<()> {
        self.doorbell.write(1)
    }

    /// Makes it ready at this time, or never.
    pub(super) fn wake_at(&mut self, at: Option<Instant>) -> io::Result<()> {
        if self.armed == at {
            return Ok(());
        }
        match at {
            // A timer of zero would be off. A millisecond more is as good as any.
            Some(at) => {
                let wait = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                self.timer.reset(wait, None).map_err(io::Error::from)?;
            }
            None => self.timer.clear().map_err(io::Error::from)?,
        }
        self.armed = at;
        Ok(())
    }

    /// What has happened since the last call, as far as it fits. Ready again at once when more did.
    pub(super) fn events(&mut self) -> io::Result<Vec<Event>> {
        let mut raw = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(0, &mut raw) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.ring()?;
                0
            }
            Err(error) => return Err(error),
        };
        let events = raw.iter().take(count).map(|event| match event.data() {
            LISTENER => Event::Listener,
            WAKEUP => Event::Wakeup,
            #[expect(clippy::cast_possible_truncation, reason = "the two halves of one number")]
            data => {
                Event::Socket(Token { slot: data as u32, serial: (data >> 32) as u32 }, event.event_set())
            }
        });
        Ok(events.collect())
    }
}
