//! Scripts that run twice: here, on this machine's own file system, and in a jailed guest, on a directory of
//! the same file system that it has mounted over virtio-fs. What goes well here has to go well there.
//!
//! A script finds the directory in `$DIR`, its programs in `$BIN`, and a place that is nobody's concern in
//! `$TMPDIR`. Of what it prints, lines of a name and `ok`, `FAILED` or `skipped` are the outcome of cases.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{chown, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_vmm_api::{
    config::{DeviceConfig, FsDevice},
    devices::FsConfig,
};

use crate::vmm::{Vmm, Workshop};

/// The host's user and group that a guest's root is. So many ids from there on are the guest's.
pub const FIRST_ID: u32 = 0x7200_0000;
const IDS: u32 = 65_536;

/// The users that cases may want to be, by the names and ids that they have on any Debian.
const PASSWD: &str = "root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n";

/// What is run.
pub struct Script<'a> {
    /// For busybox's shell.
    pub text: &'a str,
    /// Programs of this machine, and what they are called in `$BIN`.
    pub programs: &'a [(PathBuf, &'a str)],
    /// How long it may take in the guest.
    pub patience: Duration,
    /// More of the jail's description.
    pub jail: &'a str,
}

impl Default for Script<'_> {
    fn default() -> Self {
        Self { text: "", programs: &[], patience: Duration::from_secs(300), jail: "" }
    }
}

/// What came of a script.
#[derive(Debug)]
pub struct Report {
    /// Everything that it printed.
    pub lines: Vec<String>,
    /// What it exited with.
    pub code: i32,
    /// How long it took.
    pub elapsed: Duration,
}

impl Report {
    /// The outcome of each case, by its name.
    #[must_use]
    pub fn cases(&self) -> BTreeMap<&str, &str> {
        let words = self.lines.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let cases = words.filter_map(|words| match words[..] {
            [name, outcome @ ("ok" | "FAILED" | "skipped")] => Some((name, outcome)),
            _ => None,
        });
        cases.collect()
    }

    /// What was said of a case after its outcome.
    fn about(&self, name: &str) -> String {
        let lines = self.lines.iter().skip_while(|line| !line.starts_with(name)).skip(1);
        lines
            .take_while(|line| line.starts_with([' ', '\t']))
            .take(12)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// Insists on going well in the guest for every case that went well here, but for those that `exception`
/// gives a reason for: they must not.
///
/// # Errors
/// When it is otherwise, with all the cases for which it is.
pub fn compare(
    here: &Report,
    there: &Report,
    exception: impl Fn(&str) -> Option<&'static str>,
) -> Result<()> {
    let (reference, outcomes) = (here.cases(), there.cases());
    ensure!(!reference.is_empty(), "no cases ran here:\n{}", here.lines.join("\n"));
    let mut trouble = Vec::new();
    for (name, expected) in &reference {
        let got = got(&outcomes, name);
        match exception(name) {
            Some(why) if got == "ok" => trouble.push(format!("{name} went well, although {why}")),
            Some(_) => {}
            None if *expected == "ok" && got != "ok" || *expected == "skipped" && got == "FAILED" => {
                trouble.push(format!("{name} {got}, here {expected}\n{}", there.about(name)));
            }
            None => {}
        }
    }
    let good = reference.values().filter(|outcome| **outcome == "ok").count();
    println!("{good} of {} cases went well here in {:.0?}", reference.len(), here.elapsed);
    println!("there it took {:.0?}", there.elapsed);
    for (name, outcome) in reference.iter().filter(|(_, outcome)| **outcome != "ok") {
        println!("{name} {outcome} here, {} there", got(&outcomes, name));
    }
    ensure!(good > 0, "nothing went well here:\n{}", here.lines.join("\n"));
    ensure!(trouble.is_empty(), "{} cases:\n{}", trouble.len(), trouble.join("\n"));
    Ok(())
}

fn got<'a>(outcomes: &BTreeMap<&str, &'a str>, name: &str) -> &'a str {
    outcomes.get(name).copied().unwrap_or("missing")
}

