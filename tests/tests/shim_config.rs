//! What a pod is made from is the node's to say, then its handler's, and only then, within bounds, its own.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri,
    ctr::{Ctr, Output},
    leaks::Holdings,
    node::Node,
};

const RUNTIME: &str = "io.containerd.caisson.v2";

/// A container that says how much memory in MiB its machine has, with this file as its handler's.
fn memory_with(ctr: &Ctr, id: &str, config: &Path) -> Result<Output> {
    let config = config.to_string_lossy();
    let script = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let said = ctr.try_run(&[
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        "--runtime-config-path",
        &config,
        BUSYBOX_IMAGE,
        id,
        "sh",
        "-c",
        script,
    ])?;
    if said.code != 0 {
        ctr.try_run(&["container", "delete", id])?;
    }
    Ok(said)
}

#[test]
fn a_handlers_file_counts_more_than_the_nodes_and_its_errors_are_told() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("handler.toml");

    fs::write(&file, "[sizing]\ndefault_memory_mib = 300\n")?;
    let said = memory_with(&ctr, "shim-config-larger", &file)?;
    let mib = said.stdout.trim().parse::<u64>().with_context(|| format!("{said:?}"))? >> 10;
    ensure!((300..=364).contains(&mib), "{mib} MiB");

    fs::write(&file, "[sizing]\ncolour = 300\n")?;
    let said = memory_with(&ctr, "shim-config-unknown", &file)?;
    ensure!(
        said.code != 0 && said.stderr.contains("colour") && said.stderr.contains("handler.toml"),
        "{said:?}"
    );
    let said = memory_with(&ctr, "shim-config-missing", Path::new("/nonexistent/handler.toml"))?;
    ensure!(said.code != 0 && said.stderr.contains("/nonexistent/handler.toml"), "{said:?}");
    before.assert_nothing_added()
}

/// The node of the tests allows no annotation.
#[tokio::test]
async fn a_pods_annotation_that_the_node_does_not_allow_is_refused_by_name() -> Result<()> {
    let (_, mut cri, before) = cri::ready().await?;
    for (name, why) in [("default-vcpus", "not allowed by this node"), ("kernel", "unknown")] {
        let mut config = cri::pod_config("shim-annotated");
        config.annotations.insert(format!("caisson.dev/{name}"), "2".into());
        let refused = cri.run_pod(config, "caisson").await.err().context("a pod that must not be")?;
        let text = format!("{refused:#}");
        ensure!(text.contains(name) && text.contains(why), "{text}");
    }
    before.assert_nothing_added()
}
