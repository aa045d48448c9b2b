//! Making a template, in a process of its own: it belongs to no pod, and none waits for it.
//!
//! The process leaves the control group of the pod whose shim has started it. Its machine has a directory, a record and
//! host ids as a pod's has, so that whoever comes after a killed builder can undo what that one left.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use super::{Key, Store, TemplateError};
use crate::cgroup::{CgroupError, Layout};
use crate::config::{self, Config, ConfigError, ConfigFiles};
use crate::directory::{DirectoryError, PodDirectory};
use crate::id::{Id, IdError};
use crate::journal::{Journal, JournalError};
use crate::log::one_line;
use crate::machine::{Machine, MachineError, Plan};
use crate::oom_score;
use crate::phases::Phases;
use crate::pod::host::IDS;
use crate::share::{IdRange, ShareError};
use crate::sizing::{Demand, Shape, SizingError};

/// The action of the shim's binary.
pub const ACTION: &str = "template";
/// containerd's namespace in the names of builders' directories. containerd has none of this name.
const NAMESPACE: &str = "caisson-template";
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(180);
/// Builders are ended before pods when the node is short of memory; the next pod starts another.
const OOM_SCORE: i32 = 1000;
/// The most that a request is, in bytes.
const MAX_REQUEST: u64 = 64 << 10;

/// Which template to make.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// What it is made from.
    pub programs: config::Machine,
    /// Where it goes.
    pub directory: PathBuf,
    /// The machine.
    pub shape: Shape,
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The request on standard input.
    #[error("the request on standard input")]
    Request(#[from] serde_json::Error),
    /// Standard input, or an executor.
    #[error("start making a template")]
    Io(#[from] io::Error),
    /// The node's configuration.
    #[error("the configuration")]
    Config(#[from] ConfigError),
    /// The node's default size is none that pods may have.
    #[error("the default size (sizing)")]
    Sizing(#[from] SizingError),
    /// No template is made for machines of the default size.
    #[error(
        "pods of the default size (sizing.default_memory_mib) are rather booted: no template is that large, or small"
    )]
    Size,
    /// The pod's control group, which the builder is to leave.
    #[error("leave the pod's control group")]
    Cgroup(#[from] CgroupError),
    /// The builder's own directory.
    #[error("the builder's directory")]
    Directory(#[from] DirectoryError),
    /// A name in it.
    #[error("the builder's name")]
    Name(#[from] IdError),
    /// The builder's record.
    #[error("the builder's record")]
    Journal(#[from] JournalError),
    /// Host ids for the machine.
    #[error("host ids for the machine")]
    Ids(#[from] ShareError),
    /// The store.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The machine.
    #[error("the machine")]
    Machine(#[from] MachineError),
    /// It takes longer than it may.
    #[error("not done after {} s", LIMIT.as_secs())]
    Late,
}

/// Starts a builder that goes on without this process.
///
/// # Errors
/// When the process cannot be started, or does not take the request.
pub async fn start(request: &Request) -> Result<(), BuildError> {
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg(ACTION).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // Signals to the shim's group are not for it.
    command.process_group(0).kill_on_drop(false);
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&serde_json::to_vec(request)?).await?;
        stdin.shutdown().await?;
    }
    tokio::spawn(async move {
        match child.wait().await {
            Ok(status) => tracing::info!(%status, "the builder of a template has ended"),
            Err(error) => tracing::warn!(%error, "wait for the builder of a template"),
        }
    });
    Ok(())
}

/// Makes the template that standard input asks for; without a request, that of a pod which asks for nothing.
///
/// # Errors
/// [`BuildError`]. Nothing is left then but a note of why, for the pods that look for the template.
pub fn run(files: &ConfigFiles) -> Result<(), BuildError> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_REQUEST).read_to_end(&mut input)?;
    }
    let request = if input.is_empty() {
        default_request(&Config::read(files)?)?
    } else {
        // A shim has started this, in the control group of its pod.
        Layout::of_host()?.leave_for_root()?;
        oom_score::set_with_children(std::process::id(), OOM_SCORE)?;
        serde_json::from_slice(&input)?
    };
    let (store, key) = (Store::new(&request.directory), Key::of(&request.programs, request.shape)?);
    let built = build(&request, &store, &key);
    if let Err(error) = &built {
        store.note_failure(&key, &one_line(error))?;
    }
    built
}

fn default_request(config: &Config) -> Result<Request, BuildError> {
    let size = config.sizing.size(&Demand::default())?;
    Ok(Request {
        programs: config.machine.clone(),
        directory: config.template.directory.clone(),
        shape: config.sizing.template(size).ok_or(BuildError::Size)?,
    })
}

fn build(request: &Request, store: &Store, key: &Key) -> Result<(), BuildError> {
    let Some(lock) = store.try_lock()? else { return Ok(()) };
    if store.has(key)? {
        return Ok(());
    }
    store.collect(&lock)?;
    let unfinished = store.begin(&lock, key)?;
    let (state, memory) = (unfinished.state.try_clone()?, unfinished.memory.try_clone()?);
    let name: Id = key.name()?.parse()?;
    let directory = PodDirectory::create(Path::new(crate::directory::ROOT), &NAMESPACE.parse()?, &name)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let saved = runtime.block_on(async {
        match tokio::time::timeout(LIMIT, boot_and_save(request, &directory, state, memory)).await {
            Ok(saved) => saved,
            Err(_) => Err(BuildError::Late),
        }
    });
    // The machine's process is in the record, should it live.
    directory.clean()?;
    match saved {
        Ok(()) => Ok(unfinished.publish()?),
        Err(error) => {
            unfinished.discard()?;
            Err(error)
        }
    }
}

async fn boot_and_save(
    request: &Request,
    directory: &PodDirectory,
    state: std::fs::File,
    memory: std::fs::File,
) -> Result<(), BuildError> {
    let mut journal: Journal = directory.journal()?;
    let plan = Plan {
        programs: &request.programs,
        shape: request.shape,
        share: None,
        ids: Some(IdRange::claim(&mut journal, Path::new(IDS), directory.path())?),
        cards: Vec::new(),
        directory: directory.path(),
        socket: directory.short_path("vsock"),
        socket_record: directory.path().join("vsock"),
    };
    let machine = Machine::boot(plan, &mut journal, &mut Phases::begin()).await?;
    Ok(machine.save(state, memory).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_of_the_default_pod_is_made_without_a_request() {
        let config = Config::read(&ConfigFiles { node: "/nonexistent".into(), handler: None }).unwrap();
        let request = default_request(&config).unwrap();
        let default_mib = config.sizing.default_memory_mib + config.sizing.guest_overhead_mib;
        assert_eq!((request.shape.boot.memory_mib, request.shape.boot.vcpus), (default_mib, 1));
        let sent = serde_json::to_vec(&request).unwrap();
        assert_eq!(serde_json::from_slice::<Request>(&sent).unwrap().shape, request.shape);
    }
}
