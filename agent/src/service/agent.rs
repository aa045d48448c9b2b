//! The `Agent` service: what the agent is, how it is, what it saw.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use caisson_protocol::v1::health_response::State as Health;
use caisson_protocol::v1::{self as proto, agent_server};
use caisson_protocol::{MAX_PROTOCOL, MIN_PROTOCOL};
use tonic::{Request, Response, Status};

use super::blocking;
use super::follow::{Followed, follow};
use crate::guest::{GuestError, identity, processors, read};
use crate::metrics;
use crate::state::State;

/// Optional abilities of this build, told by `Version`.
const FEATURES: [&str; 3] = ["plug", "restore", "events-resume"];

#[derive(Clone)]
pub(super) struct Service {
    state: Arc<State>,
}

impl Service {
    pub(super) fn new(state: Arc<State>) -> Service {
        Service { state }
    }
}

#[tonic::async_trait]
impl agent_server::Agent for Service {
    type EventsStream = Followed<proto::Event>;
    type LogsStream = Followed<proto::LogLine>;

    async fn version(
        &self,
        request: Request<proto::VersionRequest>,
    ) -> Result<Response<proto::VersionResponse>, Status> {
        let theirs = request.into_inner();
        let protocol = theirs.max_protocol.min(MAX_PROTOCOL);
        if protocol < theirs.min_protocol.max(MIN_PROTOCOL) {
            return Err(Status::failed_precondition(format!(
                "the agent speaks protocol versions {MIN_PROTOCOL} to {MAX_PROTOCOL}, the client {} to {}",
                theirs.min_protocol, theirs.max_protocol
            )));
        }
        Ok(Response::new(proto::VersionResponse {
            protocol,
            min_protocol: MIN_PROTOCOL,
            max_protocol: MAX_PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            features: FEATURES.map(str::to_owned).to_vec(),
            epoch: self.state.epoch(),
            root: self.state.root.to_string_lossy().into_owned(),
        }))
    }

    async fn health(
        &self,
        _: Request<proto::HealthRequest>,
    ) -> Result<Response<proto::HealthResponse>, Status> {
        let health = match *self.state.shutdown.borrow() {
            Some(_) => Health::ShuttingDown,
            None if self.state.is_degraded() => Health::Degraded,
            None => Health::Serving,
        };
        Ok(Response::new(proto::HealthResponse { state: health.into(), faults: self.state.faults() }))
    }

    async fn guest_details(
        &self,
        _: Request<proto::GuestDetailsRequest>,
    ) -> Result<Response<proto::GuestDetailsResponse>, Status> {
        let state = self.state.clone();
        blocking(move || guest_details(&state)).await.map(Response::new)
    }

    async fn metrics(
        &self,
        _: Request<proto::MetricsRequest>,
    ) -> Result<Response<proto::MetricsResponse>, Status> {
        let state = self.state.clone();
        let metrics = blocking(move || Ok::<_, Status>(metrics::collect(&state))).await?;
        Ok(Response::new(proto::MetricsResponse { metrics }))
    }

    async fn restrict_policy(
        &self,
        request: Request<proto::RestrictPolicyRequest>,
    ) -> Result<Response<proto::RestrictPolicyResponse>, Status> {
        let by = request.into_inner().policy.unwrap_or_default();
        Ok(Response::new(proto::RestrictPolicyResponse { policy: Some(self.state.restrict(&by)) }))
    }

    async fn events(
        &self,
        request: Request<proto::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let request = request.into_inner();
        if !request.epoch.is_empty() && request.epoch != self.state.epoch() {
            return Err(Status::out_of_range("the events of that epoch are gone"));
        }
        let from = match request.from_sequence {
            0 => self.state.events.next(),
            from => from,
        };
        // A gap that is there from the start is the call's own status.
        self.state.events.read(from)?;
        Ok(Response::new(follow(self.state.clone(), |state| &state.events, from, true)))
    }

    async fn logs(&self, request: Request<proto::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let from = match request.from_sequence {
            0 => self.state.lines.oldest(),
            from => from,
        };
        self.state.lines.read(from)?;
        Ok(Response::new(follow(self.state.clone(), |state| state.lines.as_ref(), from, !request.no_follow)))
    }
}

fn guest_details(state: &State) -> Result<proto::GuestDetailsResponse, GuestError> {
    let system = nix::sys::utsname::uname().map_err(|errno| GuestError::file("uname", "/")(errno.into()))?;
    let processors = processors::processors()?;
    let memory = metrics::memory(&read("/proc/meminfo")?);
    let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
    Ok(proto::GuestDetailsResponse {
        kernel_release: text(system.release()),
        kernel_version: text(system.version()),
        architecture: text(system.machine()),
        cpus_present: processors.present,
        cpus_online: processors.online,
        memory_total: memory.total,
        memory_free: memory.free,
        memory_available: memory.available,
        memory_block_size: processors::memory_block_size().unwrap_or(0),
        agent_started_us: state.started_us,
        agent_listening_us: state.listening_us.load(Ordering::Acquire),
        hostname: text(system.nodename()),
        machine_id: identity::machine_id(),
        // Not read here: the first read fixes it, and clones of a template shall each have their own.
        boot_id: String::new(),
        is_init: state.is_init,
    })
}
