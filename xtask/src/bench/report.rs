//! Figures, for people and for programs.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::{Map, Value};

/// The name of the one that is measured.
pub(super) const CAISSON: &str = "caisson";
/// The name of the one beside it.
pub(super) const QEMU: &str = "qemu";

/// Medians, by name, and by who was measured.
pub(super) type ByName = BTreeMap<String, BTreeMap<String, f64>>;

/// All figures of a run.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Figures {
    /// How many runs each median is of.
    pub(super) runs: usize,
    /// The same of throughput.
    pub(super) throughput_runs: usize,
    /// Virtual time: a millisecond is a million instructions.
    pub(super) instructions: bool,
    /// The medians.
    pub(super) medians: ByName,
    /// What could not be measured, and why.
    pub(super) failures: Vec<String>,
}

impl Figures {
    /// Keeps the median of `values`.
    pub(super) fn add(&mut self, name: &str, who: &str, mut values: Vec<f64>) {
        values.sort_by(f64::total_cmp);
        // The one in the middle, or the two.
        let upper = values.len() / 2;
        let lower = values.len().saturating_sub(1) / 2;
        if let (Some(lower), Some(upper)) = (values.get(lower), values.get(upper)) {
            let median = f64::midpoint(*lower, *upper);
            self.medians.entry(name.to_owned()).or_default().insert(who.to_owned(), median);
        }
    }

    /// What was kept.
    pub(super) fn get(&self, name: &str, who: &str) -> Option<f64> {
        self.medians.get(name)?.get(who).copied()
    }

    /// One row a figure.
    pub(super) fn table(&self) -> String {
        let unit =
            if self.instructions { "a virtual ms is 1 M instructions" } else { "time, not instructions" };
        let (runs, fewer) = (self.runs, self.throughput_runs);
        let mut table = format!("medians of {runs}, of throughput {fewer} ({unit})\n");
        let _ = writeln!(table, "{:32} {:>12} {:>12} {:>9}", "", "caisson", "microvm", "ratio");
        for (name, by_name) in &self.medians {
            let cell =
                |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"));
            let (ours, theirs) = (by_name.get(CAISSON).copied(), by_name.get(QEMU).copied());
            let ratio = ours.zip(theirs).filter(|(_, theirs)| *theirs != 0.0);
            let ratio = ratio.map(|(ours, theirs)| ours / theirs);
            let _ = writeln!(table, "{name:32} {:>12} {:>12} {:>9}", cell(ours), cell(theirs), cell(ratio));
        }
        table
    }

    /// One flat object: our figures by their names, QEMU's with `qemu_` in front.
    pub(super) fn json(&self) -> String {
        let mut object = Map::new();
        object.insert("runs".to_owned(), self.runs.into());
        object.insert("throughput_runs".to_owned(), self.throughput_runs.into());
        object.insert("instructions".to_owned(), self.instructions.into());
        for (name, by_name) in &self.medians {
            for (who, value) in by_name {
                let key = if who == CAISSON { name.clone() } else { format!("{who}_{name}") };
                object.insert(key, (*value).into());
            }
        }
        format!("{:#}\n", Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_come_out_under_their_names() {
        let mut figures = Figures { runs: 3, instructions: true, ..Figures::default() };
        figures.add("spawn_to_init_minstr", CAISSON, vec![70.0, 60.0, 65.0]);
        figures.add("spawn_to_init_minstr", QEMU, vec![130.0, 900.0, 1.0]);
        figures.add("nothing", CAISSON, vec![]);
        figures.add("even", CAISSON, vec![4.0, 1.0, 9.0, 2.0]);
        assert_eq!(figures.get("even", CAISSON), Some(3.0));
        assert_eq!(figures.get("spawn_to_init_minstr", CAISSON), Some(65.0));
        let json: Value = serde_json::from_str(&figures.json()).unwrap();
        assert_eq!(json["spawn_to_init_minstr"], 65.0);
        assert_eq!(json["qemu_spawn_to_init_minstr"], 130.0);
        assert!(figures.table().contains("0.50"), "{}", figures.table());
    }
}
