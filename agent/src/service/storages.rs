//! The `Storages` service.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use caisson_protocol::v1::{self as proto, storages_server};
use tonic::{Request, Response, Status};

use super::{Shared, blocking};
use crate::storage::StorageError;

/// The number of a block device's node; zeros for anything else.
fn block_number(path: &Path) -> (u32, u32) {
    let device = fs::metadata(path).ok().filter(|found| found.file_type().is_block_device());
    device.map_or((0, 0), |device| (libc::major(device.rdev()), libc::minor(device.rdev())))
}

#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl storages_server::Storages for Service {
    async fn mount_storage(
        &self,
        request: Request<proto::MountStorageRequest>,
    ) -> Result<Response<proto::MountStorageResponse>, Status> {
        self.0.state.accepting()?;
        let (storages, request) = (self.0.storages.clone(), request.into_inner());
        let mounted = blocking(move || {
            let path = storages.mount(&request.storage.unwrap_or_default(), "")?;
            let (major, minor) = block_number(&path);
            let path = path.to_string_lossy().into_owned();
            Ok::<_, StorageError>(proto::MountStorageResponse { path, major, minor })
        });
        Ok(Response::new(mounted.await?))
    }

    async fn unmount_storage(
        &self,
        request: Request<proto::UnmountStorageRequest>,
    ) -> Result<Response<proto::UnmountStorageResponse>, Status> {
        let (storages, id) = (self.0.storages.clone(), request.into_inner().id);
        blocking(move || storages.unmount(&id)).await?;
        Ok(Response::new(proto::UnmountStorageResponse {}))
    }

    async fn list_storages(
        &self,
        _: Request<proto::ListStoragesRequest>,
    ) -> Result<Response<proto::ListStoragesResponse>, Status> {
        let storages = self.0.storages.clone();
        let storages = blocking(move || Ok::<_, StorageError>(storages.list())).await?;
        Ok(Response::new(proto::ListStoragesResponse { storages }))
    }

    async fn sync_tree(
        &self,
        request: Request<proto::SyncTreeRequest>,
    ) -> Result<Response<proto::SyncTreeResponse>, Status> {
        self.0.state.accepting()?;
        let (storages, request) = (self.0.storages.clone(), request.into_inner());
        blocking(move || storages.sync_tree(&request.storage_id, &request.entries)).await?;
        Ok(Response::new(proto::SyncTreeResponse {}))
    }
}
