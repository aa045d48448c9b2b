//! The gRPC services: thin layers that check a request, call the module that does the work, and name its error's
//! status code.

mod agent;
mod follow;
mod machine;
mod status;

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use caisson_protocol::limits;
use caisson_protocol::v1::agent_server::{AgentServer, SERVICE_NAME as AGENT};
use caisson_protocol::v1::machine_server::{MachineServer, SERVICE_NAME as MACHINE};
use futures_util::FutureExt;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::Server;
use tower::Service;

use crate::clock;
use crate::connection::Incoming;
use crate::state::State;

/// Serves both ports until the process ends.
///
/// # Errors
/// When the transport under the control connections fails.
pub async fn serve(state: Arc<State>, mut incoming: Incoming) -> Result<(), tonic::transport::Error> {
    state.listening_us.store(clock::boottime_us(), Ordering::Release);
    let streams = state.streams.clone();
    tokio::spawn(async move {
        let permits = Arc::new(tokio::sync::Semaphore::new(limits::MAX_STREAM_CONNECTIONS));
        while let Some(connection) = incoming.streams.recv().await {
            // Handshakes in flight are what is bounded here; streams themselves are bounded by who makes them.
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let streams = streams.clone();
            tokio::spawn(async move {
                streams.attach(connection).await;
                drop(permit);
            });
        }
    });
    let control = ReceiverStream::new(incoming.control).map(Ok::<_, Infallible>);
    Server::builder()
        .max_concurrent_streams(limits::MAX_IN_FLIGHT)
        .http2_max_header_list_size(16 << 10)
        .serve_with_incoming(Router::new(state), control)
        .await
}

/// Sends each call to its service by the path's first component.
#[derive(Clone)]
struct Router {
    state: Arc<State>,
    agent: AgentServer<agent::Service>,
    machine: MachineServer<machine::Service>,
}

macro_rules! server {
    ($server:ident, $service:expr) => {
        $server::new($service)
            .max_decoding_message_size(limits::MAX_MESSAGE)
            .max_encoding_message_size(limits::MAX_MESSAGE)
    };
}

impl Router {
    fn new(state: Arc<State>) -> Router {
        Router {
            agent: server!(AgentServer, agent::Service::new(state.clone())),
            machine: server!(MachineServer, machine::Service::new(state.clone())),
            state,
        }
    }
}

impl Service<http::Request<Body>> for Router {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let service = path.split('/').nth(1).unwrap_or_default();
        let call: Self::Future = match service {
            AGENT => Box::pin(self.agent.call(request)),
            MACHINE => Box::pin(self.machine.call(request)),
            _ => {
                let unknown = Status::unimplemented(format!("no service {service:?}"));
                return Box::pin(std::future::ready(Ok(unknown.into_http())));
            }
        };
        let state = self.state.clone();
        // A panic ends this call alone, and is told: the hook has recorded it.
        Box::pin(AssertUnwindSafe(call).catch_unwind().map(move |result| {
            result.unwrap_or_else(|_| {
                state.fault("service", format!("{path} panicked"));
                Ok(Status::internal("the agent's handler panicked").into_http())
            })
        }))
    }
}

/// Runs blocking work (mounts, sysfs, namespaces) off the reactor's thread.
async fn blocking<T, E, F>(work: F) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<Status> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Status::internal("the agent's worker panicked")),
    }
}
