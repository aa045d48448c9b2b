//! How readily the kernel ends a process when the node is short of memory: `oom_score_adj`, see
//! proc_pid_oom_score_adj(5).
//!
//! containerd has itself spared, and what it starts inherits that. A pod's memory is its machine's, so the machine has to
//! have the value that the kubelet has chosen for the pod's containers.

use std::fs;
use std::io;

/// The value of a process that is to be ended first.
const MOST: i32 = 1000;

/// Has a process that this one has started spared a little less than this one, as runc's shim is: containerd outlives it.
///
/// # Errors
/// When it has ended, or the kernel refuses.
pub fn spare_less(pid: u32) -> io::Result<()> {
    let own: i32 =
        fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse().map_err(io::Error::other)?;
    set(pid, own.saturating_add(1).min(MOST))
}

/// Sets that of a process and of those that it has started.
///
/// # Errors
/// When it has ended, or the kernel refuses.
pub fn set_with_children(pid: u32, value: i32) -> io::Result<()> {
    set(pid, value)?;
    for child in fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?.split_whitespace() {
        set(child.parse().map_err(io::Error::other)?, value)?;
    }
    Ok(())
}

fn set(pid: u32, value: i32) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/oom_score_adj"), value.to_string())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_and_its_children_get_it() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = io::BufReader::new(shell.stdout.take().unwrap());
        io::BufRead::read_line(&mut output, &mut line).unwrap();
        let child: u32 = line.trim().parse().unwrap();
        let of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        set_with_children(shell.id(), 789).unwrap();
        assert_eq!([of(shell.id()), of(child)], ["789\n", "789\n"]);
        let own: i32 = of(std::process::id()).trim().parse().unwrap();
        // To lower it again takes a right that this process may not have.
        if set(shell.id(), own).is_ok() {
            spare_less(shell.id()).unwrap();
            assert_eq!(of(shell.id()).trim(), (own + 1).min(MOST).to_string());
        }
        let _ = Command::new("kill").arg(line.trim()).status();
        shell.wait().unwrap();
    }
}
