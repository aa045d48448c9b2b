//! The compiled filters run in an interpreter of classic BPF.

use proptest::prelude::*;

use super::*;

/// What the filter says of a call.
fn run(filter: &Filter, arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![number, arch, 0, 0];
    data.extend(args.iter().flat_map(|&arg| <[u32; 2]>::from(halves(arg))));
    let program = filter.instructions();
    let (mut accumulator, mut at) = (0_u32, 0_usize);
    loop {
        let libc::sock_filter { code, jt: yes, jf: no, k } = program[at];
        let jump = match code {
            LOAD => {
                accumulator = data[usize::try_from(k).unwrap() / 4];
                0
            }
            AND => {
                accumulator &= k;
                0
            }
            JUMP => usize::try_from(k).unwrap(),
            JUMP_EQUAL => usize::from(if accumulator == k { yes } else { no }),
            JUMP_GREATER => usize::from(if accumulator > k { yes } else { no }),
            JUMP_GREATER_OR_EQUAL => usize::from(if accumulator >= k { yes } else { no }),
            RETURN => return k,
            other => panic!("code {other:#x}"),
        };
        at += 1 + jump;
    }
}

fn filter(json: serde_json::Value) -> Filter {
    compile(&Seccomp::from_json(&json).unwrap()).unwrap()
}

fn refusal(json: serde_json::Value) -> String {
    compile(&Seccomp::from_json(&json).unwrap()).unwrap_err().to_string()
}

const NONE: [u64; 6] = [0; 6];

/// A profile from before clone3(2), number 435 everywhere.
#[test]
fn calls_that_a_profile_does_not_know_do_not_exist() {
    const CLONE3: u32 = 435;
    let answer = |default: &str, errno: Option<i32>, number| {
        let mut profile = serde_json::json!({
            "defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["read", "pidfd_open"], "action": "SCMP_ACT_ALLOW"}],
        });
        if let Some(errno) = errno {
            profile["defaultErrnoRet"] = errno.into();
        }
        let filter = filter(profile);
        let native = run(&filter, AUDIT_ARCH_X86_64, number, NONE);
        assert_eq!(run(&filter, AUDIT_ARCH_I386, number, NONE), native);
        assert_eq!(run(&filter, AUDIT_ARCH_X86_64, number | X32_BIT, NONE), native);
        native
    };
    let missing = RET_ERRNO | errno(libc::ENOSYS);
    for default in ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"] {
        assert_eq!(answer(default, None, CLONE3), missing, "{default}");
        assert_eq!(answer(default, None, CLONE3 - 1), RET_ALLOW, "{default}: the newest that it knows");
        assert_ne!(answer(default, None, CLONE3 - 2), missing, "{default}: one that it leaves out");
    }
    assert_eq!(answer("SCMP_ACT_ERRNO", Some(libc::EACCES), CLONE3), missing);
    assert_eq!(answer("SCMP_ACT_LOG", None, CLONE3), RET_LOG);
}

#[test]
fn every_action_has_its_value() {
    let cases = [
        ("SCMP_ACT_KILL", RET_KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", RET_KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", RET_KILL_PROCESS),
        ("SCMP_ACT_TRAP", RET_TRAP),
        ("SCMP_ACT_ERRNO", RET_ERRNO | 1),
        ("SCMP_ACT_TRACE", RET_TRACE | 1),
        ("SCMP_ACT_LOG", RET_LOG),
    ];
    for (action, value) in cases {
        let rules = serde_json::json!([{"names": ["read"], "action": action}]);
        let filter = filter(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}));
        assert_eq!(run(&filter, AUDIT_ARCH_X86_64, 0, NONE), value, "{action}");
        assert_eq!(run(&filter, AUDIT_ARCH_X86_64, 1, NONE), RET_ALLOW, "{action}");
    }
}

