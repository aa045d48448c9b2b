//! Device rules as an eBPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE`.
//!
//! The specification's rules are a list in which the last one that matches decides, and a request (say, read and
//! write) is allowed when all of its parts are. The program keeps the parts that are still undecided and walks the
//! rules from the last to the first: a rule that takes any undecided part denies, one that gives removes what it
//! gives, and nothing undecided left allows. What no rule decides is denied.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::container::{Error, sys};
use crate::oci::resources::DeviceRule;

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;

/// An eBPF instruction, `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// Destination in the lower, source in the upper half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Opcodes, Documentation/bpf/standardization/instruction-set.rst.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE: u8 = 0xb4;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP: u8 = 0x05;
const JUMP_UNLESS_EQUAL: u8 = 0x56;
const JUMP_IF_ANY_BIT: u8 = 0x46;
const EXIT: u8 = 0x95;

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const ACCESS: u8 = 2;
const TYPE: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn op(code: u8, register: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: register, offset, immediate: immediate.cast_signed() }
}

/// A device rule in numbers; `None` matches everything.
#[derive(Clone, Copy, Debug)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    fn parse(index: usize, rule: &DeviceRule) -> Result<Rule, Error> {
        let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
        let kind = match rule.kind.as_deref() {
            None | Some("" | "a") => None,
            Some("c") => Some(CHAR),
            Some("b") => Some(BLOCK),
            Some(other) => {
                return Err(Error::invalid(field("type"), format!("{other:?} is none of a, b, c")));
            }
        };
        let number = |name: &str, value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value)
                .map(Some)
                .map_err(|_| Error::invalid(field(name), format!("{value} is no device number"))),
        };
        let access = match rule.access.as_deref() {
            None | Some("") => MKNOD | READ | WRITE,
            Some(text) => text.chars().try_fold(0, |bits, c| match c {
                'r' => Ok(bits | READ),
                'w' => Ok(bits | WRITE),
                'm' => Ok(bits | MKNOD),
                _ => Err(Error::invalid(field("access"), format!("{text:?} has more than r, w, m"))),
            })?,
        };
        let (major, minor) = (number("major", rule.major)?, number("minor", rule.minor)?);
        Ok(Rule { allow: rule.allow, kind, major, minor, access })
    }
}

/// What every container may do: make any node, and use the devices that the specification puts into its `/dev`.
fn default_rules() -> impl Iterator<Item = Rule> {
    let rule = |kind, major, minor, access| Rule { allow: true, kind: Some(kind), major, minor, access };
    let all = MKNOD | READ | WRITE;
    let devices = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
    [rule(CHAR, None, None, MKNOD), rule(BLOCK, None, None, MKNOD), rule(CHAR, Some(136), None, all)]
        .into_iter()
        .chain(devices.map(|(major, minor)| rule(CHAR, Some(major), Some(minor), all)))
}

/// Compiles `rules`, with the default ones behind them.
///
/// # Errors
/// When a rule is malformed.
pub fn compile(rules: &[DeviceRule]) -> Result<Vec<Instruction>, Error> {
    let parsed: Result<Vec<_>, _> =
        rules.iter().enumerate().map(|(index, rule)| Rule::parse(index, rule)).collect();
    let mut rules = parsed?;
    rules.extend(default_rules());
    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor }, the access in the upper half of the first.
    let mut program = vec![
        op(LOAD_WORD, ACCESS | CONTEXT << 4, 0, 0),
        op(MOVE_REGISTER, TYPE | ACCESS << 4, 0, 0),
        op(AND, TYPE, 0, 0xffff),
        op(SHIFT_RIGHT, ACCESS, 0, 16),
        op(LOAD_WORD, MAJOR | CONTEXT << 4, 4, 0),
        op(LOAD_WORD, MINOR | CONTEXT << 4, 8, 0),
    ];
    for rule in rules.iter().rev() {
        emit(rule, &mut program);
    }
    program.extend([op(MOVE, RESULT, 0, 0), op(EXIT, 0, 0, 0)]);
    Ok(program)
}

