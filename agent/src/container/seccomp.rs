//! Compiles the specification's system call filter to classic BPF, with the results that libseccomp's would have.
//!
//! - An unconditional rule for a call beats conditional ones; among conditional ones the first that matches decides.
//! - Several conditions on one argument are alternatives, conditions on different arguments must all hold.
//! - i386 compares the lower half of arguments only; its socketcall(2) and ipc(2) follow the calls behind them.
//! - Calls of an architecture that the filter does not name kill the thread.
//! - Names that an architecture does not know are skipped there.
//! - Calls that are newer than all that a refusing filter names do not exist, as with runc.
//!
//! Beside it stands [`vsock_guard`], which every container gets: no process in a container may make a vsock socket,
//! as the agent's own channel to the host is one. A ring of io_uring(7) makes sockets that no filter sees, so there are
//! no rings either. Behind it stands a second wall: the agent accepts peers with the host's address only, and the
//! guest's kernel has no vsock loopback.

mod syscalls;

use prost::Message;

use self::syscalls::{IPC_CALLS, SOCKETCALLS, numbers};
use super::Error;
use crate::oci::Seccomp;
use crate::oci::seccomp::{Action, Argument, Operator, Rule};

/// A compiled filter.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Filter {
    /// seccomp(2) flags.
    #[prost(uint32, tag = "1")]
    pub flags: u32,
    /// `struct sock_filter`, each in one number, its first member in the lowest bits.
    #[prost(fixed64, repeated, tag = "2")]
    program: Vec<u64>,
}

impl Filter {
    fn new(flags: u32, code: &Code) -> Filter {
        let pack = |&(code, yes, no, operand): &(u16, u8, u8, u32)| {
            u64::from(code) | u64::from(yes) << 16 | u64::from(no) << 24 | u64::from(operand) << 32
        };
        Filter { flags, program: code.iter().map(pack).collect() }
    }

    /// As the kernel takes it.
    pub(crate) fn instructions(&self) -> Vec<libc::sock_filter> {
        let unpack = |&packed: &u64| {
            let [c0, c1, jt, jf, k @ ..] = packed.to_le_bytes();
            libc::sock_filter { code: u16::from_le_bytes([c0, c1]), jt, jf, k: u32::from_le_bytes(k) }
        };
        self.program.iter().map(unpack).collect()
    }
}

/// Instructions: code, jump if true, jump if false, operand.
type Code = Vec<(u16, u8, u8, u32)>;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// An architecture that the guest's kernel runs; its place in [`syscalls::Numbers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arch {
    X86_64 = 0,
    I386 = 1,
    X32 = 2,
}

/// What is done about one system call of one architecture.
#[derive(Debug, Default)]
struct Call {
    unconditional: Option<u32>,
    conditional: Vec<(Vec<Argument>, u32)>,
}

/// Compiles a filter.
///
/// # Errors
/// The member at fault, without "linux.seccomp" only where it is the filter as a whole.
pub fn compile(seccomp: &Seccomp) -> Result<Filter, Error> {
    let default = verdict("linux.seccomp.defaultAction", seccomp.default_action, seccomp.default_errno_ret)?;
    let flags = flags(seccomp)?;
    let (i386, x32) = architectures(seccomp)?;
    let rules = rules(seccomp, default)?;

    let block = |arch| {
        let mut code = unknown_calls(arch, seccomp);
        code.extend(block(arch, &rules, default)?);
        Ok::<_, Error>(code)
    };
    let mut program = vec![(LOAD, 0, 0, ARCHITECTURE)];
    let mut native = vec![(LOAD, 0, 0, NUMBER)];
    let x32_block = if x32 { block(Arch::X32)? } else { vec![(RETURN, 0, 0, RET_KILL_THREAD)] };
    // -1 is what a tracer makes of a call to be skipped, not a call of x32.
    native.push((JUMP_EQUAL, 1, 0, u32::MAX));
    native.push((JUMP_GREATER_OR_EQUAL, 1, 0, X32_BIT));
    native.push((JUMP, 0, 0, u32::try_from(x32_block.len()).map_err(|_| too_many())?));
    native.extend(x32_block);
    native.extend(block(Arch::X86_64)?);
    guarded(&mut program, AUDIT_ARCH_X86_64, native);
    if i386 {
        let mut code = vec![(LOAD, 0, 0, NUMBER)];
        code.extend(block(Arch::I386)?);
        guarded(&mut program, AUDIT_ARCH_I386, code);
    }
    program.push((RETURN, 0, 0, RET_KILL_THREAD));
    if program.len() > MAX_INSTRUCTIONS {
        let reason =
            format!("compiles to {} instructions, the kernel takes {MAX_INSTRUCTIONS}", program.len());
        return Err(Error::invalid("linux.seccomp.syscalls", reason));
    }
    Ok(Filter::new(flags, &program))
}

