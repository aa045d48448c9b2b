//! The tests' and the demo's container images, as OCI archives, made without a registry and without a daemon.
//!
//! | archive | image | holds |
//! |---|---|---|
//! | `pause.tar` | `caisson.test/pause:1` | busybox that waits for a signal: a sandbox's image, for runtimes that run it |
//! | `busybox.tar` | `caisson.test/busybox:1` | Debian's static busybox, all applets linked |
//! | `servers.tar` | `caisson.test/servers:1` | a Debian with redis, nginx, PostgreSQL and their clients |
//!
//! All three come from one Debian root that `mmdebstrap` writes as a tar file.

mod archive;
mod layer;

use std::{
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use self::archive::Image;
use crate::{
    apt::{self, Suite},
    cache::Key,
    host::Host,
    proc,
    tools::{self, Need},
};

/// What goes into the servers' image on top of a minimal Debian.
const PACKAGES: &str =
    "busybox-static,iproute2,iputils-ping,nginx-light,postgresql,procps,redis-server,redis-tools";

/// Left out of the servers' image: documents, and PostgreSQL's just-in-time compiler, which is half of its size and
/// loaded only on demand.
const LEFT_OUT: [&str; 6] = [
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
];

/// The time stamp of every file that we write: a fixed one, so that the same inputs give the same bytes.
const EPOCH: u64 = 1_767_225_600; // 2026-01-01

/// Makes the images, unless the cache has them, and returns the directory that they are in.
///
/// # Errors
/// When a tool is missing, or an archive can't be made.
pub(crate) fn build(host: &Host) -> Result<PathBuf> {
    tools::require(&[Need::Images])?;
    let mirror = apt::mirror()?;
    let source = Source { mirror: &mirror, suite: Suite::Trixie.name() };
    host.cache.entry("images", &Key::new("images-1").with(source.inputs()), |output| {
        let progress = proc::Progress::start("making the container images");
        let made = source.build(output);
        progress.finish();
        made
    })
}

/// Where the images come from.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    /// A Debian mirror's URL.
    pub(crate) mirror: &'a str,
    /// The Debian suite.
    pub(crate) suite: &'a str,
}

impl Source<'_> {
    /// All that the images' content depends on, as a string to hash.
    pub(crate) fn inputs(&self) -> String {
        let ours = [include_str!("mod.rs"), include_str!("archive.rs"), include_str!("layer.rs")];
        format!("{} {}", self.suite, ours.concat())
    }

    /// Makes the three archives in a directory, which holds nothing else afterwards.
    ///
    /// # Errors
    /// When `mmdebstrap` is missing or fails, or the directory can't be written.
    pub(crate) fn build(&self, directory: &Path) -> Result<()> {
        let root = directory.join("servers-root.tar");
        self.bootstrap(&root)?;
        let busybox = layer::read_file(&root, Path::new("usr/bin/busybox")).context("taking busybox out")?;
        let applets = applets(&busybox)?;

        let image = |name: &'static str, layer: PathBuf, command: &[&'static str]| -> Result<()> {
            let image = Image { name: format!("caisson.test/{name}:1"), layer, command: command.to_vec() };
            image
                .write(&directory.join(format!("{name}.tar")))
                .with_context(|| format!("writing {name}.tar"))?;
            fs::remove_file(&image.layer).context("removing a layer")
        };
        let layer = directory.join("layer.tar");
        layer::busybox(&busybox, &applets, &layer)?;
        image("busybox", layer.clone(), &["sh"])?;
        layer::busybox(&busybox, &["sh".into(), "sleep".into()], &layer)?;
        image(
            "pause",
            layer,
            &["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait; done"],
        )?;
        image("servers", root, &["/bin/bash"])
    }

    fn bootstrap(&self, output: &Path) -> Result<()> {
        let mut command = proc::contained("mmdebstrap");
        command.args(["--quiet", "--variant=minbase", "--components=main", "--format=tar"]);
        command.arg(format!("--include={PACKAGES}"));
        command.args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Languages \"none\""]);
        command.args(LEFT_OUT.map(|path| OsString::from(format!("--dpkgopt=path-exclude={path}"))));
        command.arg(self.suite).arg(output).arg(self.mirror).env("SOURCE_DATE_EPOCH", EPOCH.to_string());
        let result = command.output().context("starting mmdebstrap")?;
        ensure!(result.status.success(), "mmdebstrap failed: {}", String::from_utf8_lossy(&result.stderr));
        Ok(())
    }
}

/// The applets that this busybox has, as it says itself.
fn applets(busybox: &[u8]) -> Result<Vec<String>> {
    let file = tempfile::NamedTempFile::new()?.into_temp_path();
    fs::write(&file, busybox)?;
    layer::make_executable(&file)?;
    // It takes any other name of its own for an applet's.
    let output =
        Command::new(&file).arg0("busybox").arg("--list").output().context("running busybox --list")?;
    ensure!(output.status.success(), "busybox --list failed: {}", String::from_utf8_lossy(&output.stderr));
    let list = String::from_utf8(output.stdout).context("busybox --list")?;
    Ok(list.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}
