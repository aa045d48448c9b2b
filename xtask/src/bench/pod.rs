//! `cargo xtask bench pod`: pods of one container through containerd's CRI, beside runc's in the same run.

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

/// All values that were measured, by the figure's name and by handler.
type Values = BTreeMap<String, BTreeMap<String, Vec<f64>>>;

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
    let exchange = tempfile::tempdir_in(&host.target).context("making a directory for the results")?;
    let there = if args.direct { exchange.path() } else { Path::new("/exchange") };
    let pods = place.path(host, &system.products.join("pods"))?;
    let results = format!("--results={}", there.join("pods.json").display());
    let mut command = vec![pods];
    if args.memory {
        command.push("memory".to_owned());
    } else {
        command.extend(["bench".to_owned(), format!("--runs={}", args.runs), results]);
    }
    let mut request = system.beside_containerd(host, &place, command)?;
    // Counting instructions makes them slower, and memory is the same without.
    request.machine = MachineArgs { icount: !args.memory, boot_timeout: 300, ..request.machine };
    request.exchange = Some(exchange.path().to_owned());
    let code = exec::exec(host, &request, exec::standard_error())?;
    if code != ExitCode::SUCCESS || args.memory {
        return Ok(code);
    }
    let text = fs::read_to_string(exchange.path().join("pods.json")).context("reading the results")?;
    let values: Values = serde_json::from_str(&text).context("parsing the results")?;
    print!("{}", table(&values, args));
    if let Some(path) = &args.json {
        fs::write(path, json(&values)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn table(values: &Values, args: &PodArgs) -> String {
    let time = if args.direct { "time" } else { "virtual time: a ms is 1 M instructions" };
    let mut table = format!("medians of {} ({time})\n", args.runs);
    let _ = writeln!(table, "{:40} {:>10} {:>10} {:>7}", "", "caisson", "runc", "ratio");
    for (name, by_handler) in values {
        let of = |handler: &str| by_handler.get(handler).and_then(|values| median(values));
        let cell = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1}"));
        let (ours, theirs) = (of("caisson"), of("runc"));
        let ratio = ours.zip(theirs).filter(|(_, theirs)| *theirs > 0.0).map(|(ours, theirs)| ours / theirs);
        let _ = writeln!(table, "{name:40} {:>10} {:>10} {:>7}", cell(ours), cell(theirs), cell(ratio));
    }
    table
}

/// One flat object: times with the handler in front, what only our pods have by its name.
fn json(values: &Values) -> String {
    let mut object = Map::new();
    for (name, by_handler) in values {
        for (handler, values) in by_handler {
            let key = if name.ends_with("_ms") { format!("{handler}_{name}") } else { name.clone() };
            object.insert(key, median(values).into());
        }
    }
    format!("{:#}\n", Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_come_out_under_their_names() {
        let text =
            r#"{"pod_ms": {"caisson": [3.0, 1.0, 2.0], "runc": [4.0]}, "pod_pss_kb": {"caisson": [9.0]}}"#;
        let values: Values = serde_json::from_str(text).unwrap();
        let figures: Value = serde_json::from_str(&json(&values)).unwrap();
        assert_eq!(figures["caisson_pod_ms"], 2.0);
        assert_eq!(figures["runc_pod_ms"], 4.0);
        assert_eq!(figures["pod_pss_kb"], 9.0);
        let args = PodArgs { json: None, runs: 3, memory: false, variant: Variant::Trixie, direct: false };
        assert!(table(&values, &args).contains("0.5"), "{}", table(&values, &args));
    }
}
