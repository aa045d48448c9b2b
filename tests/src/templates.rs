//! A node whose pods start from templates, or are booted, as a test or a benchmark wants it.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::node::{Node, Product};

/// How long a builder may take, on an emulated machine.
const BUILT_WITHIN: Duration = Duration::from_secs(120);

/// The configuration of a node's templates, until it is dropped. Without it the tests' pods are booted.
#[derive(Debug)]
pub struct Templates {
    node: Node,
    drop_in: PathBuf,
    directory: tempfile::TempDir,
}

impl Templates {
    /// Has pods start from templates, of which there are none yet.
    ///
    /// # Errors
    /// When the configuration cannot be written.
    pub fn new(node: Node) -> Result<Self> {
        let directory = tempfile::tempdir_in("/var/tmp")?;
        let drop_in = node.config_directory().join("config.d/template.toml");
        fs::create_dir_all(drop_in.parent().context("a directory")?)?;
        let this = Self { node, drop_in, directory };
        this.configure("mode = \"auto\"", "")?;
        Ok(this)
    }

    /// Writes the keys of `[template]` beside the directory, and what comes after that table.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, template: &str, more: &str) -> Result<()> {
        let directory = self.directory.path();
        let text = format!("[template]\ndirectory = {directory:?}\n{template}\n{more}\n");
        Ok(fs::write(&self.drop_in, text)?)
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Makes the template of a pod that asks for nothing.
    ///
    /// # Errors
    /// When it is not made.
    pub fn prepare(&self) -> Result<()> {
        let made = self.builder()?.output().context("starting the shim's binary")?;
        ensure!(made.status.success(), "template: {}", String::from_utf8_lossy(&made.stderr));
        ensure!(!self.list()?.is_empty(), "no template was made");
        Ok(())
    }

    /// What makes the template of a pod that asks for nothing.
    ///
    /// # Errors
    /// When there is no shim.
    pub fn builder(&self) -> Result<Command> {
        let mut command = Command::new(Product::Shim.path()?);
        command.arg("template").env("CAISSON_CONFIG", self.node.config_directory());
        Ok(command)
    }

    /// The directories of whole templates.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.directory.path())?.map(|entry| Ok(entry?.path()));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        Ok(entries.into_iter().filter(|path| path.is_dir() && path.extension().is_none()).collect())
    }

    /// How many pods have started from a template, and how many were booted, since containerd runs.
    pub fn origins(&self) -> (usize, usize) {
        let log = self.node.containerd_log();
        let count = |origin: &str| log.matches(&format!("origin={origin}")).count();
        (count("Template"), count("Boot"))
    }

    /// Waits until there are so many templates, and no builder any more.
    ///
    /// # Errors
    /// When that does not come to pass.
    pub fn wait_for(&self, count: usize) -> Result<()> {
        let deadline = Instant::now() + BUILT_WITHIN;
        while self.list()?.len() < count || builders()? > 0 {
            ensure!(
                Instant::now() < deadline,
                "there are {:?}: {}",
                self.list()?,
                self.node.containerd_log()
            );
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }
}

impl Drop for Templates {
    fn drop(&mut self) {
        // For the tests to come. Whether it worked shows there.
        let _ = fs::remove_file(&self.drop_in);
    }
}

/// How many processes make a template.
fn builders() -> Result<usize> {
    let found = Command::new("pgrep").args(["-fc", "containerd-shim-caisson-v2 template$"]).output()?;
    Ok(String::from_utf8_lossy(&found.stdout).trim().parse()?)
}
