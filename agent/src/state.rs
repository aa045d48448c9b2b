//! What all services share.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_protocol::limits::EVENT_RING;
use caisson_protocol::v1::{Event, Fault, Policy, event};
use tokio::sync::watch;
use tonic::Status;

use crate::clock;
use crate::log::Lines;
use crate::reaper::Reaper;
use crate::ring::Ring;
use crate::streams::Registry;

/// Faults that `Health` tells.
const MAX_FAULTS: usize = 16;

/// The agent's state. One for each process, shared by all tasks.
pub struct State {
    /// Directory of mounts and run-time state.
    pub root: PathBuf,
    /// Whether this process is PID 1 of its machine.
    pub is_init: bool,
    /// Reaps all children.
    pub reaper: Reaper,
    /// Byte streams.
    pub streams: Registry,
    /// Kept log lines.
    pub lines: Arc<Lines>,
    /// Kept events.
    pub events: Ring<Event>,
    /// CLOCK_BOOTTIME at the start of main, in microseconds.
    pub started_us: u64,
    /// CLOCK_BOOTTIME when the agent began to listen, in microseconds; 0 before.
    pub listening_us: AtomicU64,
    /// Set once a shutdown has begun: whether to reboot, and how long processes get, in milliseconds.
    pub shutdown: watch::Sender<Option<Shutdown>>,
    /// Set when nothing will happen any more: streams end after what they have not sent yet.
    pub closing: watch::Sender<bool>,
    /// What had to be removed before the end has been.
    pub emptied: watch::Sender<bool>,
    degraded: AtomicBool,
    faults: Mutex<VecDeque<String>>,
    policy: Mutex<Policy>,
    epoch: Mutex<Vec<u8>>,
}

/// How the machine shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// Start again instead of powering off.
    pub reboot: bool,
    /// Milliseconds between SIGTERM and SIGKILL.
    pub grace_ms: u32,
}

impl State {
    /// A fresh state.
    ///
    /// # Errors
    /// When no random epoch can be drawn.
    pub fn new(root: &Path, is_init: bool, reaper: Reaper, lines: Arc<Lines>) -> io::Result<State> {
        Ok(State {
            root: root.to_owned(),
            is_init,
            reaper,
            streams: Registry::default(),
            lines,
            events: Ring::new(EVENT_RING),
            started_us: clock::boottime_us(),
            listening_us: AtomicU64::new(0),
            shutdown: watch::Sender::new(None),
            closing: watch::Sender::new(false),
            emptied: watch::Sender::new(false),
            degraded: AtomicBool::new(false),
            faults: Mutex::default(),
            policy: Mutex::default(),
            epoch: Mutex::new(random(16)?),
        })
    }

    /// Tells everyone who follows the events.
    pub fn emit(&self, kind: event::Kind) {
        self.events.push(|sequence| Event { sequence, time_ns: clock::realtime_ns(), kind: Some(kind) });
    }

    /// Records that something of the agent's own broke, and tells the host.
    pub fn fault(&self, component: &str, message: String) {
        self.degraded.store(true, Ordering::Release);
        {
            let mut faults = lock(&self.faults);
            if faults.len() == MAX_FAULTS {
                faults.pop_front();
            }
            faults.push_back(format!("{component}: {message}"));
        }
        self.emit(event::Kind::Fault(Fault { component: component.to_owned(), message }));
    }

    /// The last faults, oldest first; none when the agent is well.
    pub fn faults(&self) -> Vec<String> {
        lock(&self.faults).iter().cloned().collect()
    }

    /// Whether there was a fault.
    pub fn is_degraded(&self) -> bool {
        self.degraded.load(Ordering::Acquire)
    }

    /// What the node's policy forbids now.
    pub fn policy(&self) -> Policy {
        *lock(&self.policy)
    }

    /// Adds to what is forbidden; nothing is ever allowed again.
    pub fn restrict(&self, by: &Policy) -> Policy {
        let mut policy = lock(&self.policy);
        policy.deny_exec |= by.deny_exec;
        policy.deny_copy |= by.deny_copy;
        policy.deny_port_forward |= by.deny_port_forward;
        *policy
    }

    /// Names this run of the agent; see the protocol's `VersionResponse`.
    pub fn epoch(&self) -> Vec<u8> {
        lock(&self.epoch).clone()
    }

    /// Begins a new epoch.
    ///
    /// # Errors
    /// When none can be drawn.
    pub fn renew_epoch(&self) -> io::Result<Vec<u8>> {
        let epoch = random(16)?;
        lock(&self.epoch).clone_from(&epoch);
        Ok(epoch)
    }

    /// Refuses verbs that change something once a shutdown has begun.
    ///
    /// # Errors
    /// ABORTED.
    #[allow(clippy::result_large_err)] // Status is what every service returns.
    pub fn accepting(&self) -> Result<(), Status> {
        match *self.shutdown.borrow() {
            None => Ok(()),
            Some(_) => Err(Status::aborted("the agent is shutting down")),
        }
    }
}

/// `size` bytes of the kernel's generator.
///
/// # Errors
/// When /dev/urandom can not be read.
pub fn random(size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A lock whose data is consistent between statements, so that a panic elsewhere does not spoil it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
