//! The `Transfers` service: copies and port-forwards.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use caisson_protocol::v1::copy_target::Within;
use caisson_protocol::v1::{self as proto, transfers_server};
use tonic::{Request, Response, Status};

use super::{Shared, blocking};
use crate::streams::forward;
use crate::task;
use crate::transfer;

#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

impl Service {
    fn may_copy(&self) -> Result<(), Status> {
        self.0.state.accepting()?;
        match self.0.state.policy().deny_copy {
            true => Err(Status::permission_denied("copies are turned off by the node's policy")),
            false => Ok(()),
        }
    }

    /// The directory that a target's path is in.
    fn root(&self, target: Option<&proto::CopyTarget>) -> Result<OwnedFd, Status> {
        match target.and_then(|target| target.within.as_ref()) {
            Some(Within::StorageId(id)) => {
                let path = self.0.storages.path(id)?;
                let directory = File::open(&path).map_err(|error| Status::internal(error.to_string()))?;
                Ok(directory.into())
            }
            Some(Within::ContainerId(id)) => self.0.container_root(id),
            None => Err(Status::invalid_argument("target: neither a container nor a storage")),
        }
    }
}

#[tonic::async_trait]
impl transfers_server::Transfers for Service {
    async fn copy_in(
        &self,
        request: Request<proto::CopyInRequest>,
    ) -> Result<Response<proto::CopyInResponse>, Status> {
        self.may_copy()?;
        let (service, request) = (self.clone(), request.into_inner());
        // A path may lead through what a container mounted, and be as slow as it likes.
        let stream = blocking(move || {
            let root = service.root(request.target.as_ref())?;
            let port = service.0.state.streams.open();
            service.0.transfers.copy_in(root, request, port).map_err(Status::from)
        });
        Ok(Response::new(proto::CopyInResponse { stream: stream.await? }))
    }

    async fn copy_out(
        &self,
        request: Request<proto::CopyOutRequest>,
    ) -> Result<Response<proto::CopyOutResponse>, Status> {
        self.may_copy()?;
        let (service, source) = (self.clone(), request.into_inner().source.unwrap_or_default());
        let reply = blocking(move || {
            let root = service.root(Some(&source))?;
            let port = service.0.state.streams.open();
            service.0.transfers.copy_out(&root, &source.path, port).map_err(Status::from)
        });
        Ok(Response::new(reply.await?))
    }

    async fn wait_transfer(
        &self,
        request: Request<proto::WaitTransferRequest>,
    ) -> Result<Response<proto::WaitTransferResponse>, Status> {
        let bytes = self.0.transfers.wait(request.into_inner().stream).await?;
        Ok(Response::new(proto::WaitTransferResponse { bytes }))
    }

    async fn port_forward(
        &self,
        request: Request<proto::PortForwardRequest>,
    ) -> Result<Response<proto::PortForwardResponse>, Status> {
        self.0.state.accepting()?;
        if self.0.state.policy().deny_port_forward {
            return Err(Status::permission_denied("port-forwards are turned off by the node's policy"));
        }
        let (pod, request) = (self.0.pod().await?, request.into_inner());
        let socket = blocking(move || transfer::connect(&pod, request.port, &request.address)).await?;
        let socket = socket
            .set_nonblocking(true)
            .and_then(|()| tokio::net::TcpStream::from_std(socket))
            .map_err(|error| Status::internal(format!("the connection inside the pod: {error}")))?;
        let port = self.0.state.streams.open();
        let stream = port.id();
        task::spawn(forward(port, socket));
        Ok(Response::new(proto::PortForwardResponse { stream }))
    }
}
