//! What a pod asks for in all, as its containers come, go and change.

use std::collections::HashMap;
use std::str::FromStr;

use serde_json::Value;

use super::{CPU_PERIOD, CPU_QUOTA, MEMORY, SizingError};

/// The kernel's default for the period (CFS bandwidth control), in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// What may be used at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes; 0: no limit.
    pub memory: u64,
    /// Processor time in microseconds of each second, so 1,000,000 are one processor; 0: no limit.
    pub cpu: u64,
}

/// What is to be changed of limits; what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    memory: Option<u64>,
    cpu: Option<u64>,
}

/// A pod's limits: those that its sandbox came with, moved by what became of its containers' since.
///
/// containerd adds up the containers' limits before the first of them is made, and never again. So a container's limits
/// count by how far they are from those that it was first seen with. Where the sandbox came without a limit, as it does
/// when one container has none, those of the containers that are there are added up.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    sandbox: Limits,
    /// By their names, which outlive them: a container that is made again has its predecessor's place.
    containers: HashMap<String, Member>,
}

#[derive(Clone, Debug)]
struct Member {
    /// The id of the container that has the name now; `None` when it is gone.
    holder: Option<String>,
    first: Limits,
    now: Limits,
}

impl Limits {
    fn map(self, other: Limits, merge: impl Fn(u64, u64) -> u64) -> Limits {
        Limits { memory: merge(self.memory, other.memory), cpu: merge(self.cpu, other.cpu) }
    }
}

impl Change {
    /// From the annotations of a sandbox.
    ///
    /// # Errors
    /// For annotations that are no numbers of their range.
    pub fn of_annotations(annotations: &HashMap<String, String>) -> Result<Change, SizingError> {
        let quota = number::<i64>(annotations, CPU_QUOTA)?;
        let period = number::<u64>(annotations, CPU_PERIOD)?;
        Ok(Change { memory: number(annotations, MEMORY)?, cpu: quota.map(|quota| share(quota, period)) })
    }

    /// From the OCI specification's `linux.resources`.
    pub fn of_resources(resources: Option<&Value>) -> Change {
        let value = |pointer: &str| resources.and_then(|resources| resources.pointer(pointer));
        let quota = value("/cpu/quota").and_then(Value::as_i64);
        let period = value("/cpu/period").and_then(Value::as_u64);
        // Below 0: none.
        let memory = value("/memory/limit").and_then(Value::as_i64);
        Change {
            memory: memory.map(|memory| u64::try_from(memory).unwrap_or(0)),
            cpu: quota.map(|quota| share(quota, period)),
        }
    }

    /// From numbers as CRI has them: 0 is no word on a limit.
    ///
    /// # Errors
    /// For a period below 0.
    pub fn of_numbers(memory: i64, quota: i64, period: i64) -> Result<Change, SizingError> {
        let wrong = |_| SizingError::Number { name: CPU_PERIOD, value: period.to_string() };
        let period = u64::try_from(period).map_err(wrong)?;
        Ok(Change {
            memory: (memory != 0).then(|| u64::try_from(memory).unwrap_or(0)),
            cpu: (quota != 0).then(|| share(quota, Some(period))),
        })
    }

    /// The limits after the change.
    pub fn apply(self, limits: Limits) -> Limits {
        Limits { memory: self.memory.unwrap_or(limits.memory), cpu: self.cpu.unwrap_or(limits.cpu) }
    }
}

impl Demand {
    /// That of a pod whose sandbox has these limits.
    pub fn new(sandbox: Limits) -> Demand {
        Demand { sandbox, containers: HashMap::new() }
    }

    /// All of the pod's limits.
    pub fn limits(&self) -> Limits {
        let live = self.containers.values().filter(|member| member.holder.is_some());
        let sum = live.fold(Limits::default(), |sum, member| sum.map(member.now, u64::saturating_add));
        let moved = self.containers.values().fold(self.sandbox, |limits, member| member.move_limits(limits));
        let pick = |sandbox, moved, sum| if sandbox == 0 { sum } else { moved };
        Limits {
            memory: pick(self.sandbox.memory, moved.memory, sum.memory),
            cpu: pick(self.sandbox.cpu, moved.cpu, sum.cpu),
        }
    }

