//! How a container is made: its place in the machine, its disks, its volumes, itself.

use std::path::Path;

use caisson_protocol::client::with_deadline;
use caisson_protocol::v1;
use serde_json::Value;

use super::{Container, LONG, NewContainer};
use crate::bundle::Spec;
use crate::id::Id;
use crate::journal::Journal;
use crate::phases::Phases;
use crate::pod::disks;
use crate::pod::error::PodError;
use crate::pod::spec::{self, Bind, GuestSpec, Place};
use crate::pod::volumes::StandIn;
use crate::share::{Disk, Mount, Share};
use crate::sizing::{Demand, Limits};

/// Where the mounts of a container come from that are not new ones.
#[derive(Debug, Default)]
struct StandIns {
    /// From the host.
    shared: Vec<Bind>,
    /// From parts of what the guest has.
    parts: Vec<v1::Storage>,
}

impl Container {
    /// Shares its files, makes it in the guest up to the point where its process waits to be started, and connects its
    /// streams.
    ///
    /// # Errors
    /// When any of it fails; [`remove`](Self::remove) then takes away what there is of it.
    pub(super) async fn make(
        &self,
        new: NewContainer,
        id: Id,
        spec: Spec,
        member: bool,
    ) -> Result<(), PodError> {
        let mut phases = Phases::begin();
        let limits = spec::limits(&spec.config).apply(Limits::default());
        let oom_score = spec.config.pointer("/process/oomScoreAdj").and_then(Value::as_i64);
        let name = spec.name().unwrap_or(&new.id);
        let add = |demand: &mut Demand| demand.add(name, &new.id, limits);
        self.sandbox.size().await.grow(self.sandbox.machine(), add).await?;
        phases.done("size");
        let (root, shm) = (self.sandbox.guest_path(&format!("{id}/rootfs")), self.sandbox.guest_shm());
        let (names, files) = (self.sandbox.names(), self.sandbox.files());
        let place = Place { member, root: &root, shm: &shm, files, names };
        let rootfs =
            if new.rootfs.is_empty() { vec![bundled_root(&new.bundle, &spec.config)] } else { new.rootfs };
        let mut guest = spec::container(spec.config, &place)?;
        let root_disk = self.plug_root(&rootfs).await?;
        self.plug_devices(&mut guest).await?;
        let StandIns { shared: binds, mut parts } = self.stand_ins(&id, &mut guest).await?;
        let shared_root = root_disk.is_none().then_some(rootfs);
        let share_id = id.clone();
        let add = move |share: &Share, journal: &mut Journal| {
            if let Some(rootfs) = shared_root {
                share.add_rootfs(journal, &share_id, &rootfs)?;
            }
            let mut placed = Vec::new();
            for bind in &binds {
                placed.push((bind.index, share.add_volume(journal, &share_id, &bind.volume)?));
            }
            Ok(placed)
        };
        for (index, placed) in self.sandbox.with_share(add).await? {
            let path = placed.path.to_string_lossy();
            match placed.part {
                None => guest.set_source(index, &self.sandbox.guest_path(&path)),
                Some(part) => {
                    let part = self.sandbox.shared_part(&path, part);
                    parts.push(self.part_storage(&id, &mut guest, index, part));
                }
            }
        }
        phases.done("share");
        let request = v1::CreateContainerRequest {
            id: new.id,
            spec: serde_json::to_vec(&guest.spec).map_err(spec::SpecError::from)?,
            rootfs_storage: root_disk.as_ref().map(|storage| storage.id.clone()).unwrap_or_default(),
            storages: root_disk.into_iter().chain(parts).collect(),
            streams: Some(new.stdio.selection()),
        };
        let mut containers = self.sandbox.containers();
        let made = self.answer(containers.create_container(with_deadline(request, LONG))).await?;
        phases.done("guest");
        self.attach(&self.init, made.streams).await?;
        phases.done("streams");
        if let Some(oom_score) = oom_score.and_then(|value| i32::try_from(value).ok()) {
            self.sandbox.spare_as_much_as(oom_score);
        }
        tracing::info!(container = self.id, %phases, "created");
        Ok(())
    }

    /// Gives the machine the disk that its root file system is on, if that is so; the guest then mounts it.
    async fn plug_root(&self, rootfs: &[Mount]) -> Result<Option<v1::Storage>, PodError> {
        let mounts = rootfs.to_owned();
        let Some(disk) = tokio::task::spawn_blocking(move || Disk::of(&mounts)).await?? else {
            return Ok(None);
        };
        let slot = disks::plug(self.sandbox.machine(), &disk.file, disk.device()).await?;
        self.disks().root = Some(slot);
        Ok(Some(disk.storage(&format!("root-{slot}"), slot.into())))
    }

    /// Gives the machine the block devices that it has raw.
    async fn plug_devices(&self, guest: &mut GuestSpec) -> Result<(), PodError> {
        let mut devices = Vec::new();
        for (index, wanted) in guest.block_devices() {
            let number = self.sandbox.raw_disks().take(self.sandbox.machine(), wanted).await?;
            self.disks().raw.push(wanted);
            devices.push((index, wanted, number));
        }
        guest.renumber(&devices);
        Ok(())
    }

    /// Has the guest's own volumes take the place of the host's where that is better.
    async fn stand_ins(&self, id: &Id, guest: &mut GuestSpec) -> Result<StandIns, PodError> {
        let mut found = StandIns::default();
        let (machine, volumes) = (self.sandbox.machine(), self.sandbox.volumes());
        for bind in std::mem::take(&mut guest.binds) {
            if let Some(files) = self.sandbox.files()
                && let Ok(name) = bind.volume.source.strip_prefix(files)
            {
                let copies = volumes.files(machine, files).await?;
                guest.set_source(bind.index, &format!("{copies}/{}", name.display()));
                continue;
            }
            match volumes.stand_in(machine, &bind.volume).await? {
                Some(StandIn::Directory(path)) => guest.set_source(bind.index, &path),
                Some(StandIn::HugePages(size)) => guest.set_huge_pages(bind.index, size),
                Some(StandIn::Part(part)) => {
                    found.parts.push(self.part_storage(id, guest, bind.index, part));
                }
                None => found.shared.push(bind),
            }
        }
        Ok(found)
    }

    /// A storage of a part of what the guest has, from which a mount comes.
    fn part_storage(&self, id: &Id, guest: &mut GuestSpec, index: usize, part: v1::Part) -> v1::Storage {
        let storage = v1::Storage {
            id: format!("part-{index}-{id}"),
            source: Some(v1::storage::Source::Part(part)),
            ..v1::Storage::default()
        };
        guest.set_source(index, &self.sandbox.guest_storage(&storage.id));
        storage
    }
}

/// The root file system of a bundle that was not given mounts: the directory that `root.path` names, absolute or in
/// the bundle.
fn bundled_root(bundle: &Path, config: &Value) -> Mount {
    let path = config.pointer("/root/path").and_then(Value::as_str).unwrap_or("rootfs");
    Mount {
        kind: "bind".into(),
        source: bundle.join(path).to_string_lossy().into_owned(),
        target: String::new(),
        options: vec!["rbind".into(), "rw".into()],
    }
}
