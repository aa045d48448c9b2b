//! The kernel command line, put together from parts.

use linux_loader::cmdline::Cmdline;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::layout::{COMMAND_LINE, COMMAND_LINE_MAX};

/// A part of the command line that was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CommandLineError {
    /// Too long, or characters that a command line cannot hold.
    #[error("command line: adding {part:?} (at most {} bytes in all)", COMMAND_LINE_MAX - 1)]
    Part {
        /// The part that did not fit.
        part: String,
        /// What is wrong with it.
        #[source]
        source: linux_loader::cmdline::Error,
    },
    /// It could not be written into guest memory.
    #[error("writing the command line to guest memory")]
    Write(#[source] linux_loader::loader::Error),
}

/// A kernel command line that is never longer than what a kernel reads.
pub struct CommandLine(Cmdline);

impl CommandLine {
    /// An empty command line.
    ///
    /// # Errors
    /// Never for the length that is built in.
    pub fn new() -> Result<Self, CommandLineError> {
        Cmdline::new(COMMAND_LINE_MAX)
            .map(Self)
            .map_err(|source| CommandLineError::Part { part: String::new(), source })
    }

    /// Appends one or several parameters, as they would be typed. What follows ` -- ` goes to init.
    ///
    /// # Errors
    /// When the line would become too long, or `part` has characters other than printable ASCII.
    pub fn push(&mut self, part: &str) -> Result<(), CommandLineError> {
        let failed = |source| CommandLineError::Part { part: part.to_owned(), source };
        let (boot, init) = match part.split_once("-- ") {
            Some((boot, init)) if boot.is_empty() || boot.ends_with(' ') => (boot.trim(), init.trim()),
            _ => (part.trim(), ""),
        };
        if !boot.is_empty() {
            self.0.insert_str(boot).map_err(failed)?;
        }
        if !init.is_empty() {
            self.0.insert_init_args(init).map_err(failed)?;
        }
        Ok(())
    }

    /// Declares a virtio-mmio slot.
    ///
    /// # Errors
    /// When the line would become too long.
    pub fn push_mmio_slot(&mut self, base: u64, size: u64, gsi: u32) -> Result<(), CommandLineError> {
        self.0.add_virtio_mmio_device(size, GuestAddress(base), gsi, None).map_err(|source| {
            CommandLineError::Part { part: format!("virtio_mmio.device at {base:#x}"), source }
        })
    }

    pub(super) fn write(&self, mem: &GuestMemoryMmap<()>) -> Result<(), CommandLineError> {
        linux_loader::loader::load_cmdline(mem, GuestAddress(COMMAND_LINE), &self.0)
            .map_err(CommandLineError::Write)
    }

    /// Its length in bytes, without the terminating NUL.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.as_cstring().map_or(0, |line| line.as_bytes().len())
    }

    /// Whether nothing was added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &CommandLine) -> String {
        line.0.as_cstring().unwrap().into_string().unwrap()
    }

    #[test]
    fn keeps_the_order_and_ends_with_what_goes_to_init() {
        let mut line = CommandLine::new().unwrap();
        line.push("console=ttyS0 quiet").unwrap();
        line.push("root=/dev/vda -- single").unwrap();
        line.push_mmio_slot(0xd000_1000, 4096, 6).unwrap();
        assert_eq!(
            text(&line),
            "console=ttyS0 quiet root=/dev/vda virtio_mmio.device=4K@0xd0001000:6 -- single"
        );
    }

    #[test]
    fn a_double_dash_inside_a_word_is_not_a_separator() {
        let mut line = CommandLine::new().unwrap();
        line.push("a=b--c d").unwrap();
        assert_eq!(text(&line), "a=b--c d");
    }

    #[test]
    fn refuses_what_is_too_long_and_what_is_not_text() {
        let mut line = CommandLine::new().unwrap();
        line.push(&"x".repeat(COMMAND_LINE_MAX - 1)).unwrap();
        assert!(matches!(line.push("y"), Err(CommandLineError::Part { .. })));
        assert!(CommandLine::new().unwrap().push("new\nline").is_err());
    }
}
