//! `start`: brings the shim of a container's pod up, or finds it, and says where it listens.
//!
//! A new shim gets its socket from here, listening already: when this answers, containerd can connect.

use std::fs::{self, DirBuilder};
use std::io::{self, IsTerminal, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;

use super::{ActionError, SOCKETS, Subject, io_error};
use crate::invocation::{Invocation, ReplyFormat, TASK_API_VERSION, UNIX, socket_path};
use crate::oom_score;
use crate::options::HandlerConfig;

/// The variable with containerd's ttrpc socket.
pub(super) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// The variable with the newest version that containerd understands.
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// The most that is read from standard input, in bytes.
const MAX_PARAMS: u64 = 4 << 20;
/// In every container's bundle: where its shim listens. A containerd 1.7 that comes back finds its containers by this
/// file, and takes one without it for dead.
pub(super) const ADDRESS: &str = "address";
/// In the bundle: the handler's configuration, when containerd has it as text.
const HANDLER_CONFIG: &str = "caisson.toml";

/// Starts or finds the shim, and returns what containerd wants to read.
///
/// # Errors
/// When the bundle does not tell which pod it is, or the shim can't be started.
pub fn run(invocation: &Invocation) -> Result<Vec<u8>, ActionError> {
    let input = read_input()?;
    if invocation.id.is_some() {
        let sockets = Path::new(SOCKETS);
        let address = find_or_start(invocation, HandlerConfig::from_stdin(&input)?, sockets, &[])?;
        let version = std::env::var(MAX_SHIM_VERSION).ok();
        return Ok(ReplyFormat::from_max_version(version.as_deref()).reply(&address)?.into_bytes());
    }
    // containerd from 2.3 on says all of it on standard input, and reads a message, too.
    let params = BootstrapParams::parse_from_bytes(&input)?;
    let told = told(&params, invocation)?;
    let environment = [(TTRPC_ADDRESS, params.containerd_ttrpc_address.as_str())];
    let sockets = params.socket_dir.as_deref().filter(|directory| !directory.is_empty()).unwrap_or(SOCKETS);
    let handler = HandlerConfig::from_params(&params)?;
    let result = BootstrapResult {
        version: i32::try_from(TASK_API_VERSION).unwrap_or(i32::MAX),
        address: find_or_start(&told, handler, Path::new(sockets), &environment)?,
        protocol: "ttrpc".into(),
        ..BootstrapResult::default()
    };
    Ok(result.write_to_bytes()?)
}

/// The call as it would be by flags.
fn told(params: &BootstrapParams, invocation: &Invocation) -> Result<Invocation, ActionError> {
    let id = |what, text: &str| text.parse().map_err(|source| ActionError::Id { what, source });
    Ok(Invocation {
        namespace: Some(id("namespace", &params.namespace)?),
        id: Some(id("instance_id", &params.instance_id)?),
        address: params.containerd_grpc_address.clone(),
        publish_binary: params.containerd_binary.clone(),
        // More verbose levels are the negative ones.
        debug: invocation.debug || params.log_level.value() < 0,
        ..invocation.clone()
    })
}

/// What containerd says on standard input: nothing, when there is nothing to be said.
fn read_input() -> Result<Vec<u8>, ActionError> {
    let mut bytes = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        let read = stdin.lock().take(MAX_PARAMS).read_to_end(&mut bytes);
        read.map_err(io_error("read the parameters"))?;
    }
    Ok(bytes)
}

