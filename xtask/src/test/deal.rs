//! Which machine runs which tests: the longest first, each where it ends soonest.

use std::{collections::BTreeMap, time::Duration};

use super::{durations::Durations, outcome::Test};
use crate::testbed::Variant;

/// What it takes to boot another machine and to start containerd in it.
const START: Duration = Duration::from_secs(40);

/// The tests that one machine at a time runs: for each variant that has any, in the order of the variants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lane {
    /// The tests by variant, never an empty list.
    pub(super) tests: BTreeMap<Variant, Vec<Test>>,
    /// How long all of it should take, the starts of machines included.
    pub(super) expected: Duration,
}

impl Lane {
    /// When it would be done if it also ran a test of this variant and length.
    fn with(&self, variant: Variant, length: Duration) -> Duration {
        let start = if self.tests.contains_key(&variant) { Duration::ZERO } else { START };
        self.expected + start + length
    }
}

/// Deals all tests out to so many machines side by side, by how long each took last time.
pub(super) fn deal(tests: Vec<(Variant, Test)>, durations: &Durations, machines: usize) -> Vec<Lane> {
    let mut timed: Vec<(Duration, Variant, Test)> = tests
        .into_iter()
        .map(|(variant, test)| (durations.expected(variant, &test), variant, test))
        .collect();
    // The same inputs are dealt in the same way: the sort is stable.
    timed.sort_by_key(|(length, ..)| std::cmp::Reverse(*length));
    let mut lanes = vec![Lane::default(); machines.max(1)];
    for (length, variant, test) in timed {
        if let Some(lane) = lanes.iter_mut().min_by_key(|lane| lane.with(variant, length)) {
            lane.expected = lane.with(variant, length);
            lane.tests.entry(variant).or_default().push(test);
        }
    }
    lanes.retain(|lane| !lane.tests.is_empty());
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &str) -> Test {
        Test { binary: "e2e::a".to_owned(), name: name.to_owned() }
    }

    fn durations(seconds: &[(Variant, &str, u64)]) -> Durations {
        let mut durations = Durations::default();
        for (variant, name, seconds) in seconds {
            durations.note(*variant, &test(name), Duration::from_secs(*seconds));
        }
        durations
    }

    #[test]
    fn deal_gives_the_longest_a_machine_of_its_own() {
        use Variant::Trixie;
        let known =
            durations(&[(Trixie, "long", 100), (Trixie, "a", 30), (Trixie, "b", 30), (Trixie, "c", 30)]);
        let tests = ["a", "b", "long", "c"].map(|name| (Trixie, test(name)));
        let lanes = deal(tests.into(), &known, 2);
        assert_eq!(lanes[0].tests[&Trixie], [test("long")]);
        assert_eq!(lanes[1].tests[&Trixie], ["a", "b", "c"].map(test));
        assert_eq!(lanes[1].expected, START + Duration::from_secs(90));
    }

    #[test]
    fn deal_boots_no_machine_for_what_another_has_time_for() {
        let known =
            durations(&[(Variant::Trixie, "a", 60), (Variant::Sid, "b", 60), (Variant::Sid, "c", 10)]);
        let tests = vec![(Variant::Trixie, test("a")), (Variant::Sid, test("b")), (Variant::Sid, test("c"))];
        let lanes = deal(tests, &known, 2);
        assert!(lanes.iter().all(|lane| lane.tests.len() == 1), "{lanes:?}");
    }

    #[test]
    fn deal_deals_each_test_once_to_any_number_of_machines() {
        let all: Vec<(Variant, Test)> = (0..50)
            .map(|number| (Variant::ALL[number % Variant::ALL.len()], test(&number.to_string())))
            .collect();
        for machines in 0..5 {
            let lanes = deal(all.clone(), &Durations::default(), machines);
            let mut dealt: Vec<_> = lanes
                .into_iter()
                .flat_map(|lane| lane.tests)
                .flat_map(|(variant, tests)| tests.into_iter().map(move |test| (variant, test)))
                .collect();
            let mut wanted = all.clone();
            dealt.sort();
            wanted.sort();
            assert_eq!(dealt, wanted);
        }
        assert_eq!(deal(Vec::new(), &Durations::default(), 2), []);
    }
}
