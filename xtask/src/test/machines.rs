//! The whole-system tests on emulated machines, as many side by side as the host has processors.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use procfs::Current;

use super::{
    Built, E2E_LIMIT, SOAK_LIMIT, TestArgs,
    deal::{Lane, deal},
    durations::Durations,
    nextest_in,
    outcome::{Outcome, Outcomes, Test},
};
use crate::{
    host::Host,
    proc::clock,
    system::Place,
    testbed::{Variant, boot::Lost, exec, root},
};

/// How often the tests of one machine may lose it, and go on in another.
const LOSSES: usize = 2;

/// What an emulated machine takes of the host's memory at the most: its own, and QEMU's translated code.
const MACHINE_MEMORY: u64 = 5 * GIB + GIB / 4;

/// What is left to everything else.
const RESERVE: u64 = 2 * GIB;

const GIB: u64 = 1 << 30;

/// How many of the slowest tests are named at the end.
const SLOWEST: usize = 10;

/// What came of one machine's tests.
struct Ran {
    name: String,
    variant: Variant,
    took: Duration,
    ended: BTreeMap<Test, Outcome>,
    failure: Option<String>,
}

/// As many machines as the host has processors, and memory for them.
///
/// # Errors
/// When the host does not say how much memory it has.
fn as_many_as_fit() -> Result<usize> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let memory = procfs::Meminfo::current().context("reading how much memory there is")?;
    let available = memory.mem_available.unwrap_or(memory.mem_free);
    Ok(fitting(cores, available))
}

fn fitting(cores: usize, available: u64) -> usize {
    let room = usize::try_from(available.saturating_sub(RESERVE) / MACHINE_MEMORY).unwrap_or(usize::MAX);
    cores.min(room).max(1)
}

