//! The process outside, and what the two sides say to one another.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use caisson_vmm_api::jail::SeccompMode;
use caps::{CapSet, Capability};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, pthread_sigmask, signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Gid, Pid, Uid},
};

use super::{Ids, JailError, descriptors, privileges, step};
use crate::seccomp;

/// How the inner process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(Signal),
}

impl Ended {
    /// Ends the calling process the same way.
    pub fn mirror(self) -> ! {
        let code = match self {
            Self::Code(code) => code,
            Self::Signal(sig) => {
                // None of this can fail for a signal that has just ended a process; if it does, the shell's
                // convention for such an end follows.
                // SAFETY: the default action is no handler that could do anything unsound.
                let _ = unsafe { signal(sig, SigHandler::SigDfl) };
                let _ = pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&SigSet::from(sig)), None);
                let _ = kill(Pid::this(), sig);
                128 + sig as i32
            }
        };
        std::process::exit(code)
    }
}

/// Makes a user namespace in which the calling user is root, and a PID namespace for its children.
pub(super) fn become_own_root() -> Result<(), JailError> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID)
        .map_err(step("making a user namespace (does this host allow that to users?)"))?;
    // Without this, the kernel has no unprivileged user map groups (user_namespaces(7)).
    write_file("/proc/self/setgroups", "deny")?;
    write_file("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write_file("/proc/self/gid_map", &format!("0 {gid} 1"))
}

/// Asks the parent to fill in the new user namespace, and waits until it has.
pub(super) fn ask_for_ids(link: &mut UnixStream) -> Result<(), JailError> {
    let gone = |_: io::Error| JailError::OtherSideGone;
    link.write_all(&[0]).map_err(gone)?;
    link.read_exact(&mut [0]).map_err(gone)
}

/// Has the kernel kill the calling process when the parent ends.
pub(super) fn die_with(link: &UnixStream) -> Result<(), JailError> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("tying the life to the parent's"))?;
    let mut fds = [PollFd::new(link.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO).map_err(step("looking for the parent"))? {
        0 => Ok(()),
        _ => Err(JailError::OtherSideGone),
    }
}

/// Serves the inner process, gives up every privilege, and waits for its end.
///
/// `mapped` are the ids that it wants to have mapped, `own` those that the parent itself is to take,
/// `remove` are files that go at the end.
pub(super) fn supervise(
    child: Pid,
    mut link: UnixStream,
    mapped: Option<Ids>,
    own: Option<Ids>,
    remove: &[PathBuf],
) -> Result<Ended, JailError> {
    let prepared = descriptors::close_all_but(&[], link.as_raw_fd())
        .and_then(|()| mapped.map_or(Ok(()), |ids| map_ids(child, &mut link, ids)))
        .and_then(|()| confine(own, !remove.is_empty()));
    if prepared.is_err() {
        // It must not go on with a parent that is not one. It may be gone already.
        let _ = kill(child, Signal::SIGKILL);
    }
    let ended = wait(child);
    for path in remove {
        // Someone else may have removed it already.
        let _ = fs::remove_file(path);
    }
    prepared.and(ended)
}

/// Waits for the request and writes the maps. An inner process that ended before it asked is none of our
/// errors.
fn map_ids(child: Pid, link: &mut UnixStream, ids: Ids) -> Result<(), JailError> {
    if link.read_exact(&mut [0]).is_err() {
        return Ok(());
    }
    let Ids { uid, gid, count } = ids;
    write_file(&format!("/proc/{child}/uid_map"), &format!("0 {uid} {count}"))?;
    write_file(&format!("/proc/{child}/gid_map"), &format!("0 {gid} {count}"))?;
    link.write_all(&[0]).map_err(|_| JailError::OtherSideGone)
}

/// The same walls as inside, as far as they make sense for a process that only waits. No Landlock: the kernel
/// would keep the signal that ends the inner process within its limits. Its user is the inner one's, whom it
/// could therefore signal; the reverse is not so, as the inner one cannot even name it.
fn confine(own: Option<Ids>, removes: bool) -> Result<(), JailError> {
    let ids = own.map(|ids| (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid)));
    // Who is not root owns what it made.
    // Root that gave up its user is a stranger to the directory: it must be let in, and past a sticky bit.
    let remover = [Capability::CAP_DAC_OVERRIDE, Capability::CAP_FOWNER];
    let keep: &[Capability] = if removes && own.is_some() { &remover } else { &[] };
    privileges::drop_all(ids, keep)?;
    caps::set(None, CapSet::Effective, &keep.iter().copied().collect()).map_err(JailError::Capabilities)?;
    seccomp::apply(seccomp::Thread::Supervisor, SeccompMode::Kill).map_err(JailError::Seccomp)
}

/// The signals by which the process outside is told to end.
const TOLD_TO_END: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Blocks the signals that the parent waits for, and returns which were blocked before.
pub(super) fn hold_signals() -> Result<SigSet, JailError> {
    awaited().thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(step("blocking signals"))
}

fn awaited() -> SigSet {
    TOLD_TO_END.into_iter().chain([Signal::SIGCHLD]).collect()
}

/// Waits for the end of the inner process, and brings it about when this one is told to end. The signals are
/// blocked ([`hold_signals`]).
fn wait(child: Pid) -> Result<Ended, JailError> {
    let signals = awaited();
    let mut told = None;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(told.map_or(Ended::Code(code), Ended::Signal)),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Ended::Signal(told.unwrap_or(signal))),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(step("waiting for the inner process")(errno)),
        }
        if let Ok(signal) = signals.wait()
            && TOLD_TO_END.contains(&signal)
        {
            told = Some(signal);
            // It may have ended by itself just now.
            let _ = kill(child, Signal::SIGKILL);
        }
    }
}

/// Writes all of a file of the kernel's in one go, as it wants it.
fn write_file(path: &str, content: &str) -> Result<(), JailError> {
    let written =
        fs::File::options().write(true).open(path).and_then(|mut f| f.write_all(content.as_bytes()));
    written.map_err(|source| JailError::Path { path: path.into(), source })
}
