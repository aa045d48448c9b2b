//! One command in the testbed, or on this host when that has hardware KVM.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;

use super::{
    MachineArgs,
    boot::{self, Share, Sink, Terminal, TimedOut},
    root,
};
use crate::{clients, host::Host, proc};

/// What `timeout(1)` exits with, too.
const TIMED_OUT: u8 = 124;

/// Options of `cargo xtask testbed exec`.
///
/// Inside, `/workspace`, `/target` and `/cache` are the host's, read-only; `/exchange` is an empty directory, or the
/// one named by `--exchange`, to bring results out; `/scratch` is a disk that is thrown away.
#[derive(Args, Clone, Debug)]
pub(crate) struct ExecArgs {
    /// The machine.
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// A directory of this host that the command sees as `/exchange` and may write to.
    #[arg(long)]
    pub(crate) exchange: Option<PathBuf>,
    /// Set an environment variable, `NAME=VALUE`, for the command.
    #[arg(long)]
    pub(crate) env: Vec<String>,
    /// End the command after so many seconds and exit with 124.
    #[arg(long)]
    pub(crate) timeout: Option<u64>,
    /// Run the command on this host, whose KVM must have hardware virtualization.
    #[arg(long)]
    pub(crate) direct: bool,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// Runs a command and passes on its output and exit code. What it writes to standard error goes to `errors`, unless it
/// runs on this host.
///
/// # Errors
/// When the testbed can't be built or booted; [`boot::Lost`] when it ends before the command does.
pub(crate) fn exec(host: &Host, args: &ExecArgs, errors: Sink) -> Result<ExitCode> {
    if args.direct {
        return direct(host, args);
    }
    let bed = root::build(host, args.machine.variant)?;
    let scratch = host.cache.scratch()?;
    let exchange = match &args.exchange {
        Some(directory) => {
            directory.canonicalize().with_context(|| format!("finding {}", directory.display()))?
        }
        None => scratch.path().to_owned(),
    };
    // A share of its own, so that two commands may use one exchange directory.
    let job = scratch.path().join("job");
    fs::create_dir(&job).context("making the job's directory")?;
    fs::write(job.join("job"), script(host, args)?).context("writing the job")?;
    let mut shares = shares(host);
    shares.push(Share { tag: "job".to_owned(), host: job, writable: false });
    shares.push(Share { tag: "exchange".to_owned(), host: exchange, writable: true });

    let machine = boot::boot(host, &bed, &args.machine, &shares, &Terminal::Streams(errors))?;
    match machine.run(args.timeout.map(Duration::from_secs)) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) if error.is::<TimedOut>() => {
            eprintln!("==> {error}");
            Ok(ExitCode::from(TIMED_OUT))
        }
        Err(error) => Err(error),
    }
}

/// The standard error of this process.
pub(crate) fn standard_error() -> Sink {
    Arc::new(Mutex::new(io::stderr()))
}

/// Opens a shell on the machine's console.
///
/// # Errors
/// When the testbed can't be built or booted.
pub(crate) fn shell(host: &Host, args: &MachineArgs) -> Result<ExitCode> {
    let bed = root::build(host, args.variant)?;
    let mut args = args.clone();
    args.append = Some(format!("caisson.shell {}", args.append.unwrap_or_default()));
    let scratch = host.cache.scratch()?;
    let mut shares = shares(host);
    shares.push(Share { tag: "exchange".to_owned(), host: scratch.path().to_owned(), writable: true });
    let machine = boot::boot(host, &bed, &args, &shares, &Terminal::Shell)?;
    let code = machine.run(None);
    // QEMU was killed with the terminal in raw mode.
    let _ = Command::new("stty").arg("sane").status();
    Ok(ExitCode::from(code?))
}

