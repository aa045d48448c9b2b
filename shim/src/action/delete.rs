//! `delete`: removes what is left of a container, whether its shim lives or not.
//!
//! A dead shim's pod is undone from its record. One that lives is asked for nothing: a member of its pod is its to
//! remove, and for the pod itself it is about to end, or is made to.
//!
//! containerd gives this five seconds, and kills it then. So it is done by a process of its own, which goes on: nobody
//! would come back for the rest.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::start::ADDRESS;
use super::{ActionError, SOCKETS, Subject, io_error};
use crate::directory::{self, DirectoryError, PodDirectory};
use crate::id::Id;
use crate::invocation::{Invocation, UNIX, socket_path};
use crate::journal::{ProcessId, Resource};
use crate::{pod::host::OWNER, wire};

/// How long a shim that is about to end may take before it is killed.
const ENDING: Duration = Duration::from_secs(2);
/// How long a killed one may take to be gone.
const GONE: Duration = Duration::from_secs(20);
/// Between two looks at it. A lock can't be waited for with a deadline.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// What containerd is told of a container whose shim died: killed, as by SIGKILL.
const KILLED: u32 = 137;

/// Has it all removed, and returns containerd's `DeleteResponse`.
///
/// # Errors
/// When something is left.
pub fn run(invocation: &Invocation) -> Result<Vec<u8>, ActionError> {
    let this = std::env::current_exe().map_err(io_error("find this program"))?;
    let mut command = Command::new(this);
    for (flag, id) in [("-namespace", &invocation.namespace), ("-id", &invocation.id)] {
        command.args(id.as_ref().map(|id| [flag, id.as_str()]).into_iter().flatten());
    }
    command.args(["-address", &invocation.address]);
    if let Some(bundle) = &invocation.bundle {
        command.arg("-bundle").arg(bundle);
    }
    command.arg("undo").stdin(Stdio::null()).process_group(0);
    // Both are read to their ends: the answer, or the reason why there is none.
    let output = command.output().map_err(io_error("start the removal"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(ActionError::Removal { status: output.status, said })
}

/// Removes it all, and returns containerd's `DeleteResponse`.
///
/// # Errors
/// When something is left.
pub fn undo(invocation: &Invocation) -> Result<Vec<u8>, ActionError> {
    let subject = Subject::of(invocation)?;
    // A bundle that does not tell any more is a pod of its own: a member's has its file for as long as it lives.
    let (pod, first) = subject.pod().unwrap_or_else(|_| (subject.id.clone(), true));
    if let Some(directory) = take_over(&subject.namespace, &pod, first)? {
        directory.clean()?;
    }
    if first {
        let told = fs::read_to_string(subject.bundle.join(ADDRESS)).ok();
        let socket = told.as_deref().and_then(|address| address.strip_prefix(UNIX)).map(PathBuf::from);
        let socket = socket.unwrap_or_else(|| {
            socket_path(Path::new(SOCKETS), &invocation.address, &subject.namespace, &pod)
        });
        if UnixStream::connect(&socket).is_err() {
            match fs::remove_file(&socket) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(io_error(format!("remove {socket:?}")))?,
            }
        }
    }
    let bundle = fs::canonicalize(&subject.bundle).unwrap_or(subject.bundle);
    Resource::Mount(bundle.join("rootfs")).undo()?;
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(wire::timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_bytes()?)
}

/// The directory of a pod whose shim is dead. Nothing for a member of a pod that lives.
fn take_over(namespace: &Id, pod: &Id, first: bool) -> Result<Option<PodDirectory>, ActionError> {
    let root = Path::new(directory::ROOT);
    let begin = Instant::now();
    let mut killed = false;
    loop {
        match PodDirectory::adopt(root, namespace, pod) {
            Err(DirectoryError::Owned(_)) if !first => return Ok(None),
            Err(DirectoryError::Owned(_)) if !killed && begin.elapsed() >= ENDING => {
                killed = true;
                let owner = PodDirectory::path_of(root, namespace, pod).join(OWNER);
                if let Some(process) = read_owner(&owner) {
                    Resource::Process(process).undo()?;
                }
            }
            Err(error @ DirectoryError::Owned(_)) if begin.elapsed() >= ENDING + GONE => {
                return Err(error.into());
            }
            Err(DirectoryError::Owned(_)) => {}
            result => return Ok(result?),
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn read_owner(path: &Path) -> Option<ProcessId> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
