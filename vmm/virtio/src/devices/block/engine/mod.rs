//! What does the reading and writing: a worker thread or io_uring, behind one interface.
//!
//! An engine owns every operation, and with it the guest's buffers, from [`submit`](Engine::submit) to its
//! completion, whatever becomes of the device meanwhile.

mod sync;
mod uring;

use std::{io, os::fd::RawFd};

use caisson_vmm_api::devices::IoEngine;

use self::{sync::SyncEngine, uring::UringEngine};
use crate::{
    ThreadSetup,
    buffers::{GuestBuffers, MAX_BUFFERS},
};

/// The most that is read or written by one system call. A request may be as long as 4 GiB, by naming the same
/// memory over and over; a reset waits for the piece that is on its way, and no longer.
const PIECE: usize = 2 << 20;

/// Bytes of zeros to write when the host cannot make them itself.
const ZEROS: [u8; 16 << 10] = [0; 16 << 10];

/// What to do.
#[derive(Debug)]
pub(super) enum Action {
    /// Fill the buffers from the file.
    Read(GuestBuffers),
    /// Write the buffers to the file; with `sync`, all the way to the disk.
    Write { data: GuestBuffers, sync: bool },
    /// Bring what was written to the disk.
    Flush,
    /// Give the space of so many bytes back; they read as zeros.
    Punch { len: u64, required: bool },
    /// Make so many bytes zeros.
    Zero { len: u64 },
    /// Write so many bytes of zeros, for hosts and files that cannot do [`Zero`](Self::Zero).
    WriteZeros(ZeroBuffers),
}

/// One thing to do to one file.
#[derive(Debug)]
pub(super) struct Operation {
    /// Handed back in the completion.
    pub(super) tag: usize,
    /// The file's index.
    pub(super) file: usize,
    /// Where in the file, in bytes.
    pub(super) offset: u64,
    pub(super) action: Action,
}

/// An operation has ended.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) tag: usize,
    pub(super) result: io::Result<()>,
}

/// What to do after a step of an operation.
enum Step {
    Done(io::Result<()>),
    /// Not all of it is done: once more, with what is left.
    Again,
}

impl Operation {
    /// What of the guest's memory the next system call is about, if that is not all of it.
    fn piece(&self) -> Option<GuestBuffers> {
        match &self.action {
            Action::Read(data) | Action::Write { data, .. } if data.len() > PIECE => Some(data.head(PIECE)),
            _ => None,
        }
    }

    /// Takes in what a system call for this operation returned.
    fn step(&mut self, result: io::Result<usize>) -> Step {
        let n = match result {
            Ok(n) => n,
            Err(error) => return self.step_failed(error),
        };
        let left = match &mut self.action {
            Action::Read(data) | Action::Write { data, .. } => {
                data.advance(n);
                data.len()
            }
            Action::WriteZeros(zeros) => {
                zeros.advance(n);
                zeros.len()
            }
            Action::Flush | Action::Punch { .. } | Action::Zero { .. } => return Step::Done(Ok(())),
        };
        match (left, n) {
            (0, _) => Step::Done(Ok(())),
            // The file is shorter than it was when the disk was made.
            (_, 0) => Step::Done(Err(io::ErrorKind::UnexpectedEof.into())),
            _ => {
                self.offset = self.offset.saturating_add(n as u64);
                Step::Again
            }
        }
    }

    fn step_failed(&mut self, error: io::Error) -> Step {
        match (error.raw_os_error(), &self.action) {
            (Some(libc::EINTR | libc::EAGAIN), _) => Step::Again,
            // A discard is advice; a host that cannot follow it has not failed.
            (Some(libc::EOPNOTSUPP), Action::Punch { required: false, .. }) => Step::Done(Ok(())),
            (Some(libc::EOPNOTSUPP), &(Action::Punch { len, .. } | Action::Zero { len })) => {
                self.action = Action::WriteZeros(ZeroBuffers::new(len));
                Step::Again
            }
            _ => Step::Done(Err(error)),
        }
    }
}

/// Buffers of zeros for a vectored write.
#[derive(Debug)]
pub(super) struct ZeroBuffers(Vec<libc::iovec>);

// SAFETY: the pointers are to a constant.
unsafe impl Send for ZeroBuffers {}

impl ZeroBuffers {
    /// At most [`MAX_BUFFERS`] × 16 KiB, what the longest write-zeroes range comes to.
    fn new(len: u64) -> Self {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut vecs = Vec::new();
        while left > 0 && vecs.len() < MAX_BUFFERS {
            let iov_len = left.min(ZEROS.len());
            vecs.push(libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len });
            left -= iov_len;
        }
        Self(vecs)
    }

    fn len(&self) -> usize {
        self.0.iter().map(|vec| vec.iov_len).sum()
    }

    fn advance(&mut self, n: usize) {
        let left = self.len().saturating_sub(n);
        *self = Self::new(left as u64);
    }
}

/// The engine of one disk.
#[derive(Debug)]
pub(super) enum Engine {
    Sync(SyncEngine),
    Uring(Box<UringEngine>),
}

impl Engine {
    /// Starts one. `files` must stay open for as long as the engine lives. A thread that it starts is called `name` and
    /// begins with `setup`.
    pub(super) fn new(kind: IoEngine, files: &[RawFd], name: &str, setup: ThreadSetup) -> io::Result<Self> {
        match kind {
            IoEngine::Sync => SyncEngine::new(files, name, setup).map(Self::Sync),
            IoEngine::IoUring => UringEngine::new(files).map(Box::new).map(Self::Uring),
        }
    }

    /// Readable when there are completions.
    pub(super) fn event_fd(&self) -> RawFd {
        match self {
            Self::Sync(engine) => engine.event_fd(),
            Self::Uring(engine) => engine.event_fd(),
        }
    }

    /// Takes an operation on.
    pub(super) fn submit(&mut self, operation: Operation) {
        match self {
            Self::Sync(engine) => engine.submit(operation),
            Self::Uring(engine) => engine.submit(operation),
        }
    }

    /// Starts what was taken on.
    pub(super) fn flush_submissions(&mut self) -> io::Result<()> {
        match self {
            Self::Sync(_) => Ok(()),
            Self::Uring(engine) => engine.flush_submissions(),
        }
    }

    /// All completions so far.
    pub(super) fn completions(&mut self) -> io::Result<Vec<Completion>> {
        match self {
            Self::Sync(engine) => Ok(engine.completions()),
            Self::Uring(engine) => engine.completions(),
        }
    }

    /// Gives up what is not on its way, and waits for what is. None of it is reported any more.
    pub(super) fn cancel(&mut self) -> io::Result<()> {
        match self {
            Self::Sync(engine) => {
                engine.cancel();
                Ok(())
            }
            Self::Uring(engine) => engine.cancel(),
        }
    }

    /// Waits until nothing is in flight; all completions that were not fetched yet.
    pub(super) fn drain(&mut self) -> io::Result<Vec<Completion>> {
        match self {
            Self::Sync(engine) => Ok(engine.drain()),
            Self::Uring(engine) => engine.drain(),
        }
    }
}
