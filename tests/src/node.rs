//! The machine under test, as the runner describes it in the environment.

use std::{
    env,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// Where the runner's containerd lives: a directory with `containerd.sock`, and `ready` or `failed` beside it.
pub const CONTAINERD_DIR: &str = "CAISSON_CONTAINERD";

/// How long containerd may take to start and to import its images, on an emulated machine.
const CONTAINERD_START: Duration = Duration::from_secs(240);

/// The machine's containerd, up and with the small images imported.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
}

impl Node {
    /// Waits until the runner's containerd is up.
    ///
    /// # Errors
    /// When there is no runner, or its containerd failed to start.
    pub fn ready() -> Result<Self> {
        let dir = path_from_env(CONTAINERD_DIR)?;
        let deadline = Instant::now() + CONTAINERD_START;
        while !dir.join("ready").exists() {
            if let Ok(why) = std::fs::read_to_string(dir.join("failed")) {
                bail!("containerd did not start: {why}");
            }
            if Instant::now() > deadline {
                bail!("containerd was not ready after {CONTAINERD_START:?}");
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(Self { dir })
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// The directory of our runtime's configuration: `config.toml`, and `config.d` for what a test wants otherwise.
    pub fn config_directory(&self) -> PathBuf {
        self.dir.join("caisson")
    }

    /// Has our shims that start from now on kill themselves after so many steps of their pod's record; `None`: not any
    /// more.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn set_failpoint(&self, steps: Option<usize>) -> Result<()> {
        let file = self.dir.join(crate::containerd::FAILPOINT);
        Ok(std::fs::write(file, steps.map(|steps| steps.to_string()).unwrap_or_default())?)
    }

    /// containerd's log so far, for a failure's message.
    pub fn containerd_log(&self) -> String {
        std::fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default()
    }
}

/// A built product or input that the runner handed over.
#[derive(Clone, Copy, Debug)]
pub enum Product {
    /// The VMM's binary.
    Vmm,
    /// The agent's static binary.
    Agent,
    /// The shim's binary.
    Shim,
    /// A test suite for file systems that others keep, by its name.
    Suite(&'static str),
    /// The guest's uncompressed kernel.
    Kernel,
    /// The guest's initramfs, which holds the agent.
    Initramfs,
    /// The directory with the images as OCI archives.
    Images,
}

impl Product {
    /// Where it is.
    ///
    /// # Errors
    /// When the runner did not say, or it is not there.
    pub fn path(self) -> Result<PathBuf> {
        let path = match self {
            Self::Vmm => path_from_env("CAISSON_BIN")?.join("caisson-vmm"),
            Self::Agent => path_from_env("CAISSON_BIN")?.join("caisson-agent"),
            Self::Shim => path_from_env("CAISSON_BIN")?.join("containerd-shim-caisson-v2"),
            Self::Suite(name) => path_from_env("CAISSON_BIN")?.join(name),
            Self::Kernel => path_from_env("CAISSON_KERNEL")?,
            Self::Initramfs => path_from_env("CAISSON_INITRAMFS")?,
            Self::Images => path_from_env("CAISSON_IMAGES")?,
        };
        require(&path)?;
        Ok(path)
    }
}

fn path_from_env(name: &str) -> Result<PathBuf> {
    env::var_os(name).map(PathBuf::from).with_context(|| {
        format!("{name} is not set: run the whole-system tests with `cargo xtask test`, not directly")
    })
}

fn require(path: &Path) -> Result<()> {
    path.metadata().with_context(|| format!("{} is needed by this test", path.display()))?;
    Ok(())
}
