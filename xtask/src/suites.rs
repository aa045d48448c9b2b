//! Test suites for file systems that others keep, pinned, as static programs that run in any guest.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    cache::Key,
    host::{Host, cargo},
    proc,
    products::{self, TARGET},
    tools::{self, Need},
};

/// On crates.io: what each is called, its version and its program.
const SUITES: [(&str, &str); 2] = [
    // What POSIX says of the calls that make, name, change and remove files.
    ("pjdfstest", "0.2.2"),
    // Random reads and writes, through mappings and otherwise, of one file.
    ("fsx", "0.3.2"),
];

/// Builds the suites, and puts their programs into the directory of products.
///
/// # Errors
/// When one cannot be fetched, or does not build.
pub(crate) fn build(host: &Host, products: &Path) -> Result<()> {
    let key = SUITES.iter().fold(Key::new("suites-1"), |key, (name, version)| key.with(name).with(version));
    let entry = host.cache.entry("suites", &key, install)?;
    SUITES.iter().try_for_each(|(name, _)| products::keep(&entry.join("bin").join(name), products))
}

fn install(root: &Path) -> Result<()> {
    tools::require(&[Need::Suites])?;
    let target: PathBuf = root.join("target");
    for (name, version) in SUITES {
        eprintln!("==> cargo install {name}@{version}");
        let mut install = cargo();
        install.args(["install", "--locked", "--no-track", "--target", TARGET, "--root"]).arg(root);
        install.arg(format!("{name}@{version}"));
        install.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
        install.env("CARGO_TARGET_DIR", &target);
        proc::run(&mut install)?;
    }
    fs::remove_dir_all(&target).context("removing what the suites were built from")
}