/// The filter that every container gets: AF_VSOCK sockets do not exist, and neither does io_uring, which could make
/// them.
pub fn vsock_guard() -> Filter {
    /// io_uring_setup(2), io_uring_enter(2) and io_uring_register(2) have one number on all architectures.
    const IO_URING: (u32, u32) = (425, 427);
    const AF_VSOCK: u32 = 40;
    const SOCKET: u32 = 41;
    const SOCKET_I386: u32 = 359;
    const SOCKETCALL_I386: u32 = 102;
    const SYS_SOCKET: u32 = 1;
    let refuse = RET_ERRNO | errno(libc::EAFNOSUPPORT);
    let no_rings = Some((IO_URING.0, IO_URING.1, RET_ERRNO | errno(libc::ENOSYS)));
    let mut program = vec![(LOAD, 0, 0, ARCHITECTURE)];
    // x32 has the same number with a bit.
    let family = [
        (LOAD, 0, 0, ARGUMENTS),
        (JUMP_EQUAL, 0, 1, AF_VSOCK),
        (RETURN, 0, 0, refuse),
        (RETURN, 0, 0, RET_ALLOW),
    ];
    let mut native = vec![(LOAD, 0, 0, NUMBER), (AND, 0, 0, !X32_BIT)];
    emit_range(no_rings, &mut native);
    native.push((JUMP_EQUAL, 0, 4, SOCKET));
    native.extend(family);
    native.push((RETURN, 0, 0, RET_ALLOW));
    guarded(&mut program, AUDIT_ARCH_X86_64, native);
    let mut i386 = vec![(LOAD, 0, 0, NUMBER)];
    emit_range(no_rings, &mut i386);
    i386.push((JUMP_EQUAL, 0, 4, SOCKET_I386));
    i386.extend(family);
    // The family is behind a pointer there. C libraries that still go this way try socket(2) first.
    i386.extend([
        (JUMP_EQUAL, 0, 3, SOCKETCALL_I386),
        (LOAD, 0, 0, ARGUMENTS),
        (JUMP_EQUAL, 0, 1, SYS_SOCKET),
        (RETURN, 0, 0, refuse),
        (RETURN, 0, 0, RET_ALLOW),
    ]);
    guarded(&mut program, AUDIT_ARCH_I386, i386);
    program.push((RETURN, 0, 0, RET_ALLOW));
    Filter::new(0, &program)
}

fn errno(errno: i32) -> u32 {
    errno.cast_unsigned() & 0xffff
}

/// Appends `code`, to be run when the accumulator (kept otherwise) is `architecture`.
fn guarded(program: &mut Code, architecture: u32, code: Code) {
    program.push((JUMP_EQUAL, 1, 0, architecture));
    program.push((JUMP, 0, 0, u32::try_from(code.len()).unwrap_or(u32::MAX)));
    program.extend(code);
}

/// What the filter returns for an action.
fn verdict(field: &str, action: Action, errno_ret: Option<u32>) -> Result<u32, Error> {
    if errno_ret.is_some() && !matches!(action, Action::Errno | Action::Trace) {
        return Err(Error::invalid(field, "this action takes no errno"));
    }
    let data = errno_ret.unwrap_or(errno(libc::EPERM));
    // MAX_ERRNO for an errno, 16 bits for a tracer.
    if data > if action == Action::Errno { 4095 } else { 0xffff } {
        return Err(Error::invalid(field, format!("{data} is too big")));
    }
    Ok(match action {
        Action::Kill | Action::KillThread => RET_KILL_THREAD,
        Action::KillProcess => RET_KILL_PROCESS,
        Action::Trap => RET_TRAP,
        Action::Errno => RET_ERRNO | data,
        Action::Trace => RET_TRACE | data,
        Action::Allow => RET_ALLOW,
        Action::Log => RET_LOG,
        Action::Notify => return Err(Error::unsupported(field, "no listener would answer")),
    })
}

