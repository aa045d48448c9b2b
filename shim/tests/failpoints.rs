//! The shim as it is built for use cannot be made to fail on purpose.

#![cfg(not(feature = "failpoints"))]
#![allow(clippy::unwrap_used)]

/// The variable of the environment that makes it fail.
const VARIABLE: &str = "CAISSON_FAILPOINT";

#[test]
fn failpoints_are_not_in_the_shim_without_their_feature() {
    assert!(include_str!("../src/failpoint.rs").contains(VARIABLE), "the variable has another name");
    let program = std::fs::read(env!("CARGO_BIN_EXE_containerd-shim-caisson-v2")).unwrap();
    let found = program.windows(VARIABLE.len()).any(|window| window == VARIABLE.as_bytes());
    assert!(!found, "the shim looks for {VARIABLE}");
}
