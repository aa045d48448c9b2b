//! The descriptors that the event loop watches, and what each is watched for.

use std::{io, os::fd::RawFd, sync::Arc};

use caisson_virtio::{PollSource, mmio::Watcher};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// What a descriptor is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The machine has ended.
    Exit,
    /// A controller wants to connect.
    Listener,
    /// A controller has sent something.
    Controller(u32),
    /// Someone types on the console.
    ConsoleInput,
    /// The guest has read what was typed.
    ConsoleRoom,
    /// The driver of the device in this slot notified this queue.
    Queue {
        /// The slot.
        slot: u8,
        /// The queue.
        queue: u16,
    },
    /// A poll source of the device in this slot is ready.
    Source {
        /// The slot.
        slot: u8,
        /// The source's token.
        token: u32,
    },
}

impl Token {
    /// Kind in the top byte, slot below it, number in the lower half.
    fn encode(self) -> u64 {
        let pack =
            |kind: u64, slot: u8, number: u32| (kind << 56) | (u64::from(slot) << 48) | u64::from(number);
        match self {
            Self::Exit => pack(0, 0, 0),
            Self::Listener => pack(1, 0, 0),
            Self::Controller(number) => pack(2, 0, number),
            Self::ConsoleInput => pack(3, 0, 0),
            Self::Queue { slot, queue } => pack(4, slot, u32::from(queue)),
            Self::Source { slot, token } => pack(5, slot, token),
            Self::ConsoleRoom => pack(6, 0, 0),
        }
    }

    fn decode(data: u64) -> Option<Self> {
        let [kind, slot, _, _, rest @ ..] = data.to_be_bytes();
        let number = u32::from_be_bytes(rest);
        Some(match kind {
            0 => Self::Exit,
            1 => Self::Listener,
            2 => Self::Controller(number),
            3 => Self::ConsoleInput,
            4 => Self::Queue { slot, queue: u16::try_from(number).ok()? },
            5 => Self::Source { slot, token: number },
            6 => Self::ConsoleRoom,
            _ => return None,
        })
    }
}

/// The set of watched descriptors. Any thread may change it while the event loop waits.
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()? })
    }

    /// Watches `fd`.
    ///
    /// # Errors
    /// When it cannot be watched, or is watched already.
    pub fn add(&self, fd: RawFd, events: EventSet, token: Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token.encode()))
    }

    /// Stops watching `fd`. One that is not watched is no error: whoever removes it wants it gone.
    pub fn remove(&self, fd: RawFd) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// Waits for events, at most `timeout` milliseconds (-1: without end).
    ///
    /// # Errors
    /// When waiting fails for another reason than a signal.
    pub fn wait(&self, timeout: i32) -> io::Result<Vec<(Token, EventSet)>> {
        let mut ready = [EpollEvent::default(); 32];
        let count = match self.epoll.wait(timeout, &mut ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        let known = ready.iter().take(count);
        Ok(known.filter_map(|event| Some((Token::decode(event.data())?, event.event_set()))).collect())
    }
}

/// Watches the poll sources of the device in one slot.
pub struct SlotWatcher {
    /// The slot.
    pub slot: u8,
    /// Where they are watched.
    pub poller: Arc<Poller>,
}

impl Watcher for SlotWatcher {
    fn watch(&self, sources: &[PollSource]) -> io::Result<()> {
        for source in sources {
            let token = Token::Source { slot: self.slot, token: source.token };
            self.poller.add(source.fd, source.events, token)?;
        }
        Ok(())
    }

    fn unwatch(&self, sources: &[PollSource]) {
        for source in sources {
            self.poller.remove(source.fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Exit,
            Token::Listener,
            Token::Controller(u32::MAX),
            Token::ConsoleInput,
            Token::ConsoleRoom,
            Token::Queue { slot: 255, queue: u16::MAX },
            Token::Source { slot: 7, token: u32::MAX },
        ] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
        assert_eq!(Token::decode(u64::MAX), None);
    }

    #[test]
    fn a_removed_descriptor_is_silent() {
        use std::os::fd::AsRawFd;
        let poller = Poller::new().unwrap();
        let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        poller.add(event.as_raw_fd(), EventSet::IN, Token::Exit).unwrap();
        event.write(1).unwrap();
        assert_eq!(poller.wait(0).unwrap(), [(Token::Exit, EventSet::IN)]);
        poller.remove(event.as_raw_fd());
        poller.remove(event.as_raw_fd());
        assert_eq!(poller.wait(0).unwrap(), []);
    }
}