fn flags(seccomp: &Seccomp) -> Result<u32, Error> {
    if !seccomp.listener_path.is_empty() || !seccomp.listener_metadata.is_empty() {
        return Err(Error::unsupported("linux.seccomp.listenerPath", "user notification is not available"));
    }
    seccomp.flags.iter().try_fold(0, |flags, flag| match flag.as_str() {
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags | 1),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | 2),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | 4),
        other => Err(Error::unsupported("linux.seccomp.flags", format!("unknown flag {other:?}"))),
    })
}

/// Whether the filter speaks of i386 and of x32. Architectures that this kernel can not run are allowed, and idle.
fn architectures(seccomp: &Seccomp) -> Result<(bool, bool), Error> {
    const OTHERS: [&str; 20] = [
        "X86_64",
        "NATIVE",
        "ARM",
        "AARCH64",
        "MIPS",
        "MIPS64",
        "MIPS64N32",
        "MIPSEL",
        "MIPSEL64",
        "MIPSEL64N32",
        "PPC",
        "PPC64",
        "PPC64LE",
        "S390",
        "S390X",
        "PARISC",
        "PARISC64",
        "RISCV64",
        "LOONGARCH64",
        "M68K",
    ];
    let mut found = (false, false);
    for (index, name) in seccomp.architectures.iter().enumerate() {
        match name.strip_prefix("SCMP_ARCH_") {
            Some("X86") => found.0 = true,
            Some("X32") => found.1 = true,
            Some(other) if OTHERS.contains(&other) => {}
            _ => {
                let field = format!("linux.seccomp.architectures[{index}]");
                return Err(Error::invalid(field, format!("unknown architecture {name:?}")));
            }
        }
    }
    Ok(found)
}

/// Rules that differ from the default, as (rule, verdict).
fn rules(seccomp: &Seccomp, default: u32) -> Result<Vec<(&Rule, u32)>, Error> {
    let mut rules = Vec::new();
    for (index, rule) in seccomp.syscalls.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        if rule.names.is_empty() {
            return Err(Error::invalid(format!("{field}.names"), "is empty"));
        }
        if let Some(argument) = rule.args.iter().find(|argument| argument.index > 5) {
            return Err(Error::invalid(
                format!("{field}.args"),
                format!("there is no argument {}", argument.index),
            ));
        }
        let verdict = verdict(&format!("{field}.action"), rule.action, rule.errno_ret)?;
        if verdict != default {
            rules.push((rule, verdict));
        }
    }
    Ok(rules)
}

/// A call's number, without the bit of x32, if the architecture has it.
fn number(arch: Arch, name: &str) -> Option<u32> {
    let number = numbers(name)?.get(arch as usize).copied()?;
    u32::try_from(number).ok()
}

fn bit(arch: Arch) -> u32 {
    if arch == Arch::X32 { X32_BIT } else { 0 }
}

/// Code for the calls that are newer than all that the filter names: they do not exist, as far as its author knew. C
/// libraries that find ENOSYS use an older call; with any other error, or a signal, the program fails. Falls through
/// for the others. A filter that is to refuse as little as possible, or says ENOSYS itself, has no need of it.
fn unknown_calls(arch: Arch, seccomp: &Seccomp) -> Code {
    let permissive = matches!(seccomp.default_action, Action::Allow | Action::Log | Action::Trace);
    if permissive || seccomp.default_errno_ret == Some(errno(libc::ENOSYS)) {
        return Code::new();
    }
    let names = seccomp.syscalls.iter().flat_map(|rule| &rule.names);
    let newest = names.filter_map(|name| number(arch, name)).max();
    newest.map_or_else(Code::new, |newest| {
        vec![(JUMP_GREATER, 0, 1, newest | bit(arch)), (RETURN, 0, 0, RET_ERRNO | errno(libc::ENOSYS))]
    })
}

