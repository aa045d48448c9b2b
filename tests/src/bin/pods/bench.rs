//! What a pod costs, booted and from a template, beside runc's in the same run, at the defaults that ship.

use std::{collections::BTreeMap, fs, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cost::{self, Memory, timed},
    cri::{Cri, Pod},
    ctr::Ctr,
    node::Node,
    templates::Templates,
};
use tokio::task::JoinSet;

use crate::memory::REST;

/// The defaults that ship. The tests' machines are smaller.
const DEFAULTS: &str = include_str!("../../../../shim/src/config/default.toml");
/// Pods that are started at once.
const CROWD: usize = 10;

/// Where a pod comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cold,
    Template,
    Runc,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Cold, Kind::Template, Kind::Runc];
    const OURS: [Kind; 2] = [Kind::Cold, Kind::Template];

    /// What its figures are told by.
    fn name(self) -> &'static str {
        match self {
            Kind::Cold => "cold",
            Kind::Template => "template",
            Kind::Runc => "runc",
        }
    }

    fn handler(self) -> &'static str {
        if self == Kind::Runc { "runc" } else { "caisson" }
    }

    fn runtime(self) -> &'static str {
        if self == Kind::Runc { "io.containerd.runc.v2" } else { "io.containerd.caisson.v2" }
    }
}

/// Every value that was measured, by the figure's name and by kind: in milliseconds, or KiB for a name that says so.
type Values = BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>;

struct Bench {
    templates: Templates,
    cri: Cri,
    sizing: String,
    values: Values,
}

/// Measures how long each call takes, and writes all values as JSON: `{"figure": {"kind": [values]}}`.
///
/// # Errors
/// When a pod fails.
pub(crate) async fn times(runs: usize, results: &Path) -> Result<()> {
    let mut bench = Bench::begin().await?;
    bench.times(runs).await?;
    bench.end(results)
}

/// Measures what many pods take together, and writes all values as [`times`] does.
///
/// # Errors
/// When a pod fails.
pub(crate) async fn crowd(pods: usize, results: &Path) -> Result<()> {
    let mut bench = Bench::begin().await?;
    // One pod of each warms up caches, and makes the bridge.
    for kind in Kind::ALL {
        bench.set(kind)?;
        cost::a_pods_life(&mut bench.cri, &format!("warm-{}", kind.name()), kind.handler()).await?;
    }
    bench.memory(pods).await?;
    bench.crowds().await?;
    bench.end(results)
}

impl Bench {
    async fn begin() -> Result<Self> {
        let node = Node::ready()?;
        let cri = Cri::connect(node.socket()).await?;
        let defaults: toml::Table = DEFAULTS.parse().context("parsing the defaults")?;
        let mut sizing = toml::Table::new();
        sizing.insert("sizing".into(), defaults.get("sizing").context("no sizing in the defaults")?.clone());
        let (templates, values) = (Templates::new(node)?, Values::new());
        let bench = Self { templates, cri, sizing: sizing.to_string(), values };
        bench.set(Kind::Template)?;
        bench.templates.prepare()?;
        Ok(bench)
    }

