//! The threads that serve requests.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use nix::sys::{
    resource::{Resource, getrlimit},
    signal::{SigSet, Signal},
};

use super::{config::spare_descriptors, passthrough::sys};
use crate::ThreadSetup;

/// Requests are decoded on the heap; this is for the frames.
const STACK: usize = 256 << 10;

/// Something to do on a worker.
pub(super) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// This process's `/proc/self/fd`.
    descriptors: OwnedFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that serve the requests of any number of shared directories.
///
/// They are apart from the devices because a jailed main thread can make no thread that may do more than
/// itself: start them inside the jail's namespaces and ids, before the main thread installs its own filter
/// and drops the capabilities that only these keep. Each has a working directory and a file mode creation
/// mask of its own.
pub struct Workers {
    shared: Arc<Shared>,
    spare: usize,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `count` threads. `descriptors` is `/proc/self/fd` of this very process (not of a parent),
    /// opened with `O_PATH | O_DIRECTORY`: the way from a descriptor that only names a file to one that reads
    /// it. Each thread does `setup` last before it serves anything.
    ///
    /// # Errors
    /// When a thread cannot be started, or not be set up.
    pub fn start(count: usize, descriptors: OwnedFd, setup: ThreadSetup) -> io::Result<Arc<Self>> {
        // Now, as a jailed main thread cannot ask any more.
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let spare = spare_descriptors(usize::try_from(limit).unwrap_or(usize::MAX));
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), descriptors });
        let mut workers = Self { shared: shared.clone(), spare, threads: Vec::with_capacity(count) };
        for _ in 0..count.max(1) {
            let shared = shared.clone();
            let (ready, result) = mpsc::sync_channel(1);
            let start = move || {
                let set_up = ignore_file_size_limit()
                    .and_then(|()| sys::private_directory(shared.descriptors.as_fd()));
                let failed = set_up.is_err();
                // Whoever started this thread waits for it.
                let _ = ready.send(set_up);
                drop(ready);
                if !failed {
                    setup();
                    work(&shared);
                }
            };
            workers.threads.push(thread::Builder::new().name("fs".into()).stack_size(STACK).spawn(start)?);
            result.recv().map_err(io::Error::other)??;
        }
        Ok(Arc::new(workers))
    }

    /// `/proc/self/fd`.
    pub(super) fn descriptors(&self) -> BorrowedFd<'_> {
        self.shared.descriptors.as_fd()
    }

    /// How many descriptors guests may hold of what this process may have open.
    pub(super) fn spare_descriptors(&self) -> usize {
        self.spare
    }

    pub(super) fn submit(&self, job: Job) {
        self.shared.lock().waiting.push_back(job);
        self.shared.work.notify_one();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // The last device may be dropped by a job of its own, on one of these.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// A guest that writes past RLIMIT_FSIZE is to get EFBIG, and this process no signal that ends it.
fn ignore_file_size_limit() -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    Ok(signals.thread_block()?)
}

fn work(shared: &Shared) {
    loop {
        let waiting = |state: &mut State| state.waiting.is_empty() && !state.stop;
        let mut state =
            shared.work.wait_while(shared.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
        let Some(job) = state.waiting.pop_front() else { return };
        drop(state);
        job();
    }
}