    /// Whether the sandbox came without a memory or a processor limit, so that the containers' are all there is.
    pub fn is_open(&self) -> (bool, bool) {
        (self.sandbox.memory == 0, self.sandbox.cpu == 0)
    }

    /// A container with these limits was made.
    pub fn add(&mut self, name: &str, id: &str, limits: Limits) {
        let member = Member { holder: None, first: limits, now: limits };
        let member = self.containers.entry(name.to_owned()).or_insert(member);
        member.holder = Some(id.to_owned());
        member.now = limits;
    }

    /// A container's limits change.
    pub fn change(&mut self, id: &str, change: Change) {
        let found = self.containers.values_mut().find(|member| member.holder.as_deref() == Some(id));
        if let Some(member) = found {
            member.now = change.apply(member.now);
        }
    }

    /// The limits of the sandbox itself change: they are what the containers' add up to now.
    pub fn change_sandbox(&mut self, change: Change) {
        self.sandbox = change.apply(self.sandbox);
        for member in self.containers.values_mut() {
            let Limits { memory, cpu } = member.now;
            member.first = Limits {
                memory: if change.memory.is_some() { memory } else { member.first.memory },
                cpu: if change.cpu.is_some() { cpu } else { member.first.cpu },
            };
        }
    }

    /// A container is gone. Its name is kept for its successor.
    pub fn remove(&mut self, id: &str) {
        for member in self.containers.values_mut().filter(|member| member.holder.as_deref() == Some(id)) {
            member.holder = None;
        }
    }
}

impl Member {
    /// Moves a sum of limits by what became of this one's. One that it did not have, or has no more, moves nothing.
    fn move_limits(&self, sum: Limits) -> Limits {
        let step = |sum: u64, first: u64, now: u64| match (first, now) {
            (0, _) | (_, 0) => sum,
            // Never to 0, which would be none at all.
            _ => sum.saturating_add(now).saturating_sub(first).max(1),
        };
        Limits {
            memory: step(sum.memory, self.first.memory, self.now.memory),
            cpu: step(sum.cpu, self.first.cpu, self.now.cpu),
        }
    }
}

/// The share of each second, in microseconds, that a quota in each period is. No quota: 0.
fn share(quota: i64, period: Option<u64>) -> u64 {
    // A client that has no word on it writes 0, which the kernel would not take.
    let period = period.filter(|period| *period != 0).unwrap_or(DEFAULT_PERIOD);
    let quota = u128::from(u64::try_from(quota).unwrap_or(0));
    u64::try_from((quota * 1_000_000).div_ceil(u128::from(period))).unwrap_or(u64::MAX)
}

