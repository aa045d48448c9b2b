//! Plain system calls on a thread of their own.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Action, Completion, Operation, Step};
use crate::ThreadSetup;

/// Deep enough for a system call's frame; the worker allocates nothing on it.
const STACK: usize = 64 << 10;

#[derive(Default)]
struct State {
    waiting: VecDeque<Operation>,
    busy: bool,
    stop: bool,
    done: Vec<Completion>,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or the worker is to stop.
    work: Condvar,
    /// The worker has run out of work.
    idle: Condvar,
    /// What the worker is at is to end with the system call that it is in.
    cancelled: AtomicBool,
    event: EventFd,
    files: Vec<RawFd>,
}

impl Shared {
    /// The state; a worker that panicked has left it consistent, as it holds the lock only to move values.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(in super::super) struct SyncEngine {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

impl fmt::Debug for SyncEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SyncEngine").finish_non_exhaustive()
    }
}

impl SyncEngine {
    pub(super) fn new(files: &[RawFd], name: &str, setup: ThreadSetup) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
            cancelled: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            files: files.to_vec(),
        });
        let worker = thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn({
            let shared = shared.clone();
            move || {
                setup();
                work(&shared);
            }
        })?;
        Ok(Self { shared, worker: Some(worker) })
    }

    pub(super) fn event_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    pub(super) fn submit(&self, operation: Operation) {
        self.shared.lock().waiting.push_back(operation);
        self.shared.work.notify_one();
    }

    pub(super) fn completions(&self) -> Vec<Completion> {
        // Nothing to read is no error: the event may be spurious.
        let _ = self.shared.event.read();
        std::mem::take(&mut self.shared.lock().done)
    }

    pub(super) fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
        self.shared.lock().waiting.clear();
        self.drain();
        self.shared.cancelled.store(false, Ordering::Release);
    }

    pub(super) fn drain(&self) -> Vec<Completion> {
        let busy = |state: &mut State| state.busy || !state.waiting.is_empty();
        let state = self.shared.idle.wait_while(self.shared.lock(), busy);
        drop(state);
        self.completions()
    }
}

impl Drop for SyncEngine {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Release);
        self.shared.lock().stop = true;
        self.shared.work.notify_one();
        if let Some(worker) = self.worker.take() {
            // It has nothing to say, and its panic, if any, was reported when it happened.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared) {
    loop {
        let operation = {
            let mut state = shared.lock();
            loop {
                if state.stop {
                    return;
                }
                if let Some(operation) = state.waiting.pop_front() {
                    state.busy = true;
                    break operation;
                }
                state.busy = false;
                shared.idle.notify_all();
                state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let completion = Completion { tag: operation.tag, result: run(shared, operation) };
        shared.lock().done.push(completion);
        // The counter cannot overflow: it is reset by each read, and a full one is readable anyway.
        let _ = shared.event.write(1);
    }
}

/// Does all of one operation. The guest's buffers are let go of when it returns.
fn run(shared: &Shared, mut operation: Operation) -> io::Result<()> {
    let fd = *shared.files.get(operation.file).ok_or(io::ErrorKind::NotFound)?;
    while !shared.cancelled.load(Ordering::Acquire) {
        let result = call(fd, &operation);
        if let Step::Done(result) = operation.step(result) {
            return result;
        }
    }
    Err(io::Error::from_raw_os_error(libc::ECANCELED))
}

fn call(fd: RawFd, operation: &Operation) -> io::Result<usize> {
    let offset = i64::try_from(operation.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let piece = operation.piece();
    match &operation.action {
        Action::Read(data) => {
            vectored(libc::preadv2, fd, piece.as_ref().unwrap_or(data).as_iovecs(), offset, 0)
        }
        Action::Write { data, sync } => {
            let flags = if *sync { libc::RWF_DSYNC } else { 0 };
            vectored(libc::pwritev2, fd, piece.as_ref().unwrap_or(data).as_iovecs(), offset, flags)
        }
        Action::WriteZeros(zeros) => vectored(libc::pwritev2, fd, &zeros.0, offset, 0),
        // SAFETY: an open descriptor, no memory involved.
        Action::Flush => result(unsafe { libc::fdatasync(fd) } as isize),
        Action::Punch { len, .. } => fallocate(fd, punch, offset, *len),
        Action::Zero { len } => {
            fallocate(fd, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, *len)
        }
    }
}

type Vectored =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t, libc::c_int) -> isize;

fn vectored(
    call: Vectored,
    fd: RawFd,
    vecs: &[libc::iovec],
    offset: i64,
    flags: libc::c_int,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(vecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `vecs` are as many valid buffers, kept mapped by the operation that they are from.
    result(unsafe { call(fd, vecs.as_ptr(), count, offset, flags) })
}

fn fallocate(fd: RawFd, mode: libc::c_int, offset: i64, len: u64) -> io::Result<usize> {
    let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: an open descriptor, no memory involved.
    result(unsafe { libc::fallocate(fd, mode, offset, len) } as isize)
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_begun_is_given_up() {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
            cancelled: AtomicBool::new(true),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            files: vec![-1],
        };
        let flush = |tag| Operation { tag, file: 0, offset: 0, action: Action::Flush };
        let given_up = run(&shared, flush(0)).unwrap_err();
        assert_eq!(given_up.raw_os_error(), Some(libc::ECANCELED), "and not EBADF");
        // Nobody works on these.
        let engine = SyncEngine { shared: Arc::new(shared), worker: None };
        (0..3).for_each(|tag| engine.submit(flush(tag)));
        engine.cancel();
        assert!(engine.shared.lock().waiting.is_empty() && engine.completions().is_empty());
        assert!(!engine.shared.cancelled.load(Ordering::Acquire));
    }
}
