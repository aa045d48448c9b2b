//! Steps that go on side by side, told on one line: which are at work, their shares of the whole, the time so far.

use std::{
    io::{IsTerminal, Write, stderr},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::proc::{self, HEARTBEAT, clock};

/// The line, for as long as this lives. Nothing else tells of its progress meanwhile.
#[derive(Debug)]
pub(crate) struct Overview {
    shared: Arc<Shared>,
    ticker: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    terminal: bool,
    steps: Mutex<Vec<Step>>,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    name: &'static str,
    /// Seconds of work: what it takes beside nothing else.
    weight: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waits,
    Works,
    Ended,
}

impl Overview {
    /// Starts the line of these steps, each with its weight.
    pub(crate) fn start(steps: &[(&'static str, u32)]) -> Self {
        let steps = steps.iter().map(|&(name, weight)| Step { name, weight, state: State::Waits }).collect();
        let shared = Arc::new(Shared {
            started: Instant::now(),
            terminal: stderr().is_terminal(),
            steps: Mutex::new(steps),
        });
        proc::tell_progress(false);
        let (stop, stopped) = mpsc::channel::<()>();
        let told = Arc::clone(&shared);
        let period = if shared.terminal { Duration::from_secs(1) } else { HEARTBEAT };
        let ticker = thread::spawn(move || {
            while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                told.tell();
            }
        });
        Self { shared, ticker: Some((stop, ticker)) }
    }

    /// Does the work of a step.
    ///
    /// # Errors
    /// When the work fails. It is told at once, as the steps beside it may go on for long.
    pub(crate) fn step<T>(&self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.shared.set(name, State::Works);
        let started = Instant::now();
        let result = work();
        if let Err(error) = &result {
            let clear = if self.shared.terminal { CLEAR } else { "" };
            eprintln!("{clear}==> {name} failed after {}: {error:#}", clock(started.elapsed()));
        }
        self.shared.set(name, State::Ended);
        result
    }
}

impl Drop for Overview {
    fn drop(&mut self) {
        if let Some((stop, ticker)) = self.ticker.take() {
            drop(stop);
            // A ticker that panicked has nothing left to show.
            let _ = ticker.join();
        }
        if self.shared.terminal {
            eprintln!();
        }
        proc::tell_progress(true);
    }
}

/// Back to the start of a terminal's line, and what was there is gone.
const CLEAR: &str = "\r\x1b[K";

impl Shared {
    fn set(&self, name: &str, state: State) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.iter_mut().filter(|step| step.name == name).for_each(|step| step.state = state);
        drop(steps);
        self.tell();
    }

    fn tell(&self) {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let line = line(&steps, self.started.elapsed());
        if self.terminal {
            eprint!("{CLEAR}{line}");
            // What a terminal does not take, nobody sees.
            let _ = stderr().flush();
        } else {
            eprintln!("{line}");
        }
    }
}

fn line(steps: &[Step], elapsed: Duration) -> String {
    let whole = steps.iter().map(|step| step.weight).sum::<u32>().max(1);
    let share = |weight: u32| u64::from(weight) * 100 / u64::from(whole);
    let in_state = |state| steps.iter().filter(move |step| step.state == state);
    let done = in_state(State::Ended).map(|step| step.weight).sum();
    let working: Vec<String> = in_state(State::Works)
        .map(|step| format!("{} ({} % of the work)", step.name, share(step.weight)))
        .collect();
    let mut line = format!("==> {}: {} % done", clock(elapsed), share(done));
    if !working.is_empty() {
        line.push_str("; now ");
        line.push_str(&working.join(", "));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overview_tells_what_is_at_work_and_its_share() {
        let step = |name, weight, state| Step { name, weight, state };
        let steps = [step("a", 50, State::Ended), step("b", 100, State::Works), step("c", 50, State::Waits)];
        let told = line(&steps, Duration::from_secs(65));
        assert_eq!(told, "==> 1:05 min: 25 % done; now b (50 % of the work)");
        assert_eq!(line(&[], Duration::ZERO), "==> 0.0 s: 0 % done");
    }

    #[test]
    fn overview_hands_on_what_a_step_gives_and_counts_it_as_ended() {
        let overview = Overview::start(&[("one", 1), ("two", 1)]);
        assert_eq!(overview.step("one", || Ok(1)).unwrap(), 1);
        let error = overview.step::<()>("two", || anyhow::bail!("no")).unwrap_err();
        assert_eq!(error.to_string(), "no");
        let steps = overview.shared.steps.lock().unwrap();
        assert!(steps.iter().all(|step| step.state == State::Ended), "{steps:?}");
    }
}
