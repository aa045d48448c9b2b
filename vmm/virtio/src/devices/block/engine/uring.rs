//! io_uring(7), one ring a disk.
//!
//! A ring is a way around a seccomp filter, so each is locked down before its first use: it accepts reading,
//! writing, syncing and allocating, on the disk's own files, and nothing else, for good.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsRawFd, RawFd},
};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Action, Completion, Operation, Step};
use crate::buffers::GuestBuffers;

/// Operations in the kernel at a time. The completion queue holds twice as many, so it cannot overflow.
const DEPTH: u32 = 128;

pub(in super::super) struct UringEngine {
    ring: IoUring,
    event: EventFd,
    /// What the kernel works on, by the index that it returns. The kernel reads the iovecs of an operation
    /// from where they are, so one stays in its place until it is complete.
    slots: Vec<Option<Started>>,
    free: Vec<usize>,
    /// What has found no slot yet.
    backlog: VecDeque<Operation>,
    /// What is left of an operation is not to be begun.
    cancelled: bool,
}

/// An operation in the kernel, and the part of its buffers that it is about.
struct Started {
    operation: Operation,
    piece: Option<GuestBuffers>,
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine").finish_non_exhaustive()
    }
}

impl UringEngine {
    pub(super) fn new(files: &[RawFd]) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(DEPTH)?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_files(files)?;
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        let depth = usize::try_from(DEPTH).unwrap_or(usize::MAX);
        let slots = std::iter::repeat_with(|| None).take(depth).collect();
        Ok(Self {
            ring,
            event,
            slots,
            free: (0..depth).collect(),
            backlog: VecDeque::new(),
            cancelled: false,
        })
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub(super) fn submit(&mut self, operation: Operation) {
        match self.free.pop() {
            Some(slot) => self.start(slot, operation),
            None => self.backlog.push_back(operation),
        }
    }

    pub(super) fn flush_submissions(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    pub(super) fn completions(&mut self) -> io::Result<Vec<Completion>> {
        // Nothing to read is no error: the event may be spurious.
        let _ = self.event.read();
        let mut done = Vec::new();
        // Starting what is left of an operation may complete it on the spot.
        while self.reap(&mut done) {
            self.enter(0)?;
        }
        Ok(done)
    }

    pub(super) fn cancel(&mut self) -> io::Result<()> {
        self.backlog.clear();
        self.cancelled = true;
        let drained = self.drain();
        self.cancelled = false;
        drained.map(|_| ())
    }

    pub(super) fn drain(&mut self) -> io::Result<Vec<Completion>> {
        let mut done = self.completions()?;
        while self.free.len() < self.slots.len() {
            self.enter(1)?;
            self.reap(&mut done);
        }
        let _ = self.event.read();
        Ok(done)
    }

    /// Fetches completions; whether something is to be submitted because of them.
    fn reap(&mut self, done: &mut Vec<Completion>) -> bool {
        let entries: Vec<_> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        let mut submit = false;
        for (user_data, result) in entries {
            let Some((slot, Started { mut operation, .. })) = usize::try_from(user_data)
                .ok()
                .and_then(|slot| Some((slot, self.slots.get_mut(slot)?.take()?)))
            else {
                continue;
            };
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            match operation.step(result) {
                Step::Again if !self.cancelled => {
                    self.start(slot, operation);
                    submit = true;
                }
                step => {
                    let result = match step {
                        Step::Done(result) => result,
                        Step::Again => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
                    };
                    done.push(Completion { tag: operation.tag, result });
                    match self.backlog.pop_front() {
                        Some(next) => {
                            self.start(slot, next);
                            submit = true;
                        }
                        None => self.free.push(slot),
                    }
                }
            }
        }
        submit
    }

    /// Puts an operation into a slot and on the submission queue, which has room for all slots.
    fn start(&mut self, slot: usize, operation: Operation) {
        let Some(place) = self.slots.get_mut(slot) else {
            return;
        };
        let piece = operation.piece();
        let entry = entry(place.insert(Started { operation, piece })).user_data(slot as u64);
        // SAFETY: the operation keeps its buffers and their iovecs in place until its completion is reaped,
        // and the ring is drained before the slots are dropped.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "the queue has an entry for each slot");
    }

    /// Hands over what is queued, and waits for `want` completions.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        if self.cancel().is_err() {
            // The kernel may still write to the buffers; their memory is leaked rather than reused.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

fn entry(started: &Started) -> squeue::Entry {
    let Started { operation, piece } = started;
    let file = types::Fixed(u32::try_from(operation.file).unwrap_or(u32::MAX));
    let offset = operation.offset;
    let len = |vecs: &[libc::iovec]| u32::try_from(vecs.len()).unwrap_or(0);
    match &operation.action {
        Action::Read(data) => {
            let vecs = piece.as_ref().unwrap_or(data).as_iovecs();
            opcode::Readv::new(file, vecs.as_ptr(), len(vecs)).offset(offset).build()
        }
        Action::Write { data, sync } => {
            let vecs = piece.as_ref().unwrap_or(data).as_iovecs();
            let flags = if *sync { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(file, vecs.as_ptr(), len(vecs)).offset(offset).rw_flags(flags).build()
        }
        Action::WriteZeros(zeros) => {
            opcode::Writev::new(file, zeros.0.as_ptr(), len(&zeros.0)).offset(offset).build()
        }
        Action::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        Action::Punch { len, .. } => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(file, *len).offset(offset).mode(mode).build()
        }
        Action::Zero { len } => {
            let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(file, *len).offset(offset).mode(mode).build()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::{super::ZeroBuffers, *};

    #[test]
    fn what_was_not_begun_is_given_up() {
        let file = tempfile::tempfile().unwrap();
        let count = usize::try_from(DEPTH).unwrap() + 50;
        file.write_all_at(&vec![7; count], 0).unwrap();
        let mut engine = UringEngine::new(&[file.as_raw_fd()]).unwrap();
        for tag in 0..count {
            let action = Action::WriteZeros(ZeroBuffers::new(1));
            engine.submit(Operation { tag, file: 0, offset: tag as u64, action });
        }
        engine.cancel().unwrap();
        assert!(engine.completions().unwrap().is_empty());
        let mut bytes = vec![0; count];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().skip(count - 50).all(|byte| *byte == 7), "these had not been begun");
        assert!(bytes.iter().take(count - 50).all(|byte| *byte == 0), "these were on their way");
        engine.submit(Operation { tag: 9, file: 0, offset: 0, action: Action::Flush });
        let tags: Vec<_> = engine.drain().unwrap().iter().map(|done| done.tag).collect();
        assert_eq!(tags, [9]);
    }
}
