//! `linux.seccomp`: the system call filter.

#[cfg(test)]
use super::json::{self, ParseError};
use super::json::{members, names};

/// A system call filter.
#[derive(Clone, Debug, Default)]
pub struct Seccomp {
    /// For system calls that no rule matches.
    pub default_action: Action,
    /// errno of the default action, EPERM when absent.
    pub default_errno_ret: Option<u32>,
    /// Architectures beside the native one, as in `SCMP_ARCH_X86`.
    pub architectures: Vec<String>,
    /// seccomp(2) flags, as in `SECCOMP_FILTER_FLAG_LOG`.
    pub flags: Vec<String>,
    /// Socket of a listener for user notification; refused.
    pub listener_path: String,
    /// See [`Seccomp::listener_path`].
    pub listener_metadata: String,
    /// The rules.
    pub syscalls: Vec<Rule>,
}

members! { Seccomp {
    required "defaultAction": default_action, "defaultErrnoRet": default_errno_ret,
    "architectures": architectures, "flags": flags, "listenerPath": listener_path,
    "listenerMetadata": listener_metadata, "syscalls": syscalls,
} }

#[cfg(test)]
impl Seccomp {
    pub(crate) fn from_json(value: &serde_json::Value) -> Result<Seccomp, ParseError> {
        json::parse("linux.seccomp", value.to_string().as_bytes())
    }
}

/// What is done about a system call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the specification.
pub enum Action {
    #[default]
    Kill,
    KillProcess,
    KillThread,
    Trap,
    Errno,
    Trace,
    Allow,
    Log,
    Notify,
}

names! { Action {
    "SCMP_ACT_KILL": Kill, "SCMP_ACT_KILL_PROCESS": KillProcess, "SCMP_ACT_KILL_THREAD": KillThread,
    "SCMP_ACT_TRAP": Trap, "SCMP_ACT_ERRNO": Errno, "SCMP_ACT_TRACE": Trace, "SCMP_ACT_ALLOW": Allow,
    "SCMP_ACT_LOG": Log, "SCMP_ACT_NOTIFY": Notify,
} }

/// A rule: an action for system calls, optionally only with certain arguments.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// System calls by name. Names unknown on an architecture do not exist there, and are skipped.
    pub names: Vec<String>,
    /// What is done.
    pub action: Action,
    /// errno (or message to the tracer) of the action.
    pub errno_ret: Option<u32>,
    /// Conditions that all must hold. Several on one argument are alternatives.
    pub args: Vec<Argument>,
}

members! { Rule { required "names": names, required "action": action, "errnoRet": errno_ret, "args": args } }

/// A condition on an argument.
#[derive(Clone, Copy, Debug, Default)]
pub struct Argument {
    /// Which argument, 0 to 5.
    pub index: u32,
    /// What it is compared with; for [`Operator::MaskedEqual`] the mask.
    pub value: u64,
    /// For [`Operator::MaskedEqual`], what the masked argument is compared with.
    pub value_two: u64,
    /// How.
    pub op: Operator,
}

members! { Argument {
    required "index": index, required "value": value, "valueTwo": value_two, required "op": op,
} }

/// How an argument is compared, unsigned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the specification.
pub enum Operator {
    #[default]
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    MaskedEqual,
}

names! { Operator {
    "SCMP_CMP_NE": NotEqual, "SCMP_CMP_LT": Less, "SCMP_CMP_LE": LessOrEqual, "SCMP_CMP_EQ": Equal,
    "SCMP_CMP_GE": GreaterOrEqual, "SCMP_CMP_GT": Greater, "SCMP_CMP_MASKED_EQ": MaskedEqual,
} }
