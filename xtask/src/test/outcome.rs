//! Which tests have ended, read from what nextest says while they run.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Duration,
};

/// Passes on what nextest says, each line behind the name of the machine, and remembers how each test ended.
#[derive(Debug)]
pub(super) struct Outcomes<W> {
    to: W,
    name: String,
    line: Vec<u8>,
    ended: BTreeMap<Test, Outcome>,
}

/// A test, as nextest names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Test {
    /// The identifier of its binary.
    pub(super) binary: String,
    /// Its name in there.
    pub(super) name: String,
}

impl Test {
    /// Both in one word.
    pub(super) fn id(&self) -> String {
        format!("{} {}", self.binary, self.name)
    }
}

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Whether it passed, at the first try or at a later one.
    pub(super) passed: bool,
    /// How long that try took.
    pub(super) took: Duration,
}

impl<W: Write> Outcomes<W> {
    /// Nothing has ended yet on the machine of this name.
    pub(super) fn new(to: W, name: String) -> Self {
        Self { to, name, line: Vec::new(), ended: BTreeMap::new() }
    }

    /// Every test that has ended so far.
    pub(super) fn ended(&self) -> &BTreeMap<Test, Outcome> {
        &self.ended
    }

    /// How many tests have not passed.
    pub(super) fn failures(&self) -> usize {
        self.ended.values().filter(|outcome| !outcome.passed).count()
    }

    fn end_of_line(&mut self) -> io::Result<()> {
        let line = String::from_utf8_lossy(&self.line);
        if let Some((test, outcome)) = parse(&line) {
            self.ended.insert(test, outcome);
        }
        let passed_on = format!("[{}] {line}\n", self.name);
        self.line.clear();
        // In one piece: other machines write to the same place.
        self.to.write_all(passed_on.as_bytes())
    }
}

impl<W: Write> Write for Outcomes<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                self.end_of_line()?;
            } else {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// How often a whole-system test is tried: once, and by the retries of nextest's profile `e2e`.
const TRIES: &str = "2";

/// A test and how it ended, from a line like `PASS [   0.400s] ( 1/90) crate::binary module::test`, or
/// `TRY 2 PASS [ …` for one that is tried more than once.
fn parse(line: &str) -> Option<(Test, Outcome)> {
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
    let (seconds, rest) = rest.split_once("s]")?;
    let took = Duration::try_from_secs_f64(seconds.trim().parse().ok()?).ok()?;
    let (_, rest) = rest.split_once(") ")?;
    let (binary, name) = rest.trim_end().split_once(' ')?;
    Some((Test { binary: binary.to_owned(), name: name.to_owned() }, Outcome { passed, took }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Outcomes<Vec<u8>> {
        let mut outcomes = Outcomes::new(Vec::new(), "sid".to_owned());
        for part in text.as_bytes().chunks(7) {
            outcomes.write_all(part).unwrap();
        }
        outcomes
    }

    #[test]
    fn outcomes_are_those_of_complete_lines() {
        let outcomes = said(
            "     Starting 3 tests across 2 binaries\n        PASS [   0.400s] ( 1/90) a::b one::two\n        \
             SLOW [>120.000s] (-----) a::c three\n     TIMEOUT [ 480.001s] (50/90) a::c three\n    SIGSEGV [   \
             1.0s] ( 3/90) a::d four\n        PASS [   0.4",
        );
        let ended: Vec<_> = outcomes
            .ended()
            .iter()
            .map(|(test, outcome)| (test.id(), outcome.passed, outcome.took.as_millis()))
            .collect();
        assert_eq!(
            ended,
            [
                ("a::b one::two".to_owned(), true, 400),
                ("a::c three".to_owned(), false, 480_001),
                ("a::d four".to_owned(), false, 1000)
            ]
        );
        assert_eq!(outcomes.failures(), 2);
        let passed_on = String::from_utf8(outcomes.to).unwrap();
        assert!(
            passed_on.starts_with("[sid]      Starting 3 tests across 2 binaries\n[sid]  "),
            "{passed_on}"
        );
        assert!(passed_on.ends_with("( 3/90) a::d four\n"), "{passed_on}");
    }

    #[test]
    fn outcomes_are_those_of_the_last_try() {
        let outcomes = said(
            "  TRY 1 FAIL [   1.0s] ( 1/90) a::b one\n  TRY 2 PASS [   1.0s] ( 1/90) a::b one\n  TRY 1 FAIL [   \
             1.0s] ( 2/90) a::b two\n  TRY 2 FAIL [   1.0s] ( 2/90) a::b two\n  TRY 1 FAIL [   1.0s] ( 3/90) a::b three\n",
        );
        assert_eq!(outcomes.failures(), 1);
        assert_eq!(outcomes.ended().len(), 2);
    }
}
