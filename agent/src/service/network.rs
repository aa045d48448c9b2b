//! The `Network` service.

use std::sync::Arc;

use caisson_protocol::v1::{self as proto, network_server};
use tonic::{Request, Response, Status};

use super::{Shared, blocking};
use crate::network;

#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl network_server::Network for Service {
    async fn apply_network(
        &self,
        request: Request<proto::ApplyNetworkRequest>,
    ) -> Result<Response<proto::ApplyNetworkResponse>, Status> {
        self.0.state.accepting()?;
        let config = request.into_inner().network.unwrap_or_default();
        let pod = self.0.pod().await?;
        blocking(move || network::apply(pod.network(), &config)).await?;
        Ok(Response::new(proto::ApplyNetworkResponse {}))
    }

    async fn remove_interface(
        &self,
        request: Request<proto::RemoveInterfaceRequest>,
    ) -> Result<Response<proto::RemoveInterfaceResponse>, Status> {
        let (pod, mac) = (self.0.pod().await?, request.into_inner().mac);
        blocking(move || network::remove_interface(pod.network(), &mac)).await?;
        Ok(Response::new(proto::RemoveInterfaceResponse {}))
    }

    async fn get_network(
        &self,
        _: Request<proto::GetNetworkRequest>,
    ) -> Result<Response<proto::GetNetworkResponse>, Status> {
        let pod = self.0.pod().await?;
        let network = blocking(move || network::list(pod.network())).await?;
        Ok(Response::new(proto::GetNetworkResponse { network: Some(network) }))
    }

    async fn set_dns(
        &self,
        request: Request<proto::SetDnsRequest>,
    ) -> Result<Response<proto::SetDnsResponse>, Status> {
        self.0.pod().await?;
        network::write_resolv_conf(&self.0.resolv_conf(), &request.into_inner().dns.unwrap_or_default())?;
        Ok(Response::new(proto::SetDnsResponse {}))
    }
}
