//! Debian packages: the tools that the host needs, and files from other suites that never touch its configuration.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::{cache::Cache, proc};

/// How old a private package index may be before it is fetched again.
const INDEX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Makes sure that the host has these packages: installs what is missing when root, else says how.
///
/// # Errors
/// When a package is missing and can't be installed from here.
pub(crate) fn require(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --no-install-recommends {}", missing.join(" "));
    if !nix::unistd::geteuid().is_root() {
        bail!("packages are missing; run `sudo {line}`");
    }
    eprintln!("==> {line}");
    // Neither is killed with xtask: half an installation is worse than one that nobody waits for.
    let _ = Command::new("apt-get").args(["update", "-qq"]).status();
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
    proc::run(&mut install).with_context(|| format!("`{line}` did not work"))
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query fails when one of the names is unknown to it; what it says of the others is still right.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("running dpkg-query; the host must be Debian")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed: BTreeSet<&str> = text.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(packages.iter().copied().filter(|package| !installed.contains(package)).collect())
}

/// A Debian suite to take packages from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suite {
    /// Debian 12, with its security updates.
    Bookworm,
    /// Debian 13, with its security updates.
    Trixie,
    /// Debian unstable.
    Sid,
}

impl Suite {
    /// Its code name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// Lines for sources.list, on the mirrors that the host itself uses.
    ///
    /// # Errors
    /// When the host's own sources name no Debian mirror.
    pub(crate) fn sources(self) -> Result<Vec<String>> {
        let Mirrors { archive, security } = Mirrors::of_host()?;
        let keyring = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        let mut lines = vec![format!("deb {keyring} {archive} {} main", self.name())];
        if self != Self::Sid {
            lines.push(format!("deb {keyring} {security} {}-security main", self.name()));
        }
        Ok(lines)
    }
}

/// The Debian mirror that the host itself uses.
///
/// # Errors
/// When the host's own sources name none.
pub(crate) fn mirror() -> Result<String> {
    Ok(Mirrors::of_host()?.archive)
}

/// Where the host takes its own packages from.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    archive: String,
    security: String,
}

impl Mirrors {
    fn of_host() -> Result<Self> {
        let targets = proc::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE)",
            "Created-By: Packages",
        ]))?;
        let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
        let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        Self::parse(&targets, codename.context("/etc/os-release names no VERSION_CODENAME")?)
    }

    /// `targets` has lines of an archive's URI and its release, as `apt-get indextargets` prints them.
    fn parse(targets: &str, codename: &str) -> Result<Self> {
        let find = |wanted: &str| {
            let mut pairs = targets.lines().filter_map(|line| line.split_once(' '));
            pairs.find(|(_, release)| *release == wanted).map(|(uri, _)| uri.trim_end_matches('/').to_owned())
        };
        let archive = find(codename).with_context(|| format!("the host's apt sources have no {codename}"))?;
        // A mirror that carries security updates has them beside the archive.
        let security = find(&format!("{codename}-security")).unwrap_or_else(|| format!("{archive}-security"));
        Ok(Self { archive, security })
    }
}

/// An apt of our own: its indexes and downloads live in the cache, and the host's are not touched.
#[derive(Debug)]
pub(crate) struct PrivateApt {
    root: PathBuf,
    suite: Suite,
}

impl PrivateApt {
    /// Prepares the indexes of a suite; they are fetched when there are none or they are older than a day.
    ///
    /// # Errors
    /// When there are none and they can't be fetched.
    pub(crate) fn open(cache: &Cache, suite: Suite) -> Result<Self> {
        let apt = Self { root: cache.root().join("apt").join(suite.name()), suite };
        let _lock = cache.lock(&format!("apt-{}", suite.name()))?;
        for directory in ["state/lists/partial", "cache/archives/partial", "empty"] {
            fs::create_dir_all(apt.root.join(directory)).context("creating a private apt directory")?;
        }
        let sources = format!("{}\n", suite.sources()?.join("\n"));
        let list = apt.root.join("sources.list");
        let fresh = fs::read_to_string(&list).is_ok_and(|old| old == sources) && apt.index_is_fresh();
        if !fresh {
            fs::write(&list, sources).with_context(|| format!("writing {}", list.display()))?;
            apt.update()?;
        }
        Ok(apt)
    }

