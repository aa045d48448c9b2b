//! Which tests have ended, read from what nextest says while they run.

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

/// Passes on what nextest says, and remembers how each test ended.
#[derive(Debug)]
pub(super) struct Outcomes<W> {
    to: W,
    line: Vec<u8>,
    passed: BTreeSet<Test>,
    failed: BTreeSet<Test>,
}

/// A test, as nextest names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Test {
    binary: String,
    name: String,
}

impl<W: Write> Outcomes<W> {
    /// Nothing has ended yet.
    pub(super) fn new(to: W) -> Self {
        Self { to, line: Vec::new(), passed: BTreeSet::new(), failed: BTreeSet::new() }
    }

    /// How many tests have not passed.
    pub(super) fn failures(&self) -> usize {
        self.failed.len()
    }

    /// A nextest filter for the tests of `filter` that have not ended.
    pub(super) fn rest(&self, filter: Option<&str>) -> String {
        let ended = self.passed.union(&self.failed);
        let mut rest = format!("({})", filter.unwrap_or("all()"));
        for Test { binary, name } in ended {
            rest.push_str(&format!(" - (binary_id(={binary}) & test(={name}))"));
        }
        rest
    }

    fn note(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        match parse(&line) {
            Some((true, test)) => self.passed.insert(test),
            Some((false, test)) => self.failed.insert(test),
            None => false,
        };
        self.line.clear();
    }
}

impl<W: Write> Write for Outcomes<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                self.note();
            } else {
                self.line.push(*byte);
            }
        }
        self.to.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// How often a whole-system test is tried: once, and by the retries of nextest's profile `e2e`.
const TRIES: &str = "2";

/// Whether a test passed, and which, from a line like `PASS [   0.400s] ( 1/90) crate::binary module::test`, or
/// `TRY 2 PASS [ …` for one that is tried more than once.
fn parse(line: &str) -> Option<(bool, Test)> {
    let (status, rest) = line.trim_start().split_once(" [")?;
    let (tries, status) =
        status.strip_prefix("TRY ").map_or(Some((TRIES, status)), |attempt| attempt.split_once(' '))?;
    let passed = match status {
        "PASS" | "LEAK" => true,
        // It will be tried again.
        _ if tries != TRIES => return None,
        "FAIL" | "TIMEOUT" | "ABORT" => false,
        other if other.starts_with("SIG") => false,
        _ => return None,
    };
    let (_, rest) = rest.split_once(") ")?;
    let (binary, name) = rest.trim_end().split_once(' ')?;
    Some((passed, Test { binary: binary.to_owned(), name: name.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_ended_is_not_run_again() {
        let mut outcomes = Outcomes::new(Vec::new());
        let said = "     Starting 3 tests across 2 binaries\n        PASS [   0.400s] ( 1/90) a::b one::two\n        \
                    SLOW [>120.000s] (-----) a::c three\n     TIMEOUT [ 480.001s] (50/90) a::c three\n    SIGSEGV [   \
                    1.0s] ( 3/90) a::d four\n        PASS [   0.4";
        for part in said.as_bytes().chunks(7) {
            outcomes.write_all(part).unwrap();
        }
        assert_eq!(outcomes.to, said.as_bytes());
        assert_eq!(outcomes.failures(), 2);
        assert_eq!(
            outcomes.rest(Some("test(x) | test(y)")),
            "(test(x) | test(y)) - (binary_id(=a::b) & test(=one::two)) - (binary_id(=a::c) & test(=three)) - \
             (binary_id(=a::d) & test(=four))"
        );
    }

    #[test]
    fn only_the_last_try_counts() {
        let mut outcomes = Outcomes::new(io::sink());
        let said = "  TRY 1 FAIL [   1.0s] ( 1/90) a::b one\n  TRY 2 PASS [   1.0s] ( 1/90) a::b one\n  TRY 1 FAIL [   \
                    1.0s] ( 2/90) a::b two\n  TRY 2 FAIL [   1.0s] ( 2/90) a::b two\n  TRY 1 FAIL [   1.0s] ( 3/90) a::b three\n";
        outcomes.write_all(said.as_bytes()).unwrap();
        assert_eq!(outcomes.failures(), 1);
        assert_eq!(outcomes.passed.len(), 1);
        assert!(!outcomes.rest(None).contains("three"));
    }

    #[test]
    fn without_a_filter_all_are_meant() {
        assert_eq!(Outcomes::new(io::sink()).rest(None), "(all())");
    }
}
