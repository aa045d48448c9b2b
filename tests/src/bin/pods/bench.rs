//! What a pod costs, beside runc's in the same run.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use caisson_e2e::{
    cost::{self, Times, timed},
    cri::Cri,
    node::Node,
};

use crate::memory::REST;

/// The handlers that are compared.
const HANDLERS: [&str; 2] = ["caisson", "runc"];

/// Every value that was measured, by the figure's name and by handler.
type Values = BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>;

/// Measures, and writes all values as JSON: `{"figure": {"handler": [values]}}`, in milliseconds and KiB.
///
/// # Errors
/// When a pod fails.
pub(crate) async fn run(runs: usize, results: &Path) -> Result<()> {
    let node = Node::ready()?;
    let mut cri = Cri::connect(node.socket()).await?;
    let mut values = Values::new();
    // One pod of each warms up caches, and makes the bridge.
    for round in 0..=runs {
        for handler in HANDLERS {
            let times = cost::a_pods_life(&mut cri, &format!("{handler}-{round}"), handler).await?;
            if round > 0 {
                note(&mut values, handler, &times);
            }
        }
    }
    note_phases(&mut values, &node.containerd_log());
    let (pod, _, _) = cost::start_pod(&mut cri, "memory", "caisson").await?;
    tokio::time::sleep(REST).await;
    let memory = cost::pss_kib()?;
    add(&mut values, "shim_rss_kb", "caisson", kib_of(cost::shims_rss_kib()?));
    cri.remove_pod(&pod).await?;
    for (process, kib) in &memory {
        add(&mut values, &format!("pss_kib_{process}"), "caisson", kib_of(*kib));
    }
    add(&mut values, "pod_pss_kb", "caisson", kib_of(memory.values().sum()));
    let text = serde_json::to_string_pretty(&values)?;
    std::fs::write(results, text).with_context(|| format!("writing {}", results.display()))
}

fn note(values: &mut Values, handler: &'static str, times: &Times) {
    for (call, time) in &times.0 {
        add(values, &format!("{call}_ms"), handler, time.as_secs_f64() * 1e3);
    }
    add(values, "pod_ms", handler, times.until_started().as_secs_f64() * 1e3);
}

/// The parts of each pod's start and removal but the first one's, which warms up.
fn note_phases(values: &mut Values, log: &str) {
    let all = [
        ("start", timed::START),
        ("remove_container", timed::REMOVE_CONTAINER),
        ("stop", timed::STOP),
        ("undo", timed::UNDO),
    ];
    for (verb, message) in all {
        for (name, time) in cost::phases(log, message).into_iter().skip(1).flatten() {
            add(values, &format!("phase_{verb}_{name}_ms"), "caisson", time);
        }
    }
}

fn add(values: &mut Values, name: &str, handler: &'static str, value: f64) {
    values.entry(name.to_owned()).or_default().entry(handler).or_default().push(value);
}

/// A figure in KiB; what memory holds is far below where this loses precision.
#[allow(clippy::cast_precision_loss)]
fn kib_of(kib: u64) -> f64 {
    kib as f64
}