fn number<T: FromStr>(
    annotations: &HashMap<String, String>,
    name: &'static str,
) -> Result<Option<T>, SizingError> {
    let parse = |value: &String| {
        value.parse().map_err(|_| SizingError::Number { name, value: value.chars().take(64).collect() })
    };
    annotations.get(name).map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const MIB: u64 = 1 << 20;

    fn memory(mib: u64) -> Limits {
        Limits { memory: mib * MIB, cpu: 0 }
    }

    fn to_memory(mib: u64) -> Change {
        Change { memory: Some(mib * MIB), cpu: None }
    }

    #[test]
    fn a_pods_limits_move_with_those_of_its_containers() {
        let mut demand = Demand::new(memory(300));
        demand.add("a", "1", memory(100));
        demand.add("b", "2", memory(200));
        assert_eq!(demand.limits(), memory(300));
        demand.change("1", to_memory(150));
        assert_eq!(demand.limits(), memory(350));
        demand.change("2", to_memory(50));
        assert_eq!(demand.limits(), memory(200));
        demand.change("3", to_memory(1));
        assert_eq!(demand.limits(), memory(200), "a container that nobody knows");
    }

    #[test]
    fn a_container_that_is_made_again_has_its_predecessors_place() {
        let mut demand = Demand::new(memory(300));
        demand.add("a", "1", memory(100));
        demand.change("1", to_memory(150));
        // The successor comes before its predecessor goes.
        demand.add("a", "2", memory(150));
        demand.remove("1");
        assert_eq!(demand.limits(), memory(350));
        demand.remove("2");
        assert_eq!(demand.limits(), memory(350), "it may come again");
    }

    #[test]
    fn without_a_limit_of_the_sandbox_the_containers_are_added_up() {
        let mut demand = Demand::new(Limits::default());
        demand.add("a", "1", memory(100));
        demand.add("b", "2", Limits::default());
        assert_eq!(demand.limits(), memory(100));
        demand.change("2", to_memory(70));
        assert_eq!(demand.limits(), memory(170));
        demand.remove("1");
        assert_eq!(demand.limits(), memory(70));
    }

    #[test]
    fn a_container_whose_limit_is_lifted_moves_nothing() {
        let mut demand = Demand::new(memory(300));
        demand.add("a", "1", memory(100));
        demand.change("1", Change { memory: Some(0), cpu: None });
        assert_eq!(demand.limits(), memory(300));
    }

    #[test]
    fn the_sandbox_can_be_told_what_it_is() {
        let mut demand = Demand::new(memory(300));
        demand.add("a", "1", memory(100));
        demand.change("1", to_memory(200));
        demand.change_sandbox(to_memory(500));
        assert_eq!(demand.limits(), memory(500));
        demand.change("1", to_memory(250));
        assert_eq!(demand.limits(), memory(550));
        demand.change_sandbox(Change { memory: None, cpu: Some(7) });
        assert_eq!(demand.limits(), Limits { cpu: 7, ..memory(550) });
    }

    #[test]
    fn reads_resources_and_annotations() {
        let resources = json!({"memory": {"limit": 5}, "cpu": {"quota": 50_000, "period": 100_000}});
        let change = Change::of_resources(Some(&resources));
        assert_eq!(change.apply(Limits::default()), Limits { memory: 5, cpu: 500_000 });
        let none = json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "shares": 2}});
        let change = Change::of_resources(Some(&none));
        assert_eq!(change.apply(Limits { memory: 7, cpu: 7 }), Limits::default());
        assert_eq!(Change::of_resources(None).apply(memory(7)), memory(7));
        let unsaid = json!({"cpu": {"quota": 50_000, "period": 0}});
        assert_eq!(
            Change::of_resources(Some(&unsaid)).apply(memory(7)),
            Limits { cpu: 500_000, ..memory(7) }
        );
        let unsaid = [(CPU_QUOTA.to_owned(), "0".to_owned()), (CPU_PERIOD.to_owned(), "0".to_owned())].into();
        let limits = Change::of_annotations(&unsaid).unwrap().apply(Limits::default());
        assert_eq!(limits, Limits::default(), "memory alone is limited");
        for (name, value) in [(MEMORY, "-1"), (MEMORY, "1Gi"), (CPU_QUOTA, "x"), (CPU_PERIOD, "")] {
            let annotations = [(name.to_owned(), value.to_owned())].into();
            assert!(
                matches!(Change::of_annotations(&annotations), Err(SizingError::Number { .. })),
                "{name}"
            );
        }
    }

    proptest! {
        #[test]
        fn changes_and_their_reverses_leave_what_was(sizes in prop::collection::vec((1u64..1000, 1u64..1000), 1..8)) {
            let total = sizes.iter().map(|(before, _)| before).sum();
            let mut demand = Demand::new(memory(total));
            for (index, (before, _)) in sizes.iter().enumerate() {
                demand.add(&index.to_string(), &index.to_string(), memory(*before));
            }
            for (index, (_, after)) in sizes.iter().enumerate() {
                demand.change(&index.to_string(), to_memory(*after));
            }
            // Of containers that all have limits, the pod's is the sum.
            prop_assert_eq!(demand.limits(), memory(sizes.iter().map(|(_, after)| after).sum()));
            for (index, (before, _)) in sizes.iter().enumerate() {
                demand.change(&index.to_string(), to_memory(*before));
            }
            prop_assert_eq!(demand.limits(), memory(total));
        }
    }
}