/// The path by which a file of the host is seen in the testbed.
///
/// # Errors
/// When it is in none of the shared directories.
pub(crate) fn inside(host: &Host, path: &Path) -> Result<PathBuf> {
    let shares = shares(host);
    // The target directory is usually below the workspace: the longest prefix is the nearest share.
    let nearest = shares
        .iter()
        .filter_map(|share| Some((share, path.strip_prefix(&share.host).ok()?)))
        .max_by_key(|(share, _)| share.host.as_os_str().len());
    let (share, rest) =
        nearest.with_context(|| format!("{} is not shared with the testbed", path.display()))?;
    Ok(Path::new("/").join(&share.tag).join(rest))
}

fn shares(host: &Host) -> Vec<Share> {
    let share =
        |tag: &str, path: &Path| Share { tag: tag.to_owned(), host: path.to_owned(), writable: false };
    vec![
        share("workspace", &host.workspace),
        share("target", &host.target),
        share("cache", host.cache.root()),
    ]
}

/// A shell script that becomes the command.
fn script(host: &Host, args: &ExecArgs) -> Result<String> {
    let mut script = String::new();
    let clients = clients::find(host, args.machine.variant, &args.command)?;
    for directory in clients.first {
        script.push_str(&format!(
            "export PATH={}:\"$PATH\"\n",
            quote(&inside(host, &directory)?.to_string_lossy())
        ));
    }
    for directory in clients.last {
        script.push_str(&format!(
            "export PATH=\"$PATH\":{}\n",
            quote(&inside(host, &directory)?.to_string_lossy())
        ));
    }
    for variable in &args.env {
        let (name, value) =
            variable.split_once('=').with_context(|| format!("--env {variable} has no `=`"))?;
        let valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        ensure!(valid && !name.is_empty(), "--env {variable}: {name:?} is no name of a variable");
        script.push_str(&format!("export {name}={}\n", quote(value)));
    }
    let words: Vec<String> = args.command.iter().map(|word| quote(word)).collect();
    script.push_str(&format!("exec {}\n", words.join(" ")));
    Ok(script)
}

/// A word that the shell takes as it is.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs the command here.
fn direct(host: &Host, args: &ExecArgs) -> Result<ExitCode> {
    ensure!(
        has_hardware_kvm(),
        "--direct needs /dev/kvm and a processor with vmx or svm; without, leave the option out and use the testbed"
    );
    let mut command = proc::dies_with_us(&args.command[0], Signal::SIGTERM);
    command.args(&args.command[1..]);
    let clients = clients::find(host, args.machine.variant, &args.command)?;
    let own = env::var_os("PATH").unwrap_or_default();
    let path = clients.first.into_iter().chain(env::split_paths(&own)).chain(clients.last);
    command.env("PATH", env::join_paths(path).context("joining the directories of PATH")?);
    for variable in &args.env {
        let (name, value) =
            variable.split_once('=').with_context(|| format!("--env {variable} has no `=`"))?;
        command.env(name, value);
    }
    let mut child = command.spawn().with_context(|| format!("starting {}", args.command[0]))?;
    let status = match args.timeout {
        Some(seconds) => {
            proc::wait_until(&mut child, std::time::Instant::now() + Duration::from_secs(seconds))?
        }
        None => child.wait().context("waiting for the command")?,
    };
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(TIMED_OUT)))
}

/// Whether this host's processor has hardware virtualization and there is a `/dev/kvm` to use it.
pub(crate) fn has_hardware_kvm() -> bool {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpus.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    Path::new("/dev/kvm").exists() && flags.split(' ').any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        let words = ["plain", "two words", "it's", "$HOME `id` \"x\"", "", "-n"];
        let line: Vec<String> = words.iter().map(|word| quote(word)).collect();
        let printed =
            Command::new("sh").args(["-c", &format!("printf '%s\\n' {}", line.join(" "))]).output().unwrap();
        assert_eq!(String::from_utf8(printed.stdout).unwrap().lines().collect::<Vec<_>>(), words);
    }
}