/// The code for one architecture, with the number in the accumulator; always returns.
fn block(arch: Arch, rules: &[(&Rule, u32)], default: u32) -> Result<Code, Error> {
    let mut calls: std::collections::BTreeMap<u32, Call> = std::collections::BTreeMap::new();
    for &(rule, verdict) in rules {
        for name in &rule.names {
            if let Some(number) = number(arch, name) {
                add(calls.entry(number).or_default(), &rule.args, verdict);
            }
            if arch == Arch::I386 {
                add_multiplexed(&mut calls, name, rule, verdict);
            }
        }
    }
    let bit = bit(arch);
    let mut code = Code::new();
    let mut pending: Option<(u32, u32, u32)> = None;
    for (&number, call) in &calls {
        let number = number | bit;
        match (call.unconditional, &mut pending) {
            // Neighbours with one verdict share a comparison.
            (Some(verdict), Some((_, last, same))) if *same == verdict && *last + 1 == number => {
                *last = number
            }
            (unconditional, pending) => {
                emit_range(pending.take(), &mut code);
                match unconditional {
                    Some(verdict) => *pending = Some((number, number, verdict)),
                    None => emit_conditional(arch, number, call, default, &mut code)?,
                }
            }
        }
    }
    emit_range(pending, &mut code);
    code.push((RETURN, 0, 0, default));
    Ok(code)
}

fn add(call: &mut Call, args: &[Argument], verdict: u32) {
    if args.is_empty() {
        // The first word on a call without conditions is the last.
        call.unconditional.get_or_insert(verdict);
        return;
    }
    let repeated =
        args.iter().enumerate().any(|(at, a)| args.iter().skip(at + 1).any(|b| a.index == b.index));
    if repeated {
        call.conditional.extend(args.iter().map(|argument| (vec![*argument], verdict)));
    } else {
        call.conditional.push((args.to_vec(), verdict));
    }
}

/// socketcall(2) and ipc(2) carry the number of the call behind them in their first argument, and its arguments
/// behind a pointer: only rules without conditions can be followed there.
fn add_multiplexed(calls: &mut std::collections::BTreeMap<u32, Call>, name: &str, rule: &Rule, verdict: u32) {
    const SOCKETCALL: u32 = 102;
    const IPC: u32 = 117;
    if !rule.args.is_empty() {
        return;
    }
    let tables = [(SOCKETCALL, SOCKETCALLS.as_slice()), (IPC, IPC_CALLS.as_slice())];
    for (through, table) in tables {
        if let Some(&(_, call)) = table.iter().find(|(known, _)| *known == name) {
            let is_call = Argument { index: 0, value: u64::from(call), value_two: 0, op: Operator::Equal };
            add(calls.entry(through).or_default(), &[is_call], verdict);
        }
    }
}

fn emit_range(range: Option<(u32, u32, u32)>, code: &mut Code) {
    match range {
        Some((first, last, verdict)) if first == last => {
            code.extend([(JUMP_EQUAL, 0, 1, first), (RETURN, 0, 0, verdict)]);
        }
        Some((first, last, verdict)) => code.extend([
            (JUMP_GREATER_OR_EQUAL, 0, 2, first),
            (JUMP_GREATER, 1, 0, last),
            (RETURN, 0, 0, verdict),
        ]),
        None => {}
    }
}

fn emit_conditional(
    arch: Arch,
    number: u32,
    call: &Call,
    default: u32,
    code: &mut Code,
) -> Result<(), Error> {
    let mut body = Code::new();
    for (arguments, verdict) in &call.conditional {
        let tests: Vec<Code> = arguments.iter().map(|argument| test(arch, argument)).collect();
        let total = tests.iter().map(Vec::len).sum::<usize>();
        let mut at = 0;
        for test in tests {
            for (code, yes, no, operand) in test {
                at += 1;
                // FAIL stands for the way out behind the verdict.
                let fix = |jump: u8| match jump {
                    FAIL => u8::try_from(total - at + 1).map_err(|_| too_many()),
                    near => Ok(near),
                };
                body.push((code, fix(yes)?, fix(no)?, operand));
            }
        }
        body.push((RETURN, 0, 0, *verdict));
    }
    body.push((RETURN, 0, 0, default));
    // The number is lost to the accumulator, so the body does not come back.
    code.push((JUMP_EQUAL, 1, 0, number));
    code.push((JUMP, 0, 0, u32::try_from(body.len()).map_err(|_| too_many())?));
    code.extend(body);
    Ok(())
}