    fn end(self, results: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.values)?;
        fs::write(results, text).with_context(|| format!("writing {}", results.display()))
    }

    /// The next pods of ours are of this kind.
    fn set(&self, kind: Kind) -> Result<()> {
        let mode = if kind == Kind::Template { "auto" } else { "off" };
        self.templates.configure(&format!("mode = {mode:?}"), &self.sizing)
    }

    async fn times(&mut self, runs: usize) -> Result<()> {
        // One pod of each warms up caches, and makes the bridge.
        for round in 0..=runs {
            for kind in Kind::ALL {
                eprintln!("round {round} of {runs}: {}", kind.name());
                self.set(kind)?;
                let log = self.templates.node().containerd_log().len();
                let name = format!("{}-{round}", kind.name());
                let times = cost::a_pods_life(&mut self.cri, &name, kind.handler()).await?;
                let run = self.run_once(kind, &name)?;
                if round == 0 {
                    continue;
                }
                for (call, time) in &times.0 {
                    self.add(&format!("{call}_ms"), kind, time.as_secs_f64() * 1e3);
                }
                self.add("until_started_ms", kind, times.until_started().as_secs_f64() * 1e3);
                self.add("ctr_run_ms", kind, run);
                if kind != Kind::Runc {
                    let whole = self.templates.node().containerd_log();
                    self.phases(kind, whole.get(log..).unwrap_or_default());
                }
            }
        }
        Ok(())
    }

    /// `ctr run --rm`, in milliseconds.
    fn run_once(&self, kind: Kind, name: &str) -> Result<f64> {
        let ctr = Ctr::new(self.templates.node());
        let begin = Instant::now();
        ctr.run(&["run", "--rm", "--runtime", kind.runtime(), BUSYBOX_IMAGE, name, "true"])?;
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    }

    /// The parts of a pod's start and removal: those of the first that the log tells of, which is CRI's.
    fn phases(&mut self, kind: Kind, log: &str) {
        let all = [
            ("start", timed::START),
            ("remove_container", timed::REMOVE_CONTAINER),
            ("stop", timed::STOP),
            ("undo", timed::UNDO),
        ];
        for (verb, message) in all {
            for (name, time) in cost::phases(log, message).into_iter().next().unwrap_or_default() {
                self.add(&format!("phase_{verb}_{name}_ms"), kind, time);
            }
        }
    }

    /// Several pods at once: the time until each has started.
    async fn crowds(&mut self) -> Result<()> {
        for kind in Kind::ALL {
            eprintln!("{CROWD} pods at once: {}", kind.name());
            self.set(kind)?;
            let mut starting = JoinSet::new();
            for number in 0..CROWD {
                let mut cri = Cri::connect(self.templates.node().socket()).await?;
                starting.spawn(async move {
                    let name = format!("crowd-{}-{number}", kind.name());
                    cost::start_pod(&mut cri, &name, kind.handler()).await
                });
            }
            let mut pods = Vec::new();
            while let Some(started) = starting.join_next().await {
                let (pod, _, times) = started??;
                self.add("crowd_until_started_ms", kind, times.until_started().as_secs_f64() * 1e3);
                pods.push(pod);
            }
            self.remove(&pods).await?;
        }
        Ok(())
    }

    /// What one idle pod holds, and what each further one adds.
    async fn memory(&mut self, count: usize) -> Result<()> {
        ensure!(count > 1, "the growth from 1 pod to {count}");
        for kind in Kind::OURS {
            eprintln!("memory of {count} pods: {}", kind.name());
            self.set(kind)?;
            let before = cost::available_kib()?;
            let mut pods = vec![self.start(kind, 0).await?];
            tokio::time::sleep(REST).await;
            let one = Memory::of_pods()?;
            self.add("shim_rss_kb", kind, kib(cost::shims_rss_kib()?));
            self.add("pod_pss_kb", kind, kib(one.pss));
            self.add("pod_private_kb", kind, kib(one.private));
            for number in 1..count {
                pods.push(self.start(kind, number).await?);
            }
            tokio::time::sleep(REST).await;
            let all = Memory::of_pods()?;
            let further = kib(u64::try_from(count - 1)?);
            self.add("growth_kb_per_pod", kind, kib(all.pss.saturating_sub(one.pss)) / further);
            let taken = before.saturating_sub(cost::available_kib()?);
            self.add("taken_kb_per_pod", kind, kib(taken) / kib(u64::try_from(count)?));
            self.remove(&pods).await?;
        }
        Ok(())
    }

    async fn start(&mut self, kind: Kind, number: usize) -> Result<Pod> {
        let name = format!("memory-{}-{number}", kind.name());
        Ok(cost::start_pod(&mut self.cri, &name, kind.handler()).await?.0)
    }

    async fn remove(&mut self, pods: &[Pod]) -> Result<()> {
        for pod in pods {
            self.cri.remove_pod(pod).await?;
        }
        Ok(())
    }

    fn add(&mut self, name: &str, kind: Kind, value: f64) {
        self.values.entry(name.to_owned()).or_default().entry(kind.name()).or_default().push(value);
    }
}

/// A figure in KiB; what memory holds is far below where this loses precision.
#[allow(clippy::cast_precision_loss)]
fn kib(kib: u64) -> f64 {
    kib as f64
}
