//! Where the time of a start or a removal goes: the first question is always why it was slow.

use std::fmt;
use std::time::{Duration, Instant};

/// The parts of something that takes time, one after the other.
///
/// Shown as `812.4 ms (cgroup 1.2, share 5.0, …)`.
#[derive(Clone, Debug)]
pub struct Phases {
    begin: Instant,
    last: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Phases {
    /// Begins with the first part.
    pub fn begin() -> Phases {
        let now = Instant::now();
        Phases { begin: now, last: now, done: Vec::new() }
    }

    /// A part is done, and the next one begins. The time of a part that comes more than once is its sum.
    pub fn done(&mut self, part: &'static str) {
        let now = Instant::now();
        let time = now.saturating_duration_since(self.last);
        match self.done.iter_mut().find(|(name, _)| *name == part) {
            Some((_, sum)) => *sum += time,
            None => self.done.push((part, time)),
        }
        self.last = now;
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        write!(formatter, "{:.1} ms (", ms(self.last.saturating_duration_since(self.begin)))?;
        for (index, (part, time)) in self.done.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(formatter, "{comma}{part} {:.1}", ms(*time))?;
        }
        formatter.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_add_up() {
        let mut phases = Phases::begin();
        std::thread::sleep(Duration::from_millis(2));
        phases.done("one");
        phases.done("two");
        std::thread::sleep(Duration::from_millis(1));
        phases.done("one");
        assert_eq!(phases.done.len(), 2);
        let total: Duration = phases.done.iter().map(|(_, time)| *time).sum();
        assert_eq!(total, phases.last - phases.begin);
        let text = phases.to_string();
        assert!(text.contains(" ms (one ") && text.contains(", two 0."), "{text}");
    }
}
