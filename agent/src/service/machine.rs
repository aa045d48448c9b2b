//! The `Machine` service: clock, entropy, processors, memory, device slots.

use std::sync::Arc;

use caisson_protocol::v1::{self as proto, machine_server};
use tonic::{Request, Response, Status};

use super::{Shared, blocking};
use crate::clock;
use crate::guest::{GuestError, devices, identity, memory, processors};
use crate::state::State;

#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl machine_server::Machine for Service {
    async fn before_snapshot(
        &self,
        _: Request<proto::BeforeSnapshotRequest>,
    ) -> Result<Response<proto::BeforeSnapshotResponse>, Status> {
        self.0.state.accepting()?;
        blocking(memory::release_caches).await?;
        Ok(Response::new(proto::BeforeSnapshotResponse {}))
    }

    async fn after_restore(
        &self,
        request: Request<proto::AfterRestoreRequest>,
    ) -> Result<Response<proto::AfterRestoreResponse>, Status> {
        let (state, request) = (self.0.state.clone(), request.into_inner());
        let hostname = request.hostname.clone();
        let reply = blocking(move || after_restore(&state, &request)).await?;
        // A pod that was in the snapshot has a name of its own.
        if let Ok(pod) = self.0.pod().await {
            blocking(move || pod.set_names(&hostname, "")).await?;
        }
        Ok(Response::new(reply))
    }

    async fn reseed(
        &self,
        request: Request<proto::ReseedRequest>,
    ) -> Result<Response<proto::ReseedResponse>, Status> {
        let entropy = request.into_inner().entropy;
        blocking(move || identity::reseed(&entropy)).await?;
        Ok(Response::new(proto::ReseedResponse {}))
    }

    async fn set_time(
        &self,
        request: Request<proto::SetTimeRequest>,
    ) -> Result<Response<proto::SetTimeResponse>, Status> {
        set_time(request.into_inner().realtime_ns)?;
        Ok(Response::new(proto::SetTimeResponse {}))
    }

    async fn online_cpus(
        &self,
        request: Request<proto::OnlineCpusRequest>,
    ) -> Result<Response<proto::OnlineCpusResponse>, Status> {
        self.0.state.accepting()?;
        let count = request.into_inner().count;
        let now = blocking(move || processors::set_online(count)).await?;
        Ok(Response::new(proto::OnlineCpusResponse { online: now.online, present: now.present }))
    }

    async fn online_memory(
        &self,
        _: Request<proto::OnlineMemoryRequest>,
    ) -> Result<Response<proto::OnlineMemoryResponse>, Status> {
        self.0.state.accepting()?;
        let memory = blocking(processors::online_memory).await?;
        Ok(Response::new(proto::OnlineMemoryResponse {
            online: memory.online,
            block_size: memory.block_size,
        }))
    }

    async fn plug_device(
        &self,
        request: Request<proto::PlugDeviceRequest>,
    ) -> Result<Response<proto::PlugDeviceResponse>, Status> {
        self.0.state.accepting()?;
        let slot = request.into_inner().slot;
        let device = blocking(move || devices::plug(slot)).await?;
        Ok(Response::new(proto::PlugDeviceResponse { device: Some(device) }))
    }

    async fn unplug_device(
        &self,
        request: Request<proto::UnplugDeviceRequest>,
    ) -> Result<Response<proto::UnplugDeviceResponse>, Status> {
        let (storages, slot) = (self.0.storages.clone(), request.into_inner().slot);
        blocking(move || {
            if storages.uses_slot(slot) {
                return Err(Status::failed_precondition(format!("a storage is on slot {slot}")));
            }
            devices::unplug(slot).map_err(Status::from)
        })
        .await?;
        Ok(Response::new(proto::UnplugDeviceResponse {}))
    }

    async fn list_devices(
        &self,
        _: Request<proto::ListDevicesRequest>,
    ) -> Result<Response<proto::ListDevicesResponse>, Status> {
        let devices = blocking(devices::list).await?;
        Ok(Response::new(proto::ListDevicesResponse { devices }))
    }
}

/// Everything is checked before anything changes. Entropy comes first: what follows draws from it.
fn after_restore(
    state: &State,
    request: &proto::AfterRestoreRequest,
) -> Result<proto::AfterRestoreResponse, GuestError> {
    if !request.hostname.is_empty() {
        identity::check_hostname(&request.hostname)?;
    }
    if !request.machine_id.is_empty() {
        identity::check_machine_id(&request.machine_id)?;
    }
    identity::reseed(&request.entropy)?;
    if request.realtime_ns != 0 {
        set_time(request.realtime_ns)?;
    }
    if !request.hostname.is_empty() {
        identity::set_hostname(&request.hostname)?;
    }
    let machine_id = identity::set_machine_id(&request.machine_id)?;
    for slot in &request.slots {
        devices::plug(*slot)?;
    }
    let epoch = state.renew_epoch().map_err(GuestError::file("read", "/dev/urandom"))?;
    Ok(proto::AfterRestoreResponse { machine_id, boot_id: identity::boot_id()?, epoch })
}

fn set_time(realtime_ns: i64) -> Result<(), GuestError> {
    if realtime_ns <= 0 {
        return Err(GuestError::Invalid(format!("realtime_ns: {realtime_ns} is before 1970")));
    }
    clock::set_realtime_ns(realtime_ns)
        .map_err(|errno| GuestError::file("clock_settime", "CLOCK_REALTIME")(errno.into()))
}
