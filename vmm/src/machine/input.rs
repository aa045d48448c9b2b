//! What is typed on the console: from a descriptor of the host to the guest's serial port, no faster than the
//! guest reads it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsRawFd,
    sync::Arc,
};

use vmm_sys_util::epoll::EventSet;

use super::poller::{Poller, Token};
use crate::devices::serial::Console;

/// As much as the serial port holds.
const CHUNK: usize = 64;

/// The sender of a console's input.
///
/// The descriptor is watched only while nothing that came from it is left over: input that the guest does not
/// take stays with whoever sends it, and nobody is woken for it.
pub(super) struct ConsoleInput {
    source: File,
    poller: Arc<Poller>,
    watched: bool,
    /// Read, and not taken by the guest yet.
    left: Vec<u8>,
}

impl ConsoleInput {
    /// Feeds `console` from `source`, by events of `poller`.
    ///
    /// # Errors
    /// When `source` is of a kind that cannot be watched, such as a regular file.
    pub(super) fn attach(source: File, console: &Console, poller: Arc<Poller>) -> io::Result<Self> {
        let mut input = Self { source, poller, watched: false, left: Vec::new() };
        input.watch(true)?;
        let room = console.watch_room()?;
        input.poller.add(room, EventSet::IN, Token::ConsoleRoom)?;
        Ok(input)
    }

    /// Something was typed.
    pub(super) fn readable(&mut self, console: &Console) {
        let mut chunk = [0; CHUNK];
        match self.source.read(&mut chunk) {
            Ok(count @ 1..) => self.left.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The end of the input, or of whoever sent it.
            Ok(_) | Err(_) => {
                let _ = self.watch(false);
                return;
            }
        }
        self.feed(console);
    }

    /// The guest has read what it had, or begins to listen.
    pub(super) fn room(&mut self, console: &Console) {
        console.take_room();
        self.feed(console);
    }

    fn feed(&mut self, console: &Console) {
        // At its end the source is never watched again, and there is nothing left over then either.
        let had = !self.left.is_empty();
        let taken = console.input(&self.left);
        self.left.drain(..taken.min(self.left.len()));
        if had && let Err(error) = self.watch(self.left.is_empty()) {
            tracing::warn!(%error, "console input stopped");
        }
    }

    fn watch(&mut self, wanted: bool) -> io::Result<()> {
        let fd = self.source.as_raw_fd();
        match (self.watched, wanted) {
            (false, true) => self.poller.add(fd, EventSet::IN, Token::ConsoleInput)?,
            (true, false) => self.poller.remove(fd),
            _ => {}
        }
        self.watched = wanted;
        Ok(())
    }
}

impl Drop for ConsoleInput {
    fn drop(&mut self) {
        let _ = self.watch(false);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::devices::serial::{ConsoleSink, SERIAL_PORT};
    use caisson_virtio::mmio::IrqLine;

    struct NoLine;

    impl IrqLine for NoLine {
        fn pulse(&self) {}
    }

    fn read_byte(console: &Console) -> Option<u8> {
        let mut status = [0];
        console.read(SERIAL_PORT + 5, &mut status);
        let mut byte = [0];
        console.read(SERIAL_PORT, &mut byte);
        (status[0] & 1 != 0).then_some(byte[0])
    }

    /// What the poller says is done, until it says nothing.
    fn settle(poller: &Poller, input: &mut ConsoleInput, console: &Console) {
        loop {
            let ready = poller.wait(0).unwrap();
            if ready.is_empty() {
                return;
            }
            for (token, _) in ready {
                match token {
                    Token::ConsoleInput => input.readable(console),
                    Token::ConsoleRoom => input.room(console),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn nothing_is_lost_and_nothing_spins() {
        let poller = Arc::new(Poller::new().unwrap());
        let console = Console::new(Arc::new(NoLine), ConsoleSink::new(None, 0));
        let (reader, mut writer) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        let mut input = ConsoleInput::attach(file, &console, poller.clone()).unwrap();
        let typed: Vec<u8> = (0..=255).cycle().take(1000).collect();
        writer.write_all(&typed).unwrap();

        // A guest whose driver does not listen yet gets nothing, and the event loop rests.
        settle(&poller, &mut input, &console);
        assert_eq!(read_byte(&console), None);
        console.write(SERIAL_PORT + 1, &[1]);
        let mut got = Vec::new();
        for _ in 0..100 {
            settle(&poller, &mut input, &console);
            got.extend(std::iter::from_fn(|| read_byte(&console)));
        }
        assert_eq!(got, typed);

        drop(writer);
        settle(&poller, &mut input, &console);
        assert_eq!(poller.wait(0).unwrap(), [], "the end of the input is seen once");
    }

    #[test]
    fn a_regular_file_is_refused() {
        let poller = Arc::new(Poller::new().unwrap());
        let console = Console::new(Arc::new(NoLine), ConsoleSink::new(None, 0));
        let file = tempfile::tempfile().unwrap();
        assert!(ConsoleInput::attach(file, &console, poller).is_err());
    }
}