#[test]
fn architectures_are_told_apart() {
    let mut json = serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "syscalls": [{"names": ["getpid", "nonsense"], "action": "SCMP_ACT_ALLOW"}],
    });
    let native = filter(json.clone());
    assert_eq!(run(&native, AUDIT_ARCH_X86_64, 39, NONE), RET_ALLOW);
    assert_eq!(run(&native, AUDIT_ARCH_X86_64, 40, NONE), RET_ERRNO | 38);
    assert_eq!(run(&native, AUDIT_ARCH_X86_64, u32::MAX, NONE), RET_ERRNO | 38, "a skipped call");
    assert_eq!(run(&native, AUDIT_ARCH_X86_64, X32_BIT | 39, NONE), RET_KILL_THREAD);
    assert_eq!(run(&native, AUDIT_ARCH_I386, 20, NONE), RET_KILL_THREAD);
    json["architectures"] = serde_json::json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    let all = filter(json);
    assert_eq!(run(&all, AUDIT_ARCH_X86_64, X32_BIT | 39, NONE), RET_ALLOW);
    assert_eq!(run(&all, AUDIT_ARCH_X86_64, X32_BIT | 40, NONE), RET_ERRNO | 38);
    assert_eq!(run(&all, AUDIT_ARCH_I386, 20, NONE), RET_ALLOW);
    assert_eq!(run(&all, AUDIT_ARCH_I386, 39, NONE), RET_ERRNO | 38);
    assert_eq!(run(&all, 0xc000_00b7, 39, NONE), RET_KILL_THREAD, "not this machine's");
}

#[test]
fn multiplexed_calls_follow_the_ones_behind_them() {
    let filter = filter(serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
        "syscalls": [{"names": ["connect", "shmat"], "action": "SCMP_ACT_ERRNO"}],
    }));
    let call = |number, first| run(&filter, AUDIT_ARCH_I386, number, [first, 0, 0, 0, 0, 0]);
    assert_eq!(
        [call(102, 3), call(102, 2), call(117, 21), call(117, 22)],
        [RET_ERRNO | 1, RET_ALLOW, RET_ERRNO | 1, RET_ALLOW]
    );
}

#[test]
fn an_unconditional_rule_beats_conditional_ones() {
    let filter = filter(serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_TRAP", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
            {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        ],
    }));
    assert_eq!(run(&filter, AUDIT_ARCH_X86_64, 0, [1, 0, 0, 0, 0, 0]), RET_ALLOW);
}

#[test]
fn conditions_on_one_argument_are_alternatives_and_on_several_all_hold() {
    let condition =
        |index: u32, value: u64| serde_json::json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
    let make = |args: [serde_json::Value; 2]| {
        filter(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": args}],
        }))
    };
    let either = make([condition(0, 1), condition(0, 2)]);
    let both = make([condition(0, 1), condition(1, 2)]);
    let call = |filter: &Filter, a, b| run(filter, AUDIT_ARCH_X86_64, 0, [a, b, 0, 0, 0, 0]) == RET_ALLOW;
    assert!(call(&either, 1, 0) && call(&either, 2, 0) && !call(&either, 3, 0));
    assert!(call(&both, 1, 2) && !call(&both, 1, 0) && !call(&both, 0, 2));
}