    fn update(&self) -> Result<()> {
        let mut update = self.command("apt-get");
        update.arg("update");
        let log = self.root.join("update.log");
        let stamp = self.stamp();
        match proc::run_logged(
            &format!("fetching the package index of {}", self.suite.name()),
            &mut update,
            &log,
        ) {
            Ok(()) => fs::write(&stamp, "").context("noting when the package index was fetched"),
            Err(error) if stamp.exists() => {
                eprintln!("==> going on with the old package index: {error:#}");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The version of a package that would be fetched.
    ///
    /// # Errors
    /// When the suite does not have it.
    pub(crate) fn version(&self, package: &str) -> Result<String> {
        let shown = proc::output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        let version = shown.lines().find_map(|line| line.strip_prefix("Version: "));
        Ok(version.with_context(|| format!("{} has no package {package}", self.suite.name()))?.to_owned())
    }

    /// The first package that `package` depends on whose name starts with `prefix`.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let shown = proc::output(self.command("apt-cache").args(["depends", package]))?;
        let mut names = shown.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let name = names.find(|name| name.starts_with(prefix));
        Ok(name.with_context(|| format!("{package} depends on no {prefix}*"))?.to_owned())
    }

    /// Downloads a package and unpacks its files into a directory.
    ///
    /// # Errors
    /// When it can't be fetched or unpacked.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let downloads = into.join("download");
        fs::create_dir_all(&downloads).with_context(|| format!("creating {}", downloads.display()))?;
        let mut download = self.command("apt-get");
        download.args(["download", package]).current_dir(&downloads);
        proc::run_logged(&format!("downloading {package}"), &mut download, &into.join("download.log"))?;
        let files: Vec<_> = fs::read_dir(&downloads)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        ensure!(files.len() == 1, "apt-get downloaded {} files for {package}", files.len());
        let mut unpack = proc::dies_with_us("dpkg-deb", Signal::SIGKILL);
        proc::run(unpack.arg("--extract").arg(&files[0]).arg(into))?;
        fs::remove_dir_all(&downloads).context("removing the downloaded package")
    }

    /// Downloads a package and all that it depends on, and unpacks their files into a directory. Nothing is
    /// configured: no script of theirs runs.
    ///
    /// # Errors
    /// When one can't be fetched or unpacked.
    pub(crate) fn unpack_all(&self, package: &str, into: &Path) -> Result<()> {
        let downloads = into.join("download");
        fs::create_dir_all(downloads.join("partial"))
            .with_context(|| format!("creating {}", downloads.display()))?;
        let mut download = self.command("apt-get");
        download.arg("-o").arg(format!("Dir::Cache::Archives={}", downloads.display()));
        download.args(["install", "--download-only", "--yes", "--no-install-recommends", package]);
        let what = format!("downloading {package} and what it needs");
        proc::run_logged(&what, &mut download, &downloads.join("log"))?;
        for entry in fs::read_dir(&downloads)? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                let mut unpack = proc::dies_with_us("dpkg-deb", Signal::SIGKILL);
                proc::run(unpack.arg("--extract").arg(&file).arg(into))?;
            }
        }
        fs::remove_dir_all(&downloads).context("removing the downloaded packages")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = proc::dies_with_us(program, Signal::SIGKILL);
        let option = |name: &str, path: &str| format!("{name}={}", self.root.join(path).display());
        for setting in [
            option("Dir::State", "state"),
            option("Dir::Cache", "cache"),
            option("Dir::Etc::sourcelist", "sources.list"),
            option("Dir::Etc::sourceparts", "empty"),
            option("Dir::Etc::preferencesparts", "empty"),
            "Dir::State::status=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            // A mirror's copy of unstable may be older than its Release file allows; signatures are still checked.
            "Acquire::Check-Valid-Until=false".to_owned(),
        ] {
            command.args(["-o", &setting]);
        }
        command
    }

    fn stamp(&self) -> PathBuf {
        self.root.join("fetched")
    }

    fn index_is_fresh(&self) -> bool {
        let fetched = fs::metadata(self.stamp()).and_then(|metadata| metadata.modified());
        fetched.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < INDEX_AGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_those_of_the_host() {
        let targets = "http://mirror.example/debian/ bookworm\nhttp://mirror.example/debian/ bookworm-updates\n\
                       http://security.example/debian-security/ bookworm-security\n";
        let mirrors = Mirrors::parse(targets, "bookworm").unwrap();
        assert_eq!(mirrors.archive, "http://mirror.example/debian");
        assert_eq!(mirrors.security, "http://security.example/debian-security");
    }

    #[test]
    fn a_host_of_another_release_is_an_error() {
        Mirrors::parse("http://mirror.example/debian/ bookworm\n", "noble").unwrap_err();
    }

    #[test]
    fn packages_that_nobody_has_are_missing() {
        assert_eq!(missing(&["dpkg", "no-such-package-anywhere"]).unwrap(), ["no-such-package-anywhere"]);
    }
}
