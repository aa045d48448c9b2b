//! The shim as containerd from 2.3 on starts it: all that is to be said in one message, and one for an answer. No
//! distribution has that containerd yet, so the test takes its place.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containers,
    events::Events,
    leaks::Holdings,
    node::{Node, Product},
    record,
};
use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, WaitRequest},
    bootstrap_api::{BootstrapParams, BootstrapResult, Extension},
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
    shim_async::{Client, TaskClient},
    ttrpc::context::{self, Context as Call},
};
use nix::sys::signal::Signal;
use serde_json::json;

const NAMESPACE: &str = "default";
/// Ends with 7 in a machine of more than 250 MB, as the handler's options ask for.
const SCRIPT: &str = "while read key value rest; do [ $key = MemTotal: ] && [ $value -gt 250000 ] && exit 7; done \
                      < /proc/meminfo; exit 1";

/// containerd's `runtimeoptions.v1.Options`, as far as they are used here.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Options {
    #[prost(string, tag = "3")]
    config_body: String,
}

/// A container's bundle as containerd makes it, and its root file system.
struct Bundle {
    directory: tempfile::TempDir,
    id: String,
}

impl Bundle {
    fn make(id: &str) -> Result<Self> {
        let bundle = Self { directory: tempfile::tempdir()?, id: id.into() };
        containers::busybox_root(&bundle.root())?;
        fs::create_dir_all(bundle.path().join("rootfs"))?;
        let mut spec = containers::spec(&containers::process(SCRIPT, false), "{}")?;
        spec["root"] = json!({ "path": "rootfs" });
        let kinds = ["pid", "mount", "ipc", "uts", "network"];
        spec["linux"]["namespaces"] = kinds.map(|kind| json!({ "type": kind })).to_vec().into();
        fs::write(bundle.path().join("config.json"), spec.to_string())?;
        Ok(bundle)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("bundle")
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Starts the shim, and returns its answer.
    fn start(&self, containerd: &Path) -> Result<BootstrapResult> {
        let options = Options { config_body: "[sizing]\ndefault_memory_mib = 300\n".into() };
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: prost::Message::encode_to_vec(&options),
            ..Any::default()
        };
        let socket = containerd.join("containerd.sock");
        let params = BootstrapParams {
            instance_id: self.id.clone(),
            namespace: NAMESPACE.into(),
            containerd_grpc_address: socket.display().to_string(),
            containerd_ttrpc_address: format!("{}.ttrpc", socket.display()),
            containerd_binary: "/usr/bin/containerd".into(),
            extensions: vec![Extension { value: MessageField::some(options), ..Extension::default() }],
            ..BootstrapParams::default()
        };
        let mut command = self.shim(containerd)?;
        command.arg("start").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting the shim")?;
        child.stdin.take().context("a pipe")?.write_all(&params.write_to_bytes()?)?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "{}: {said}", output.status);
        Ok(BootstrapResult::parse_from_bytes(&output.stdout)?)
    }

    /// Has what is left removed, as containerd does after a shim's death.
    fn delete(&self, containerd: &Path) -> Result<()> {
        let mut command = self.shim(containerd)?;
        command.args(["-namespace", NAMESPACE, "-id", &self.id, "-address"]);
        command.arg(containerd.join("containerd.sock")).arg("-bundle").arg(self.path()).arg("delete");
        let deleted = caisson_e2e::ctr::run(&mut command)?;
        ensure!(deleted.code == 0, "{deleted:?}");
        Ok(())
    }

    /// The binary, with the configuration that a containerd in this directory hands on.
    fn shim(&self, containerd: &Path) -> Result<Command> {
        let mut command = Command::new(Product::Shim.path()?);
        command.current_dir(self.path()).env("CAISSON_CONFIG", containerd.join("caisson"));
        Ok(command)
    }
}

/// A call that has a minute.
fn call() -> Call {
    context::with_duration(std::time::Duration::from_secs(60))
}

#[tokio::test]
async fn one_message_starts_a_shim_and_one_tells_where_it_is() -> Result<()> {
    let node = Node::ready()?;
    let socket = node.socket();
    let containerd = socket.parent().context("containerd's directory")?;
    let before = Holdings::now()?;
    let bundle = Bundle::make("bootstrapped")?;
    let mut events = Events::listen(&node)?;
    let answer = bundle.start(containerd)?;
    ensure!((answer.version, answer.protocol.as_str()) == (3, "ttrpc"), "{answer:?}");
    let again = bundle.start(containerd)?;
    ensure!(again.address == answer.address, "a second shim for one container");

    let tasks = TaskClient::new(Client::connect(&answer.address).await?);
    let id = || bundle.id.clone();
    let rootfs = Mount {
        type_: "bind".into(),
        source: bundle.root().display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
        ..Mount::default()
    };
    let create = CreateTaskRequest {
        id: id(),
        bundle: bundle.path().display().to_string(),
        rootfs: vec![rootfs],
        ..CreateTaskRequest::default()
    };
    tasks.create(call(), &create).await.context("Create")?;
    tasks.start(call(), &StartRequest { id: id(), ..StartRequest::default() }).await.context("Start")?;
    let ended = tasks.wait(call(), &WaitRequest { id: id(), ..WaitRequest::default() }).await?;
    ensure!(ended.exit_status == 7, "{ended:?}");
    tasks.delete(call(), &DeleteRequest { id: id(), ..DeleteRequest::default() }).await.context("Delete")?;
    tasks.shutdown(call(), &ShutdownRequest { id: id(), ..ShutdownRequest::default() }).await?;

    let told = events.until(|event| event.topic == "/tasks/delete")?;
    let topics: BTreeSet<_> = told.iter().map(|event| event.topic.as_str()).collect();
    ensure!(topics == ["/tasks/create", "/tasks/delete", "/tasks/exit", "/tasks/start"].into(), "{told:?}");
    ensure!(told.iter().all(|event| event.text("container_id") == bundle.id), "{told:?}");
    drop(events);
    before.assert_nothing_added()
}

/// The addresses of a message, and those of a delete, are the same containerd's, however they are written.
#[tokio::test]
async fn a_shim_of_a_message_that_dies_is_found_by_a_delete() -> Result<()> {
    let node = Node::ready()?;
    let socket = node.socket();
    let containerd = socket.parent().context("containerd's directory")?;
    let before = Holdings::now()?;
    let bundle = Bundle::make("bootstrapped-dead")?;
    let answer = bundle.start(containerd)?;
    let pid = fs::read_to_string(bundle.path().join("shim.pid"))?.trim().parse()?;
    record::send(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
    let socket = answer.address.strip_prefix("unix://").context("an address")?;
    ensure!(Path::new(socket).exists(), "no socket at {socket}");
    bundle.delete(containerd)?;
    before.assert_nothing_added()
}