/// Deals the tests out to so many machines and runs them. The report says what each machine did and which tests were the
/// slowest.
///
/// # Errors
/// When a test failed or did not run, or a machine was lost too often. The report is in `report` then, too.
pub(super) fn run(
    host: &Host,
    args: &TestArgs,
    built: &Built,
    tests: Vec<(Variant, Test)>,
    report: &mut String,
) -> Result<()> {
    let machines = args.machines.map_or_else(as_many_as_fit, |machines| Ok(usize::from(machines)))?;
    let mut durations = Durations::read(&host.cache);
    let lanes = deal(tests, &durations, machines);
    let variants: BTreeSet<&Variant> = lanes.iter().flat_map(|lane| lane.tests.keys()).collect();
    for variant in variants {
        // Before the machines start: what is missing is made once, with all processors.
        root::build(host, *variant)?;
    }
    for (number, lane) in lanes.iter().enumerate() {
        let count: usize = lane.tests.values().map(Vec::len).sum();
        eprintln!("==> machine {}: {count} tests, about {}", number + 1, clock(lane.expected));
    }
    let ran: Vec<Ran> = thread::scope(|scope| {
        let running: Vec<_> = lanes
            .iter()
            .enumerate()
            .map(|(number, lane)| scope.spawn(move || one_after_the_other(host, args, built, number, lane)))
            .collect();
        let ended =
            running.into_iter().map(|lane| lane.join().map_err(|_| anyhow!("a machine's thread panicked")));
        ended.collect::<Result<Vec<_>>>()
    })?
    .into_iter()
    .flatten()
    .collect();

    for one in &ran {
        for (test, outcome) in one.ended.iter().filter(|(_, outcome)| outcome.passed) {
            durations.note(one.variant, test, outcome.took);
        }
    }
    // First, so that a cache that cannot be written hides nothing of it.
    report.push_str(&summary(&ran));
    durations.write(&host.cache)?;
    let failed: Vec<_> = ran.iter().filter_map(|one| one.failure.as_deref()).collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Runs a lane's tests, variant by variant.
fn one_after_the_other(host: &Host, args: &TestArgs, built: &Built, number: usize, lane: &Lane) -> Vec<Ran> {
    let run = |(variant, tests): (&Variant, &Vec<Test>)| {
        let name = format!("{} {}", number + 1, variant.name());
        let outcomes = Arc::new(Mutex::new(Outcomes::new(io::stderr(), name.clone())));
        let started = Instant::now();
        let result = on_machine(host, args, built, (*variant, tests), &outcomes);
        let ended = outcomes.lock().unwrap_or_else(PoisonError::into_inner).ended().clone();
        let failure = result.err().map(|error| format!("machine {name}: {error:#}"));
        Ran { name, variant: *variant, took: started.elapsed(), ended, failure }
    };
    lane.tests.iter().map(run).collect()
}

/// Runs tests on a machine of a variant.
///
/// An emulated machine may be lost under the tests through no fault of theirs. That is said, with what the machine was
/// at, and those that had not ended run in another; a test that has failed stays failed.
fn on_machine(
    host: &Host,
    args: &TestArgs,
    built: &Built,
    (variant, tests): (Variant, &[Test]),
    outcomes: &Arc<Mutex<Outcomes<io::Stderr>>>,
) -> Result<()> {
    let scratch = host.cache.scratch()?;
    let place = Place { variant: Some(variant), scratch: scratch.path() };
    let not_ended = || -> Vec<&Test> {
        let outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        tests.iter().filter(|test| !outcomes.ended().contains_key(*test)).collect()
    };
    let mut losses = 0;
    loop {
        let wanted = filter_of(&not_ended());
        let nextest = nextest_in(host, args, built, &place, Some(&wanted))?;
        let mut request = built.system.beside_containerd(host, &place, nextest)?;
        request.timeout = Some(if args.soak { SOAK_LIMIT } else { E2E_LIMIT });
        match exec::exec(host, &request, outcomes.clone()) {
            Ok(code) => return judge(code, not_ended().len(), outcomes),
            Err(error) if error.is::<Lost>() && losses < LOSSES => {
                losses += 1;
                eprintln!("==> {error}\n==> LOST the machine under the tests; the rest run in another");
                if not_ended().is_empty() {
                    return judge(ExitCode::SUCCESS, 0, outcomes);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether a run of which so many tests are missing is a good one.
fn judge(code: ExitCode, missing: usize, outcomes: &Mutex<Outcomes<io::Stderr>>) -> Result<()> {
    let failures = outcomes.lock().unwrap_or_else(PoisonError::into_inner).failures();
    ensure!(failures == 0, "{failures} whole-system tests failed");
    ensure!(
        code == ExitCode::SUCCESS,
        "the tests passed, but what they ran beside did not end well: see above"
    );
    ensure!(missing == 0, "{missing} whole-system tests did not run");
    Ok(())
}

/// A nextest filter for these tests and no others.
fn filter_of(tests: &[&Test]) -> String {
    let mut by_binary: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for test in tests {
        by_binary.entry(&test.binary).or_default().push(format!("test(={})", test.name));
    }
    let binaries = by_binary
        .into_iter()
        .map(|(binary, names)| format!("(binary_id(={binary}) & ({}))", names.join(" + ")))
        .collect::<Vec<_>>();
    if binaries.is_empty() { "none()".to_owned() } else { binaries.join(" + ") }
}

/// What each machine did, and the slowest tests.
fn summary(ran: &[Ran]) -> String {
    let mut text = String::from("machines:\n");
    for Ran { name, took, ended, failure, .. } in ran {
        let state = if failure.is_some() { "FAILED" } else { "ok" };
        // A string takes all that is written to it.
        let _ = writeln!(text, "  {name:<10} {:>10}  {:>3} tests  {state}", clock(*took), ended.len());
    }
    let mut slowest: Vec<_> = ran
        .iter()
        .flat_map(|one| one.ended.iter().map(|(test, outcome)| (outcome.took, one.variant, test)))
        .collect();
    slowest.sort_by_key(|(took, ..)| std::cmp::Reverse(*took));
    slowest.truncate(SLOWEST);
    text.push_str("the slowest tests:\n");
    for (took, variant, test) in slowest {
        let _ = writeln!(text, "  {:>10}  {:<7} {}", clock(took), variant.name(), test.id());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(binary: &str, name: &str) -> Test {
        Test { binary: binary.to_owned(), name: name.to_owned() }
    }

    #[test]
    fn machines_are_bounded_by_processors_and_by_memory() {
        assert_eq!(fitting(2, 24 * GIB), 2);
        assert_eq!(fitting(8, 24 * GIB), 4);
        assert_eq!(fitting(2, 8 * GIB), 1);
        assert_eq!(fitting(2, 0), 1);
    }

    #[test]
    fn filter_names_each_test_of_each_binary() {
        let tests = [test("e::a", "one"), test("e::b", "two"), test("e::a", "three")];
        let filter = filter_of(&tests.iter().collect::<Vec<_>>());
        assert_eq!(
            filter,
            "(binary_id(=e::a) & (test(=one) + test(=three))) + (binary_id(=e::b) & (test(=two)))"
        );
        assert_eq!(filter_of(&[]), "none()");
    }

    #[test]
    fn a_run_is_good_if_all_tests_ran_and_passed_and_nothing_else_failed() {
        let ended = |said: &str| {
            let mut outcomes = Outcomes::new(io::stderr(), "1".to_owned());
            io::Write::write_all(&mut outcomes, said.as_bytes()).unwrap();
            Mutex::new(outcomes)
        };
        let passed = || ended("PASS [   0.400s] (1/1) a::b one\n");
        judge(ExitCode::SUCCESS, 0, &passed()).unwrap();
        judge(ExitCode::SUCCESS, 1, &passed()).unwrap_err();
        judge(ExitCode::FAILURE, 0, &passed()).unwrap_err();
        judge(ExitCode::SUCCESS, 0, &ended("FAIL [   0.400s] (1/1) a::b one\n")).unwrap_err();
    }
}
