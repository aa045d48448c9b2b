//! A run of several steps, and where its time went.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::proc::clock;

/// The steps so far. A failed step does not keep later ones from running; it fails the run at its end.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<Step>,
    notes: String,
}

#[derive(Debug)]
struct Step {
    name: String,
    elapsed: Duration,
    failure: Option<String>,
}

impl Steps {
    /// Runs a step; `None` when it failed.
    pub(crate) fn run<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        eprintln!("\n=== {name}");
        let started = Instant::now();
        let result = work();
        let elapsed = started.elapsed();
        let failure = result.as_ref().err().map(|error| format!("{error:#}"));
        if let Some(failure) = &failure {
            eprintln!("=== {name} failed after {}: {failure}", clock(elapsed));
        }
        self.done.push(Step { name: name.to_owned(), elapsed, failure });
        result.ok()
    }

    /// Adds text that is printed before the lines of the steps.
    pub(crate) fn note(&mut self, text: &str) {
        self.notes.push_str(text);
    }

    /// Prints the notes, and a line per step.
    ///
    /// # Errors
    /// When a step failed.
    pub(crate) fn finish(self) -> Result<()> {
        eprintln!("\n{}\n{}", self.notes, self.summary());
        let failed: Vec<&str> =
            self.done.iter().filter(|step| step.failure.is_some()).map(|step| step.name.as_str()).collect();
        if failed.is_empty() {
            return Ok(());
        }
        bail!("failed: {}", failed.join(", "))
    }

    fn summary(&self) -> String {
        let width = self.done.iter().map(|step| step.name.len()).max().unwrap_or(0);
        let total: Duration = self.done.iter().map(|step| step.elapsed).sum();
        let line = |name: &str, elapsed: Duration, state: &str| {
            format!("{name:width$}  {:>10}  {state}", clock(elapsed)).trim_end().to_owned()
        };
        let mut lines: Vec<String> = self
            .done
            .iter()
            .map(|step| line(&step.name, step.elapsed, if step.failure.is_some() { "FAILED" } else { "ok" }))
            .collect();
        lines.push(line("total", total, ""));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_fails_the_run_at_its_end() {
        let mut steps = Steps::default();
        assert_eq!(steps.run("one", || anyhow::bail!("no")), None::<()>);
        assert_eq!(steps.run("two", || Ok(2)), Some(2));
        let summary = steps.summary();
        assert!(summary.lines().next().unwrap().ends_with("FAILED"), "{summary}");
        assert!(summary.lines().nth(1).unwrap().ends_with("ok"), "{summary}");
        assert_eq!(steps.finish().unwrap_err().to_string(), "failed: one");
    }

    #[test]
    fn a_run_without_failures_succeeds() {
        let mut steps = Steps::default();
        steps.run("one", || Ok(()));
        steps.finish().unwrap();
    }
}
