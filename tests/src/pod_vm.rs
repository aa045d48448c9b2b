//! The agent as PID 1 of a guest in our own VMM, and a client of it over vsock.

use std::{
    fs::{self, File},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_protocol::{client::Client, connect::UnixVsock, v1};
use caisson_vmm_api::{
    config::{BlockDevice, DeviceConfig, FileSource, FsDevice, MachineConfig, NetDevice, VsockDevice},
    control::protocol::{RestoreCommand, RestoredDevice},
    devices::{BlockConfig, FsConfig, VsockConfig},
};

use crate::{
    containers::{Pod, Root},
    node::Product,
    vmm::{PATIENCE, Vmm},
};

/// The slot of the vsock device, which is there from the start.
const VSOCK_SLOT: u8 = 0;

/// The storage with the image's files.
const IMAGE: &str = "image";

/// A guest with our agent in it.
pub struct PodVm {
    /// The VMM.
    pub vmm: Vmm,
    /// A connected client.
    pub client: Client<UnixVsock>,
    /// What the agent told of the sandbox, once there is one.
    pub sandbox: v1::CreateSandboxResponse,
    directory: tempfile::TempDir,
}

impl PodVm {
    /// Boots a guest with one processor and 128 MiB, of which `more` in a machine file may say otherwise, and waits
    /// until its agent answers.
    ///
    /// # Errors
    /// When something is missing, the VMM refuses, or the agent does not answer; the error shows the console then.
    pub async fn boot(more: &str) -> Result<Self> {
        Self::boot_with_options("", more).await
    }

    /// As [`boot`](Self::boot), with options of the agent on the kernel's command line.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub async fn boot_with_options(options: &str, more: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (kernel, initramfs) = (Product::Kernel.path()?, Product::Initramfs.path()?);
        let file = directory.path().join("machine.toml");
        fs::write(
            &file,
            format!(
                "kernel.image = {kernel:?}\nkernel.initramfs = {initramfs:?}\n\
                 kernel.command_line = 'console=ttyS0 quiet {options}'\nconsole.rate = 16777216\n\
                 memory.size_mib = 128\n{more}"
            ),
        )?;
        let mut config = MachineConfig::from_file(&file)?;
        config.devices.insert(VSOCK_SLOT.into(), vsock(&directory.path().join("vsock"), 3));
        let vmm = Vmm::boot(config)?;
        Self::connect(vmm, directory).await
    }

    /// Connects to the agent of a guest that runs.
    async fn connect(mut vmm: Vmm, directory: tempfile::TempDir) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(UnixVsock::new(directory.path().join("vsock"))).await {
                Ok(client) => return Ok(Self { vmm, client, sandbox: Default::default(), directory }),
                Err(error) => {
                    let ended = vmm.ended()?;
                    if ended.is_some() || Instant::now() > deadline {
                        // What is on its way belongs to the message.
                        let _ = vmm.expect("a line that never comes");
                        bail!("no agent: {error:?}; VMM ended: {ended:?}; console:\n{}", vmm.tail());
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Saves the guest and ends it; [`Template::clone_it`] brings it back.
    ///
    /// # Errors
    /// When the VMM refuses.
    pub fn into_template(mut self) -> Result<Template> {
        let (state, memory) = (self.directory.path().join("state"), self.directory.path().join("memory"));
        self.vmm.client.pause()?;
        self.vmm.client.snapshot(File::create(&state)?.as_fd(), File::create(&memory)?.as_fd())?;
        Ok(Template { directory: self.directory })
    }

    /// Plugs a read-only disk with the busybox image, mounts it, makes the sandbox, and returns its pod.
    ///
    /// # Errors
    /// When a tool is missing, or the VMM or the agent refuses.
    pub async fn pod(&mut self) -> Result<Pod> {
        self.pod_of(v1::CreateSandboxRequest { id: "pod".into(), ..Default::default() }).await
    }

    /// As [`pod`](Self::pod), of a sandbox as it is asked for.
    ///
    /// # Errors
    /// As [`pod`](Self::pod).
    pub async fn pod_of(&mut self, request: v1::CreateSandboxRequest) -> Result<Pod> {
        self.plug_image().await?;
        self.sandbox = self.client.sandbox().create_sandbox(request).await?.into_inner();
        Ok(Pod { client: self.client.clone(), root: Root::Storage(IMAGE.into()) })
    }

    /// Plugs a network card on a tap device.
    ///
    /// # Errors
    /// When the VMM or the agent refuses.
    pub async fn plug_card(&mut self, tap: BorrowedFd<'_>, mac: &str) -> Result<()> {
        let options = serde_json::from_value(serde_json::json!({"mac": mac}))?;
        let device = DeviceConfig::Net(NetDevice { tap: FileSource::Descriptor(0), options });
        let (slot, _) = self.vmm.client.plug(None, device, &[tap])?;
        self.client.machine().plug_device(v1::PlugDeviceRequest { slot: slot.into() }).await?;
        Ok(())
    }

    /// Plugs a shared directory, and returns its slot.
    ///
    /// # Errors
    /// When the VMM or the agent refuses.
    pub async fn plug_share(&mut self, directory: &Path, tag: &str) -> Result<u32> {
        let options = FsConfig { tag: tag.into(), ..FsConfig::default() };
        let device =
            DeviceConfig::Fs(FsDevice { directory: Some(FileSource::Path(directory.into())), options });
        let (slot, _) = self.vmm.client.plug(None, device, &[])?;
        let slot = u32::from(slot);
        self.client.machine().plug_device(v1::PlugDeviceRequest { slot }).await?;
        Ok(slot)
    }

    /// Mounts a shared directory as the storage of the same name, and returns where it is in the guest.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn mount_share(&self, tag: &str) -> Result<String> {
        let source = v1::storage::Source::VirtioFs(v1::VirtioFs { tag: tag.into(), dax: false });
        let storage = v1::Storage { id: tag.into(), source: Some(source), ..Default::default() };
        let request = v1::MountStorageRequest { storage: Some(storage) };
        Ok(self.client.storages().mount_storage(request).await?.into_inner().path)
    }

    async fn plug_image(&mut self) -> Result<()> {
        let disk = self.directory.path().join("image.erofs");
        image_disk(&disk)?;
        let options = BlockConfig { id: IMAGE.into(), read_only: true, ..Default::default() };
        let device = DeviceConfig::Block(BlockDevice { files: vec![FileSource::Descriptor(0)], options });
        let (slot, _) = self.vmm.client.plug(None, device, &[File::open(&disk)?.as_fd()])?;
        let slot = u32::from(slot);
        self.client.machine().plug_device(v1::PlugDeviceRequest { slot }).await?;
        let block = v1::BlockDevice {
            device: Some(v1::block_device::Device::Slot(slot)),
            fs_type: "erofs".into(),
            data: String::new(),
        };
        let storage = v1::Storage {
            id: IMAGE.into(),
            source: Some(v1::storage::Source::Block(block)),
            read_only: true,
            ..Default::default()
        };
        let request = v1::MountStorageRequest { storage: Some(storage) };
        self.client.storages().mount_storage(request).await?;
        Ok(())
    }
}

/// A saved guest.
pub struct Template {
    directory: tempfile::TempDir,
}

impl Template {
    /// A guest that goes on where the saved one was paused. Its agent has not been told of it.
    ///
    /// # Errors
    /// When the VMM refuses, or the agent does not answer.
    pub async fn clone_it(&self, cid: u32) -> Result<PodVm> {
        let directory = tempfile::tempdir()?;
        let mut vmm = Vmm::restore(RestoreCommand {
            state: FileSource::Path(self.directory.path().join("state")),
            memory: FileSource::Path(self.directory.path().join("memory")),
            console: Default::default(),
            devices: vec![RestoredDevice {
                slot: VSOCK_SLOT,
                device: vsock(&directory.path().join("vsock"), cid),
            }],
        })?;
        vmm.client.resume()?;
        PodVm::connect(vmm, directory).await
    }
}

/// A vsock device behind a unix socket.
#[must_use]
pub fn vsock(socket: &Path, guest_cid: u32) -> DeviceConfig {
    DeviceConfig::Vsock(VsockDevice {
        socket: FileSource::Path(socket.into()),
        dialer: None,
        dialer_ports: Vec::new(),
        options: VsockConfig { guest_cid },
    })
}

/// Makes an EROFS disk of the busybox image's layers.
fn image_disk(disk: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    let (layout, root) = (work.path().join("layout"), work.path().join("root"));
    let archive = Product::Images.path()?.join("busybox.tar");
    untar(&archive, &layout)?;
    let index = json(&layout.join("index.json"))?;
    let manifest = json(&blob(&layout, &index["manifests"][0]["digest"])?)?;
    for layer in manifest["layers"].as_array().context("a manifest without layers")? {
        untar(&blob(&layout, &layer["digest"])?, &root)?;
    }
    let output = Command::new("mkfs.erofs").arg(disk).arg(&root).output().context("starting mkfs.erofs")?;
    ensure!(output.status.success(), "mkfs.erofs: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn untar(archive: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let status = Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(to).status()?;
    ensure!(status.success(), "unpacking {}: {status}", archive.display());
    Ok(())
}

fn json(path: &Path) -> Result<serde_json::Value> {
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

fn blob(layout: &Path, digest: &serde_json::Value) -> Result<PathBuf> {
    let digest = digest.as_str().context("no digest")?;
    Ok(layout.join("blobs").join(digest.replace(':', "/")))
}