fn emit(rule: &Rule, program: &mut Vec<Instruction>) {
    let body = if rule.allow {
        [
            op(AND, ACCESS, 0, !rule.access),
            op(JUMP_UNLESS_EQUAL, ACCESS, 2, 0),
            op(MOVE, RESULT, 0, 1),
            op(EXIT, 0, 0, 0),
        ]
        .to_vec()
    } else {
        [
            op(JUMP_IF_ANY_BIT, ACCESS, 1, rule.access),
            op(JUMP, 0, 2, 0),
            op(MOVE, RESULT, 0, 0),
            op(EXIT, 0, 0, 0),
        ]
        .to_vec()
    };
    let conditions: Vec<_> = [(TYPE, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
        .into_iter()
        .filter_map(|(register, value)| value.map(|value| (register, value)))
        .collect();
    let total = conditions.len() + body.len();
    for (index, (register, value)) in conditions.into_iter().enumerate() {
        // At most seven instructions.
        let skip = i16::try_from(total - index - 1).unwrap_or(0);
        program.push(op(JUMP_UNLESS_EQUAL, register, skip, value));
    }
    program.extend(body);
}

/// Loads the program and attaches it to a control group, for as long as that lives.
///
/// # Errors
/// What bpf(2) reports.
pub fn attach(program: &[Instruction], group: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let too_big = |_| io::Error::from_raw_os_error(libc::E2BIG);
    let bad = |_| io::Error::from_raw_os_error(libc::EBADF);
    let mut load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(too_big)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        ..Load::default()
    };
    let loaded = sys::bpf_fd(BPF_PROG_LOAD, &mut load)?;
    let mut attach = Attach {
        target: u32::try_from(group.as_raw_fd()).map_err(bad)?,
        program: u32::try_from(loaded.as_raw_fd()).map_err(bad)?,
        kind: BPF_CGROUP_DEVICE,
        // Groups that the container makes may restrict themselves further.
        flags: BPF_F_ALLOW_MULTI,
    };
    sys::bpf(BPF_PROG_ATTACH, &mut attach)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program as the kernel does.
    fn run(program: &[Instruction], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u32; 11];
        let mut at = 0_usize;
        loop {
            let Instruction { code, registers: names, offset, immediate } = program[at];
            let (to, from) = (usize::from(names & 15), usize::from(names >> 4));
            let immediate = immediate.cast_unsigned();
            let jump = match code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(offset).unwrap() / 4];
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                MOVE => {
                    registers[to] = immediate;
                    false
                }
                AND => {
                    registers[to] &= immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= immediate;
                    false
                }
                JUMP => true,
                JUMP_UNLESS_EQUAL => registers[to] != immediate,
                JUMP_IF_ANY_BIT => registers[to] & immediate != 0,
                EXIT => return registers[0] == 1,
                other => panic!("opcode {other:#x}"),
            };
            at += 1 + if jump { usize::try_from(offset).unwrap() } else { 0 };
        }
    }

    /// The specification's meaning, bit by bit.
    fn reference(rules: &[Rule], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let matches = |rule: &&Rule| {
            rule.kind.is_none_or(|k| k == kind)
                && rule.major.is_none_or(|m| m == major)
                && rule.minor.is_none_or(|m| m == minor)
        };
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            rules
                .iter()
                .rev()
                .filter(matches)
                .find(|rule| rule.access & bit != 0)
                .is_some_and(|rule| rule.allow)
        })
    }

    fn deny_all() -> DeviceRule {
        DeviceRule { access: Some("rwm".into()), ..DeviceRule::default() }
    }

    #[test]
    fn only_default_devices_without_rules() {
        for rules in [vec![], vec![deny_all()]] {
            let program = compile(&rules).unwrap();
            assert!(run(&program, CHAR, 1, 3, READ | WRITE), "/dev/null");
            assert!(run(&program, CHAR, 136, 77, READ | WRITE), "a terminal");
            assert!(run(&program, BLOCK, 8, 0, MKNOD));
            assert!(!run(&program, BLOCK, 8, 0, READ));
            assert!(!run(&program, CHAR, 1, 1, READ), "/dev/mem");
            assert!(!run(&program, BLOCK, 1, 3, READ), "a block device with the numbers of /dev/null");
        }
    }

    #[test]
    fn later_rules_win() {
        let allow = DeviceRule {
            allow: true,
            kind: Some("b".into()),
            major: Some(8),
            minor: Some(-1),
            access: Some("r".into()),
        };
        let program = compile(&[deny_all(), allow.clone()]).unwrap();
        assert!(run(&program, BLOCK, 8, 3, READ));
        assert!(!run(&program, BLOCK, 8, 3, READ | WRITE), "half of what was asked for");
        assert!(!run(&compile(&[allow, deny_all()]).unwrap(), BLOCK, 8, 3, READ));
    }

    #[test]
    fn malformed_rules_name_their_member() {
        let cases = [
            (DeviceRule { kind: Some("x".into()), ..deny_all() }, "type"),
            (DeviceRule { major: Some(-2), ..deny_all() }, "major"),
            (DeviceRule { minor: Some(1 << 40), ..deny_all() }, "minor"),
            (DeviceRule { access: Some("rx".into()), ..deny_all() }, "access"),
        ];
        for (rule, member) in cases {
            let text = compile(&[deny_all(), rule]).unwrap_err().to_string();
            assert!(text.starts_with(&format!("linux.resources.devices[1].{member}: ")), "{text}");
        }
    }

    fn rule() -> impl Strategy<Value = DeviceRule> {
        let kind = prop::option::of(prop::sample::select(vec!["a", "b", "c"]));
        let number = || prop::option::of(-1..4_i64);
        let access = prop::option::of(prop::sample::select(vec!["r", "w", "m", "rw", "rwm", "wm"]));
        (any::<bool>(), kind, number(), number(), access).prop_map(|(allow, kind, major, minor, access)| {
            DeviceRule { allow, kind: kind.map(String::from), major, minor, access: access.map(String::from) }
        })
    }

    proptest! {
        #[test]
        fn the_program_means_what_the_rules_say(
            rules in prop::collection::vec(rule(), 0..8),
            kind in 1..3_u32, major in 0..5_u32, minor in 0..5_u32, access in 1..8_u32,
        ) {
            let program = compile(&rules).unwrap();
            let mut parsed: Vec<_> =
                rules.iter().enumerate().map(|(index, rule)| Rule::parse(index, rule).unwrap()).collect();
            parsed.extend(default_rules());
            let expected = reference(&parsed, kind, major, minor, access);
            prop_assert_eq!(run(&program, kind, major, minor, access), expected);
        }
    }
}