fn too_many() -> Error {
    Error::invalid("linux.seccomp.syscalls", "too many conditions")
}

/// A jump out of a rule whose condition does not hold.
const FAIL: u8 = u8::MAX;

/// Falls through when the condition holds, else goes to [`FAIL`].
fn test(arch: Arch, argument: &Argument) -> Code {
    let low = ARGUMENTS + argument.index * 8;
    let high = low + 4;
    let (low_value, high_value) = halves(argument.value);
    if arch == Arch::I386 {
        return test_low(argument, low);
    }
    match argument.op {
        Operator::Equal => vec![
            (LOAD, 0, 0, high),
            (JUMP_EQUAL, 0, FAIL, high_value),
            (LOAD, 0, 0, low),
            (JUMP_EQUAL, 0, FAIL, low_value),
        ],
        Operator::NotEqual => vec![
            (LOAD, 0, 0, high),
            (JUMP_EQUAL, 0, 2, high_value),
            (LOAD, 0, 0, low),
            (JUMP_EQUAL, FAIL, 0, low_value),
        ],
        Operator::MaskedEqual => {
            let (low_wanted, high_wanted) = halves(argument.value_two);
            vec![
                (LOAD, 0, 0, high),
                (AND, 0, 0, high_value),
                (JUMP_EQUAL, 0, FAIL, high_wanted),
                (LOAD, 0, 0, low),
                (AND, 0, 0, low_value),
                (JUMP_EQUAL, 0, FAIL, low_wanted),
            ]
        }
        // The upper half decides unless it is equal.
        Operator::Greater | Operator::GreaterOrEqual => vec![
            (LOAD, 0, 0, high),
            (JUMP_GREATER, 3, 0, high_value),
            (JUMP_EQUAL, 0, FAIL, high_value),
            (LOAD, 0, 0, low),
            (
                if argument.op == Operator::Greater { JUMP_GREATER } else { JUMP_GREATER_OR_EQUAL },
                0,
                FAIL,
                low_value,
            ),
        ],
        Operator::Less | Operator::LessOrEqual => vec![
            (LOAD, 0, 0, high),
            (JUMP_GREATER, FAIL, 0, high_value),
            (JUMP_EQUAL, 0, 2, high_value),
            (LOAD, 0, 0, low),
            (
                if argument.op == Operator::Less { JUMP_GREATER_OR_EQUAL } else { JUMP_GREATER },
                FAIL,
                0,
                low_value,
            ),
        ],
    }
}

fn test_low(argument: &Argument, low: u32) -> Code {
    let (value, _) = halves(argument.value);
    let load = (LOAD, 0, 0, low);
    let condition = match argument.op {
        Operator::Equal => (JUMP_EQUAL, 0, FAIL, value),
        Operator::NotEqual => (JUMP_EQUAL, FAIL, 0, value),
        Operator::Greater => (JUMP_GREATER, 0, FAIL, value),
        Operator::GreaterOrEqual => (JUMP_GREATER_OR_EQUAL, 0, FAIL, value),
        Operator::Less => (JUMP_GREATER_OR_EQUAL, FAIL, 0, value),
        Operator::LessOrEqual => (JUMP_GREATER, FAIL, 0, value),
        Operator::MaskedEqual => {
            let (wanted, _) = halves(argument.value_two);
            return vec![load, (AND, 0, 0, value), (JUMP_EQUAL, 0, FAIL, wanted)];
        }
    };
    vec![load, condition]
}

/// Lower and upper half.
fn halves(value: u64) -> (u32, u32) {
    let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    (half(value), half(value >> 32))
}

#[cfg(test)]
mod tests;
