//! `ctr`, containerd's own client, as a person types it.

use std::{ffi::OsStr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, bail};

use crate::node::Node;

/// What a finished command left.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// `ctr` against one containerd and one of its namespaces.
#[derive(Debug)]
pub struct Ctr {
    socket: PathBuf,
    namespace: String,
}

impl Ctr {
    /// `ctr` in the namespace `default`.
    pub fn new(node: &Node) -> Self {
        Self::at(node.socket(), "default")
    }

    /// `ctr` for a containerd at this socket.
    pub fn at(socket: PathBuf, namespace: &str) -> Self {
        Self { socket, namespace: namespace.to_owned() }
    }

    /// Runs `ctr` with these arguments, whatever it exits with.
    ///
    /// # Errors
    /// When it can't be started, or is still running after a quarter of an hour.
    pub fn try_run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Output> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", &TIMEOUT.as_secs().to_string(), "ctr", "--address"]);
        command.arg(&self.socket).args(["--namespace", &self.namespace]).args(args);
        run(&mut command)
    }

    /// Runs `ctr` with these arguments and returns its standard output.
    ///
    /// # Errors
    /// Also when it exits with anything but 0.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String> {
        let output = self.try_run(args)?;
        if output.code != 0 {
            let args: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
            bail!("ctr {} exited with {}: {}", args.join(" "), output.code, output.stderr.trim());
        }
        Ok(output.stdout)
    }
}

/// How long one command may take: to unpack a large image on an emulated machine takes minutes.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Runs a command to its end and collects what it said.
///
/// # Errors
/// When it can't be started.
pub fn run(command: &mut Command) -> Result<Output> {
    use std::os::unix::process::ExitStatusExt;

    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {program}"))?;
    let code = output.status.code().or_else(|| output.status.signal().map(|s| 128 + s)).unwrap_or(-1);
    Ok(Output {
        code,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
