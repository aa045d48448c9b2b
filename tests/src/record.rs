//! What a shim notes of its pod below `/run/caisson`: which processes are the pod's own, among those of all others.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde_json::Value;

/// Where pods have their directories.
const ROOT: &str = "/run/caisson";

/// The VMM of a pod of containerd's `namespace`.
///
/// # Errors
/// When the pod has none, or none that lives.
pub fn vmm(namespace: &str, pod: &str) -> Result<Pid> {
    let path = directory(namespace, pod).join("journal");
    let journal = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let processes = journal.lines().map(serde_json::from_str::<Value>).filter_map(Result::ok);
    let pid = processes.filter_map(|line| line["process"]["pid"].as_i64()).next_back();
    checked(pid, "caisson-vmm").with_context(|| journal)
}

/// The process that a pod's machine runs in: the VMM's child, which is in the jail that the VMM has made.
///
/// # Errors
/// When the pod has none that lives.
pub fn machine(namespace: &str, pod: &str) -> Result<Pid> {
    let vmm = vmm(namespace, pod)?;
    let path = format!("/proc/{vmm}/task/{vmm}/children");
    let children = fs::read_to_string(&path).with_context(|| path)?;
    checked(children.trim().parse().ok(), "caisson-vmm").with_context(|| children)
}

/// The shim of a pod of containerd's `namespace`.
///
/// # Errors
/// When the pod has none, or none that lives.
pub fn shim(namespace: &str, pod: &str) -> Result<Pid> {
    let path = directory(namespace, pod).join("shim");
    let owner = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let pid = serde_json::from_str::<Value>(&owner)?["pid"].as_i64();
    checked(pid, "containerd-shim-caisson-v2").with_context(|| owner)
}

/// Sends a signal to one of a pod's processes.
///
/// # Errors
/// When it is not there.
pub fn send(pid: Pid, signal: Signal) -> Result<()> {
    signal::kill(pid, signal).with_context(|| format!("sending {signal} to {pid}"))
}

fn directory(namespace: &str, pod: &str) -> PathBuf {
    Path::new(ROOT).join(format!("{namespace}+{pod}"))
}

/// The process of this number, if it runs this program. In a jail the program's path is another, and its last part the
/// same.
fn checked(pid: Option<i64>, program: &str) -> Result<Pid> {
    let pid = i32::try_from(pid.context("no process")?)?;
    let runs = fs::read_link(format!("/proc/{pid}/exe")).with_context(|| format!("process {pid} is gone"))?;
    ensure!(runs.ends_with(program), "process {pid} runs {}", runs.display());
    Ok(Pid::from_raw(pid))
}
