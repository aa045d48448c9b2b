//! How this process begins, whatever it then is: what the standard library's entry would have done.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};

use nix::fcntl::{OFlag, open};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;

/// Makes sure that no file that is opened becomes a standard stream, and that nobody who stops reading ends the process.
/// To be called first, while there is one thread.
pub fn prepare() {
    // The lowest free number is taken. Without a null device, as before there is a /dev, nothing can be done about it.
    while let Ok(null) = open("/dev/null", OFlag::O_RDWR, Mode::empty()) {
        if null.as_raw_fd() > 2 {
            break;
        }
        let _ = null.into_raw_fd();
    }
    // SAFETY: no handler is installed.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
}

/// Open files that a program may allow itself: the kernel's default of fs.nr_open, beyond which no limit goes.
const DESCRIPTORS: rlim_t = 1 << 20;
/// Open files that a program starts with. More is for those that ask: select(2) can not watch more, and some close
/// each number up to the limit.
const PROGRAMS_DESCRIPTORS: rlim_t = 1024;

/// Raises this process's limits, and with them those that programs inherit which are given none of their own.
///
/// The kernel starts a machine's first process with 4,096 open files at most, and a number of processes and of pending
/// signals that goes by the machine's memory. On a node a container has what a service manager gives its runtime, with
/// the node's own memory behind it. So PID 1 allows 2^20 open files and leaves processes and signals to the control
/// groups. The other limits are the kernel's: no core files unless a program raises that (to whatever it likes), 8 MiB
/// of locked memory and of stack.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_limits(is_init: bool) -> io::Result<()> {
    let (_, mut descriptors) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if is_init {
        descriptors = DESCRIPTORS;
        for resource in [Resource::RLIMIT_NPROC, Resource::RLIMIT_SIGPENDING] {
            setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY)?;
        }
    }
    // A process with three streams costs the agent eight.
    Ok(setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?)
}

/// Gives a program that is about to be executed the limit of open files that it shall start with. Safe between a fork
/// and the execution.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn lower_limits() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard.min(PROGRAMS_DESCRIPTORS), hard)?)
}
