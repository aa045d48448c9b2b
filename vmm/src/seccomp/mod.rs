//! System call filters, one for each kind of thread, installed after everything else.
//!
//! What a filter does not name ends the process. Each thread installs its own before it touches anything that
//! a guest has a hand in. A thread starts with the filter of the one that made it, and a call must pass both,
//! so a thread that makes others has what they need; the tables say so where it is the only reason.
//!
//! Arguments are looked at where the number of a call says too little: requests of ioctl, protection of
//! mappings, families of sockets, flags of clone. Memory can never be made executable.
//!
//! To find out what a filter lacks, run with [`SeccompMode::Log`]: the kernel then lets everything pass and writes
//! what it would have killed to the audit log (`journalctl -k`, lines with `type=1326` and `syscall=`).

mod filters;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, btree_map::Entry};

use caisson_vmm_api::jail::SeccompMode;
use filters::Check;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// A kind of thread, and so a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs a virtual processor.
    Vcpu,
    /// The main thread: its event loop runs all devices that need no thread of their own, and the control
    /// API.
    Devices,
    /// Waits for a block device's files.
    Block,
    /// Serves a shared directory.
    Fs,
    /// The process outside the jail, which waits for the one inside.
    Supervisor,
}

/// A filter that could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// It could not be compiled.
    #[error("compiling the filter for {thread:?} threads")]
    Compile {
        /// For which kind of thread.
        thread: Thread,
        /// Why.
        #[source]
        source: seccompiler::BackendError,
    },
    /// The kernel refused it.
    #[error("installing the filter for {thread:?} threads")]
    Install {
        /// For which kind of thread.
        thread: Thread,
        /// Why.
        #[source]
        source: seccompiler::Error,
    },
}

/// Installs the filter for a kind of thread in the calling thread. There is no way back.
///
/// # Errors
/// When the kernel has no seccomp, or refuses the filter.
pub fn apply(thread: Thread, mode: SeccompMode) -> Result<(), SeccompError> {
    let install = |source| SeccompError::Install { thread, source };
    if thread == Thread::Devices {
        apply_filter(&refusals(thread)?).map_err(install)?;
    }
    apply_filter(&compile(thread, mode)?).map_err(install)
}

/// The system calls that a filter lets pass at all, by number, in order.
#[must_use]
pub fn allowed_calls(thread: Thread) -> Vec<i64> {
    let passes = |number: &i64| thread != Thread::Devices || !filters::REFUSED.contains(number);
    let mut numbers: Vec<_> = filters::of(thread).iter().map(|(number, _)| *number).filter(passes).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

fn compile(thread: Thread, mode: SeccompMode) -> Result<BpfProgram, SeccompError> {
    let error = |source| SeccompError::Compile { thread, source };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (number, check) in filters::of(thread) {
        match conditions(check).map_err(error)? {
            // An empty list lets all arguments pass, whatever else is said about the call.
            None => drop(rules.insert(*number, Vec::new())),
            Some(alternatives) => match rules.entry(*number) {
                Entry::Vacant(entry) => drop(entry.insert(alternatives)),
                Entry::Occupied(entry) if entry.get().is_empty() => {}
                Entry::Occupied(mut entry) => entry.get_mut().extend(alternatives),
            },
        }
    }
    let otherwise = match mode {
        SeccompMode::Kill => SeccompAction::KillProcess,
        SeccompMode::Log => SeccompAction::Log,
    };
    program(rules, otherwise, SeccompAction::Allow).map_err(error)
}

/// Lets everything pass but what "does not exist".
fn refusals(thread: Thread) -> Result<BpfProgram, SeccompError> {
    let no_such_call = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = filters::REFUSED.iter().map(|number| (*number, Vec::new())).collect();
    program(rules, SeccompAction::Allow, no_such_call)
        .map_err(|source| SeccompError::Compile { thread, source })
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)?.try_into()
}

/// The rules of which one has to fit, or `None` if a call passes with any arguments.
fn conditions(check: &Check) -> Result<Option<Vec<SeccompRule>>, seccompiler::BackendError> {
    let rule = |index, op, value| {
        SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?])
    };
    match check {
        Check::Any => Ok(None),
        Check::OneOf { argument, values } => values
            .iter()
            .map(|value| rule(*argument, SeccompCmpOp::Eq, *value))
            .collect::<Result<_, _>>()
            .map(Some),
        Check::Without { argument, bits } => {
            rule(*argument, SeccompCmpOp::MaskedEq(*bits), 0).map(|rule| Some(vec![rule]))
        }
    }
}
