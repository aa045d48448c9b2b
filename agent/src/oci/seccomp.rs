//! `linux.seccomp`: the system call filter.

use serde::{Deserialize, Serialize};

use super::null_default;

/// A system call filter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seccomp {
    /// For system calls that no rule matches.
    pub default_action: Action,
    /// errno of the default action, EPERM when absent.
    #[serde(default)]
    pub default_errno_ret: Option<u32>,
    /// Architectures beside the native one, as in `SCMP_ARCH_X86`.
    #[serde(default, deserialize_with = "null_default")]
    pub architectures: Vec<String>,
    /// seccomp(2) flags, as in `SECCOMP_FILTER_FLAG_LOG`.
    #[serde(default, deserialize_with = "null_default")]
    pub flags: Vec<String>,
    /// Socket of a listener for user notification; refused.
    #[serde(default)]
    pub listener_path: String,
    /// See [`Seccomp::listener_path`].
    #[serde(default)]
    pub listener_metadata: String,
    /// The rules.
    #[serde(default, deserialize_with = "null_default")]
    pub syscalls: Vec<Rule>,
}

/// What is done about a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Named as in the specification.
pub enum Action {
    #[serde(rename = "SCMP_ACT_KILL")]
    Kill,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
}

/// A rule: an action for system calls, optionally only with certain arguments.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rule {
    /// System calls by name. Names unknown on an architecture do not exist there, and are skipped.
    pub names: Vec<String>,
    /// What is done.
    pub action: Action,
    /// errno (or message to the tracer) of the action.
    #[serde(default)]
    pub errno_ret: Option<u32>,
    /// Conditions that all must hold. Several on one argument are alternatives.
    #[serde(default, deserialize_with = "null_default")]
    pub args: Vec<Argument>,
}

/// A condition on an argument.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Argument {
    /// Which argument, 0 to 5.
    pub index: u32,
    /// What it is compared with; for [`Operator::MaskedEqual`] the mask.
    pub value: u64,
    /// For [`Operator::MaskedEqual`], what the masked argument is compared with.
    #[serde(default)]
    pub value_two: u64,
    /// How.
    pub op: Operator,
}

/// How an argument is compared, unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Named as in the specification.
pub enum Operator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}
