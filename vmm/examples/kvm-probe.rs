//! Prints what the KVM probe finds; exits with 0 when guests can run, with 1 when not.

use std::{process::ExitCode, time::Duration};

fn main() -> ExitCode {
    let verdict = caisson_vmm::probe::probe(Duration::from_secs(10));
    println!("{verdict}");
    if verdict.is_usable() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