impl Script<'_> {
    /// Runs it in a directory of this machine.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn run_here(&self) -> Result<Report> {
        let place = tempfile::tempdir()?;
        let (bin, dir) = (place.path().join("bin"), place.path().join("dir"));
        fs::create_dir(&bin)?;
        fs::create_dir(&dir)?;
        open_to_all(place.path())?;
        open_to_all(&dir)?;
        for (program, name) in self.programs {
            symlink(program, bin.join(name))?;
        }
        let scratch = tempfile::tempdir_in("/dev/shm").context("a place on another file system")?;
        let started = Instant::now();
        // With mounts of its own: a program that walks through /sys makes the kernel mount tracefs there, and that
        // has to go with the program.
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "busybox", "sh", "-c"])
            .arg(format!("exec 2>&1\n{}", self.text))
            .env("DIR", &dir)
            .env("BIN", &bin)
            .env("TMPDIR", scratch.path())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .output()
            .context("starting unshare")?;
        let lines = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        let code = output.status.code().context("killed")?;
        Ok(Report { lines, code, elapsed: started.elapsed() })
    }

    /// Runs it in a guest, on a directory of this machine.
    ///
    /// # Errors
    /// When the guest does not come up, or does not come to an end.
    pub fn run_in_guest(&self) -> Result<Report> {
        let mut guest = self.boot()?;
        guest.finish(self.patience)
    }

    /// Starts it in a guest.
    ///
    /// # Errors
    /// When the guest does not come up.
    pub fn boot(&self) -> Result<Guest> {
        let init = format!(
            "mkdir -p /mnt /etc /tmp; mount -t tmpfs tmp /tmp; mkdir -p /dev/shm\n\
             printf '{PASSWD}' > /etc/passwd; printf '{GROUP}' > /etc/group\n\
             mount -t virtiofs test /mnt || sleep 1000\n\
             ulimit -n 4096\n\
             export DIR=/mnt BIN=/host TMPDIR=/tmp NO_COLOR=1\n\
             cat > /script <<'END-OF-SCRIPT'\n{}\nEND-OF-SCRIPT\n\
             echo script begins\n\
             sh /script < /dev/null 2>&1\n\
             echo script ended with $?\n\
             sleep 1000",
            self.text
        );
        let programs: Vec<(&Path, &str)> =
            self.programs.iter().map(|(path, name)| (path.as_path(), *name)).collect();
        let workshop = Workshop::with_programs(&init, &programs)?;
        let directory = workshop.path("shared");
        fs::create_dir(&directory)?;
        open_to_all(&directory)?;
        chown(&directory, Some(FIRST_ID), Some(FIRST_ID))?;
        let jail = format!(
            "share = {directory:?}\nuid = {FIRST_ID}\ngid = {FIRST_ID}\nid_count = {IDS}\n{}",
            self.jail
        );
        let mut vmm = Vmm::start_jailed_with(&jail, &workshop)?;
        let mut config = workshop.config("")?;
        config.memory.size_mib = 256;
        let options = FsConfig { tag: "test".into(), ..FsConfig::default() };
        config.devices.push(DeviceConfig::Fs(FsDevice { directory: None, options }));
        vmm.boot_in_jail(config, &workshop)?;
        vmm.expect("script begins")?;
        Ok(Guest { vmm, directory, started: Instant::now(), _workshop: workshop })
    }
}

/// A guest that a script runs in.
pub struct Guest {
    /// Its VMM.
    pub vmm: Vmm,
    /// What it shares, as it is seen here.
    pub directory: PathBuf,
    started: Instant,
    _workshop: Workshop,
}

impl Guest {
    /// Waits for the script's end.
    ///
    /// # Errors
    /// When it does not come.
    pub fn finish(&mut self, patience: Duration) -> Result<Report> {
        const END: &str = "script ended with ";
        let last = self.vmm.expect_within(END, patience)?;
        let Some((_, code)) = last.split_once(END) else { bail!("an odd end: {last}") };
        let code = code.trim().parse().with_context(|| format!("an odd end: {last}"))?;
        let begin = self.vmm.transcript.iter().position(|line| line.contains("script begins"));
        let lines = self.vmm.transcript.iter().skip(begin.map_or(0, |begin| begin + 1)).cloned().collect();
        Ok(Report { lines, code, elapsed: self.started.elapsed() })
    }
}

fn open_to_all(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o777))?)
}
