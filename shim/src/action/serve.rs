//! The shim itself: one process for a pod's life.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;

use super::start::TTRPC_ADDRESS;
use super::{ActionError, Subject, config_files, io_error};
use crate::directory;
use crate::events::Events;
use crate::invocation::Invocation;
use crate::log;
use crate::pod::{Pod, Settings};
use crate::rest::{self, Activity};
use crate::service;

/// How long containerd is given to notice the last answer before its connection ends: when it notices both at once, it may
/// take the answer for one that never came.
const ANSWERED: Duration = Duration::from_millis(200);
/// How long containerd may take for the last events and answers.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Serves the pod until nothing is left of it. The socket, listening, is standard input.
///
/// # Errors
/// When there is no socket to serve.
pub fn run(invocation: &Invocation) -> Result<(), ActionError> {
    let subject = Subject::of(invocation)?;
    log::to_containerd(&subject.namespace, &subject.id, invocation.debug);
    rest::prepare();
    #[cfg(feature = "failpoints")]
    crate::failpoint::arm();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(rest::THREAD_KEEP_ALIVE)
        .build()
        .map_err(io_error("make an executor"))?;
    let served = runtime.block_on(serve(subject, invocation));
    if let Err(error) = &served {
        tracing::error!(error = log::one_line(error), "the shim can't go on");
        remove_socket(invocation);
    }
    runtime.shutdown_timeout(LAST_WORDS);
    served
}

async fn serve(subject: Subject, invocation: &Invocation) -> Result<(), ActionError> {
    let listener = inherited_socket()?;
    let address = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let (events, publisher) = Events::publish(&address, subject.namespace.as_str());
    let settings = Settings {
        namespace: subject.namespace,
        id: subject.id,
        root: Path::new(directory::ROOT).to_owned(),
        config: config_files(invocation.config.clone()),
    };
    let pod = Arc::new(Pod::new(settings, events));
    let activity = Activity::default();
    let services = service::all(&pod, &activity);
    let mut server = Server::new().add_listener(listener.into()).register_service(services);
    server.start().await?;
    tokio::spawn(activity.rest_when_quiet());
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "serving");

    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("listen for signals"))?;
    tokio::select! {
        () = pod.finished() => {}
        _ = terminate.recv() => pod.shutdown(true).await,
        _ = interrupt.recv() => pod.shutdown(true).await,
    }
    // From here on a new shim may be started for a pod of the same name, whose socket has the same path.
    remove_socket(invocation);
    tokio::time::sleep(ANSWERED).await;
    if tokio::time::timeout(LAST_WORDS, server.shutdown()).await.is_err() {
        tracing::debug!("containerd keeps its connection");
    }
    publisher.close(LAST_WORDS).await;
    Ok(())
}

fn remove_socket(invocation: &Invocation) {
    if let Some(socket) = &invocation.socket {
        // `delete` may have been faster.
        let _ = fs::remove_file(socket);
    }
}

fn inherited_socket() -> Result<tokio::net::UnixListener, ActionError> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(io_error("take the socket"))?;
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(true).map_err(io_error("use the socket"))?;
    tokio::net::UnixListener::from_std(listener).map_err(io_error("use the socket"))
}
