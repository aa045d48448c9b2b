//! `pods demo`, `pods times`, `pods crowd` and `pods memory`: pods through containerd's CRI, for people to look at. They run beside a
//! containerd, as tests do: `e2e-runner pods demo`.

mod bench;
mod demo;
mod memory;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// Runs pods in machines of their own beside pods of runc.
#[derive(Parser)]
enum Task {
    /// Shows what a pod is like from inside and from outside.
    Demo,
    /// Measures the time of each call of a pod's life.
    Times {
        /// Measure so many pods of each kind, after one that warms up.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Write the figures here.
        #[arg(long)]
        results: PathBuf,
    },
    /// Measures many pods: what memory each takes, and how long ten take at once.
    Crowd {
        /// For the memory of each further pod, start so many.
        #[arg(long, default_value_t = 20)]
        pods: usize,
        /// Write the figures here.
        #[arg(long)]
        results: PathBuf,
    },
    /// Shows where the memory of an idle pod is.
    Memory,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Task::parse() {
        Task::Demo => demo::run().await,
        Task::Times { runs, results } => bench::times(runs, &results).await,
        Task::Crowd { pods, results } => bench::crowd(pods, &results).await,
        Task::Memory => memory::run().await,
    }
}
