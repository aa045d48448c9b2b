//! `cargo xtask bench pod`: pods of one container through containerd's CRI, booted and from a template, beside runc's in the
//! same run, at the defaults that ship.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    host::Host,
    products::Optimization,
    system::{Place, System},
    testbed::{MachineArgs, Variant, exec},
};

/// Options of `cargo xtask bench pod`.
#[derive(Args, Debug)]
pub(crate) struct PodArgs {
    /// Also write the figures here, as one JSON object.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measure so many pods of each kind and take the medians.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// For the memory of each further pod, start so many of a kind.
    #[arg(long, default_value_t = 20)]
    pods: usize,
    /// The Debian of the testbed, and so containerd's version.
    #[arg(long, value_enum, default_value_t)]
    variant: Variant,
    /// Measure no times: show where the memory of an idle pod is.
    #[arg(long, conflicts_with = "json")]
    memory: bool,
    /// On this host instead of in the testbed: plain time, and only where KVM is real.
    #[arg(long, conflicts_with = "variant")]
    direct: bool,
}

/// All values that were measured, by the figure's name and by kind of pod.
type Values = BTreeMap<String, BTreeMap<String, Vec<f64>>>;

/// The kinds of pods, in the table's order.
const KINDS: [&str; 3] = ["cold", "template", "runc"];
/// What all others are compared with.
const RIVAL: &str = "runc";

/// Builds the system, measures it, prints the table.
///
/// # Errors
/// When something can't be built or a pod fails.
pub(crate) fn run(host: &Host, args: &PodArgs) -> Result<ExitCode> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    let system = System::build(host, Optimization::Shipped, None)?;
    let scratch = host.cache.scratch()?;
    let variant = (!args.direct).then_some(args.variant);
    let place = Place { variant, scratch: scratch.path() };
    let pods = place.path(host, &system.products.join("pods"))?;
    let measure = Measure { host, args, system: &system, place: &place };
    if args.memory {
        return measure.run(vec![pods, "memory".to_owned()], false).map(|(code, _)| code);
    }
    let mut values = Values::new();
    // Many pods at once would take hours where each instruction is counted; their times are told as they are.
    let counted = vec![pods.clone(), "times".to_owned(), format!("--runs={}", args.runs)];
    let crowded = vec![pods, "crowd".to_owned(), format!("--pods={}", args.pods)];
    for (command, icount) in [(counted, true), (crowded, false)] {
        let (code, measured) = measure.run(command, icount)?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
        values.extend(measured);
    }
    print!("{}", table(&values, args));
    if let Some(path) = &args.json {
        fs::write(path, json(&values)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Measure<'a> {
    host: &'a Host,
    args: &'a PodArgs,
    system: &'a System,
    place: &'a Place<'a>,
}

impl Measure<'_> {
    /// Runs a command beside containerd, and returns what it has measured, if it measures.
    fn run(&self, mut command: Vec<String>, icount: bool) -> Result<(ExitCode, Values)> {
        let exchange =
            tempfile::tempdir_in(&self.host.target).context("making a directory for the results")?;
        let there = if self.args.direct { exchange.path() } else { Path::new("/exchange") };
        let measures = !self.args.memory;
        if measures {
            command.push(format!("--results={}", there.join("pods.json").display()));
        }
        let mut request = self.system.beside_containerd(self.host, self.place, command)?;
        request.machine = MachineArgs { icount, boot_timeout: 300, ..request.machine };
        request.exchange = Some(exchange.path().to_owned());
        let code = exec::exec(self.host, &request, exec::standard_error())?;
        if code != ExitCode::SUCCESS || !measures {
            return Ok((code, Values::new()));
        }
        let text = fs::read_to_string(exchange.path().join("pods.json")).context("reading the results")?;
        Ok((code, serde_json::from_str(&text).context("parsing the results")?))
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn table(values: &Values, args: &PodArgs) -> String {
    let time = if args.direct { "time" } else { "virtual time: a ms is 1 M instructions" };
    let mut table = format!("medians of {} ({time})\n", args.runs);
    let [cold, template, runc] = KINDS;
    let _ = writeln!(
        table,
        "{:44} {cold:>9} {template:>9} {runc:>9} {:>9} {:>9}",
        "",
        format!("{cold}/{runc}"),
        format!("{template}/{runc}")
    );
    for (name, by_kind) in values {
        let of = |kind: &str| by_kind.get(kind).and_then(|values| median(values));
        let rival = of(RIVAL).filter(|rival| *rival > 0.0);
        let ratio = |kind| of(kind).zip(rival).map(|(ours, theirs)| ours / theirs);
        let _ = write!(table, "{name:44}");
        for value in KINDS.map(of) {
            let _ =
                write!(table, " {:>9}", value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1}")));
        }
        for value in [ratio(cold), ratio(template)] {
            let _ = write!(table, " {:>9}", value.map_or_else(String::new, |value| format!("{value:.2}")));
        }
        let _ = writeln!(table);
    }
    table
}

/// One flat object: the median of each figure by its name and kind, and for those of a crowd the slowest, too.
fn json(values: &Values) -> String {
    let mut object = Map::new();
    for (name, by_kind) in values {
        for (kind, values) in by_kind {
            object.insert(format!("{name}_{kind}"), median(values).into());
            if name.starts_with("crowd_") {
                let slowest = values.iter().copied().max_by(f64::total_cmp);
                object.insert(format!("{name}_{kind}_max"), slowest.into());
            }
        }
    }
    format!("{:#}\n", Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_come_out_under_their_names() {
        let text = r#"{"exec_ms": {"cold": [3.0, 1.0, 2.0], "runc": [4.0]},
                       "crowd_until_started_ms": {"template": [5.0, 9.0, 7.0]},
                       "pod_pss_kb": {"template": [9.0]}}"#;
        let values: Values = serde_json::from_str(text).unwrap();
        let figures: Value = serde_json::from_str(&json(&values)).unwrap();
        assert_eq!(figures["exec_ms_cold"], 2.0);
        assert_eq!(figures["exec_ms_runc"], 4.0);
        assert_eq!(figures["pod_pss_kb_template"], 9.0);
        assert_eq!(figures["crowd_until_started_ms_template"], 7.0);
        assert_eq!(figures["crowd_until_started_ms_template_max"], 9.0);
        let args =
            PodArgs { json: None, runs: 3, pods: 20, memory: false, variant: Variant::Trixie, direct: false };
        let table = table(&values, &args);
        assert!(table.contains("0.50"), "{table}");
    }
}