fn find_or_start(
    invocation: &Invocation,
    handler: Option<HandlerConfig>,
    sockets: &Path,
    environment: &[(&str, &str)],
) -> Result<String, ActionError> {
    let subject = Subject::of(invocation)?;
    let (pod, first) = subject.pod()?;
    let socket = socket_path(sockets, &invocation.address, &subject.namespace, &pod);
    let address = format!("{UNIX}{}", socket.display());
    let note = subject.bundle.join(ADDRESS);
    fs::write(&note, &address).map_err(io_error(format!("write {note:?}")))?;
    if UnixStream::connect(&socket).is_ok() {
        return Ok(address);
    }
    if !first {
        return Err(ActionError::PodGone(pod));
    }
    let config = handler.map(|config| handler_file(config, &subject.bundle)).transpose()?;
    let invocation = &Invocation { socket: Some(socket.clone()), config, ..invocation.clone() };
    let listener = listen(&socket)?;
    match spawn(invocation, &subject, listener, environment) {
        Ok(()) => Ok(address),
        Err(error) => {
            // Nobody will listen there.
            let _ = fs::remove_file(&socket);
            Err(error)
        }
    }
}

/// The file with a handler's configuration.
fn handler_file(config: HandlerConfig, bundle: &Path) -> Result<PathBuf, ActionError> {
    match config {
        HandlerConfig::Path(path) => Ok(path.into()),
        HandlerConfig::Text(text) => {
            let path =
                std::path::absolute(bundle.join(HANDLER_CONFIG)).map_err(io_error("find the bundle"))?;
            fs::write(&path, text).map_err(io_error(format!("write {path:?}")))?;
            Ok(path)
        }
    }
}

/// Listens where nobody does. A socket that is there is a dead shim's.
fn listen(socket: &Path) -> Result<UnixListener, ActionError> {
    let directory = socket.parent().unwrap_or(Path::new(SOCKETS));
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(directory)
        .map_err(io_error(format!("make {directory:?}")))?;
    match fs::remove_file(socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => result.map_err(io_error(format!("remove {socket:?}")))?,
    }
    let listener = UnixListener::bind(socket).map_err(io_error(format!("listen at {socket:?}")))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
        .map_err(io_error(format!("protect {socket:?}")))?;
    Ok(listener)
}

/// Starts the shim itself. It outlives this process, and containerd.
fn spawn(
    invocation: &Invocation,
    subject: &Subject,
    listener: UnixListener,
    environment: &[(&str, &str)],
) -> Result<(), ActionError> {
    let this = std::env::current_exe().map_err(io_error("find this program"))?;
    let mut command = Command::new(this);
    command.args(["-namespace", subject.namespace.as_str(), "-id", subject.id.as_str()]);
    command.args(["-address", &invocation.address]);
    let socket = invocation.socket.as_deref().unwrap_or(Path::new(""));
    command.arg("-socket").arg(socket);
    if let Some(config) = &invocation.config {
        command.arg("-config").arg(config);
    }
    if invocation.debug {
        command.arg("-debug");
    }
    command.envs(environment.iter().copied()).current_dir(&subject.bundle);
    command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::null());
    // Signals that end containerd's group are not for it.
    command.process_group(0);
    let child = command.spawn().map_err(io_error("start the shim"))?;
    // Where that is refused, the shim is spared as containerd is.
    let _ = oom_score::spare_less(child.id());
    // For people. Nothing depends on it.
    let _ = fs::write(subject.bundle.join("shim.pid"), child.id().to_string());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::EnumOrUnknown;

    #[test]
    fn a_message_says_what_flags_say() {
        let flags = Invocation::parse_from_go(["shim", "start"].map(Into::into)).unwrap();
        let mut params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "n".into(),
            containerd_grpc_address: "unix:///run/c.sock".into(),
            ..BootstrapParams::default()
        };
        let same = ["shim", "-id", "c1", "-namespace", "n", "-address", "unix:///run/c.sock", "start"];
        let same = Invocation::parse_from_go(same.map(Into::into)).unwrap();
        assert_eq!(told(&params, &flags).unwrap(), same);
        params.log_level = EnumOrUnknown::from_i32(-4);
        assert!(told(&params, &flags).unwrap().debug);
        params.instance_id = "../c1".into();
        assert!(matches!(told(&params, &flags), Err(ActionError::Id { what: "instance_id", .. })));
    }
}
