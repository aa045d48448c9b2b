//! `delete`: removes what is left of a container, whether its shim lives or not.
//!
//! A dead shim's pod is undone from its record. One that lives is asked for nothing: a member of its pod is its to
//! remove, and for the pod itself it is about to end, or is made to.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::{ActionError, SOCKETS, Subject, io_error};
use crate::directory::{self, DirectoryError, PodDirectory};
use crate::id::Id;
use crate::invocation::{Invocation, socket_path};
use crate::journal::{ProcessId, Resource};
use crate::{pod::host::OWNER, wire};

/// How long a shim that is about to end may take.
const ENDING: Duration = Duration::from_secs(10);
/// Between two looks at it. A lock can't be waited for with a deadline.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// What containerd is told of a container whose shim died: killed, as by SIGKILL.
const KILLED: u32 = 137;

/// Removes it all, and returns containerd's `DeleteResponse`.
///
/// # Errors
/// When something is left.
pub fn run(invocation: &Invocation) -> Result<Vec<u8>, ActionError> {
    let subject = Subject::of(invocation)?;
    // A bundle that does not tell any more is a pod of its own: a member's has its file for as long as it lives.
    let (pod, first) = subject.pod().unwrap_or_else(|_| (subject.id.clone(), true));
    if let Some(directory) = take_over(&subject.namespace, &pod, first)? {
        directory.clean()?;
    }
    if first {
        let socket = socket_path(Path::new(SOCKETS), &invocation.address, &subject.namespace, &pod);
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
            Err(error @ DirectoryError::Owned(_)) if begin.elapsed() >= 2 * ENDING => {
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