#[test]
fn what_can_not_be_is_refused() {
    let rule = |extra: serde_json::Value| {
        let mut rule = serde_json::json!({"names": ["read"], "action": "SCMP_ACT_KILL"});
        rule.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        refusal(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    };
    assert!(
        rule(serde_json::json!({"action": "SCMP_ACT_NOTIFY"}))
            .starts_with("linux.seccomp.syscalls[0].action")
    );
    assert!(rule(serde_json::json!({"errnoRet": 1})).starts_with("linux.seccomp.syscalls[0].action"));
    assert!(rule(serde_json::json!({"names": []})).starts_with("linux.seccomp.syscalls[0].names"));
    let args = serde_json::json!([{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]);
    assert!(rule(serde_json::json!({"args": args})).starts_with("linux.seccomp.syscalls[0].args"));
    let whole = |extra: &str, value: serde_json::Value| {
        let mut json = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW"});
        json[extra] = value;
        refusal(json)
    };
    assert!(whole("listenerPath", "/x".into()).starts_with("linux.seccomp.listenerPath"));
    assert!(whole("flags", serde_json::json!(["X"])).starts_with("linux.seccomp.flags"));
    assert!(whole("architectures", serde_json::json!(["X"])).starts_with("linux.seccomp.architectures[0]"));
}

#[test]
fn vsock_sockets_are_refused_by_every_door() {
    let guard = vsock_guard();
    let refused = RET_ERRNO | 97;
    let call = |arch, number, first| run(&guard, arch, number, [first, 0, 0, 0, 0, 0]);
    assert_eq!(call(AUDIT_ARCH_X86_64, 41, 40), refused);
    assert_eq!(call(AUDIT_ARCH_X86_64, X32_BIT | 41, 40), refused);
    assert_eq!(call(AUDIT_ARCH_I386, 359, 40), refused);
    assert_eq!(call(AUDIT_ARCH_I386, 102, 1), refused);
    assert_eq!(call(AUDIT_ARCH_X86_64, 41, 2), RET_ALLOW);
    assert_eq!(call(AUDIT_ARCH_X86_64, 42, 40), RET_ALLOW);
    assert_eq!(call(AUDIT_ARCH_I386, 102, 3), RET_ALLOW);
    assert_eq!(call(AUDIT_ARCH_I386, 359, 1), RET_ALLOW);
    assert_eq!(call(AUDIT_ARCH_I386, 41, 40), RET_ALLOW);
    for ring in 425..=427 {
        for (arch, number) in
            [(AUDIT_ARCH_X86_64, ring), (AUDIT_ARCH_X86_64, X32_BIT | ring), (AUDIT_ARCH_I386, ring)]
        {
            assert_eq!(call(arch, number, 0), RET_ERRNO | 38, "{number}");
        }
    }
    for other in [424, 428] {
        assert_eq!(call(AUDIT_ARCH_X86_64, other, 40), RET_ALLOW);
        assert_eq!(call(AUDIT_ARCH_I386, other, 40), RET_ALLOW);
    }
}

proptest! {
    #[test]
    fn comparisons_are_those_of_64_bit_numbers(
        op in 0..7_usize,
        value in prop_oneof![0..4_u64, any::<u64>(), Just(1 << 32), Just(u64::MAX)],
        two in prop_oneof![0..4_u64, any::<u64>()],
        argument in prop_oneof![0..4_u64, any::<u64>(), Just(1 << 32), Just((1 << 32) + 1)],
    ) {
        let names = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
        let holds = |argument: u64, value: u64, two: u64| {
            [argument != value, argument < value, argument <= value, argument == value, argument >= value,
             argument > value, argument & value == two][op]
        };
        let args = serde_json::json!([
            {"index": 2, "value": value, "valueTwo": two, "op": format!("SCMP_CMP_{}", names[op])}
        ]);
        let filter = filter(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"],
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": args}],
        }));
        let call = |arch, number| run(&filter, arch, number, [0, 0, argument, 0, 0, 0]) == RET_ALLOW;
        prop_assert_eq!(call(AUDIT_ARCH_X86_64, 0), holds(argument, value, two));
        let low = |value: u64| value & 0xffff_ffff;
        prop_assert_eq!(call(AUDIT_ARCH_I386, 3), holds(low(argument), low(value), low(two)));
    }

    #[test]
    fn ranges_mean_the_calls_in_them(allowed in prop::collection::btree_set(0..335_usize, 0..80)) {
        let names: Vec<_> = ["read", "write", "open", "close", "stat", "fstat", "lstat", "poll", "lseek", "mmap"]
            .into_iter().enumerate().filter(|(number, _)| allowed.contains(number)).map(|(_, name)| name).collect();
        prop_assume!(!names.is_empty());
        let filter = filter(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
        }));
        for number in 0..10_u32 {
            let expected = allowed.contains(&usize::try_from(number).unwrap());
            prop_assert_eq!(run(&filter, AUDIT_ARCH_X86_64, number, NONE) == RET_ALLOW, expected);
        }
    }
}
