//! The hooks that run inside the container, as the user and with the rights of its program: `hooks.startContainer`.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

use super::Blueprint;
use crate::container::Error;
use crate::oci::Hook;

/// How often a hook that has a time limit is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Hooks to be run before the program is executed.
pub(super) struct Hooks<'a> {
    hooks: &'a [Hook],
    /// What each reads: the container's state. A file, which can not end who writes it by a signal, as a pipe can.
    state: File,
}

impl<'a> Hooks<'a> {
    /// None: there is nothing to run.
    pub(super) fn new(setup: &'a Blueprint) -> Result<Option<Hooks<'a>>, Error> {
        let hooks = setup.spec.hooks.as_ref().map(|hooks| hooks.start_container.as_slice());
        let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else { return Ok(None) };
        let state = json!({
            "ociVersion": setup.spec.version,
            "id": setup.cgroup.file_name().map(|id| id.to_string_lossy()),
            "status": "created",
            "pid": std::process::id(),
            "bundle": "/",
            "annotations": setup.spec.annotations,
        });
        let failed = || Error::system("write down the container's state");
        let file = memfd_create(c"state", MFdFlags::MFD_CLOEXEC).map_err(|errno| failed()(errno.into()))?;
        let mut file = File::from(file);
        file.write_all(state.to_string().as_bytes()).map_err(failed())?;
        Ok(Some(Hooks { hooks, state: file }))
    }

    /// Runs them one after the other.
    pub(super) fn run(&self) -> Result<(), Error> {
        self.hooks.iter().enumerate().try_for_each(|(index, hook)| {
            let field = format!("hooks.startContainer[{index}]");
            match self.run_one(&field, hook)? {
                Some(status) if status.success() => Ok(()),
                Some(status) => Err(Error::Hook { field, reason: format!("ended with {status}") }),
                None => Err(Error::Hook { field, reason: "took longer than it may".to_owned() }),
            }
        })
    }

    /// None: time is over.
    fn run_one(&self, field: &str, hook: &Hook) -> Result<Option<ExitStatus>, Error> {
        let failed = || Error::apply(field, format!("run {}", hook.path.display()));
        (&self.state).rewind().map_err(failed())?;
        let mut command = Command::new(&hook.path);
        command.env_clear().envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
        command.stdin(self.state.try_clone().map_err(failed())?).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some((name, arguments)) = hook.args.split_first() {
            command.arg0(name).args(arguments);
        }
        let mut child = command.spawn().map_err(failed())?;
        let seconds = hook.timeout.and_then(|seconds| u64::try_from(seconds).ok());
        match seconds.and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds))) {
            Some(deadline) => wait_until(&mut child, deadline),
            None => child.wait().map(Some),
        }
        .map_err(failed())
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}
