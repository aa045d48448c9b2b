//! `pods demo`, `pods bench` and `pods memory`: pods through containerd's CRI, for people to look at. They run beside a
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
    /// Measures pods.
    Bench {
        /// Measure so many pods of each kind, after one that warms up.
        #[arg(long, default_value_t = 5)]
        runs: usize,
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
        Task::Bench { runs, results } => bench::run(runs, &results).await,
        Task::Memory => memory::run().await,
    }
}
