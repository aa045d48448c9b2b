//! Root file systems on block devices, which the guest mounts itself, and block devices that a container gets raw.
//!
//! Some snapshotters (devmapper, blockfile) give a file system's device, or an image of one, instead of directories. The
//! host need not read what a container writes there: it is the guest's kernel that mounts it, from a virtio disk.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use caisson_protocol::v1;
use caisson_vmm_api::{
    config::{BlockDevice, DeviceConfig, FileSource},
    devices::BlockConfig,
};
use rustix::mount::MountFlags;

use super::options::Options;
use super::{Mount, ShareError, at};

/// What the guest's kernel mounts from disks.
const FILE_SYSTEMS: [&str; 2] = ["ext4", "erofs"];
/// The flags that the agent takes by name.
const FLAGS: [(&str, MountFlags); 7] = [
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("sync", MountFlags::SYNCHRONOUS),
    ("dirsync", MountFlags::DIRSYNC),
];

/// A disk with a root file system on it.
#[derive(Debug)]
pub struct Disk {
    /// The device or image, open.
    pub file: OwnedFd,
    /// Whether the guest may only read it.
    pub read_only: bool,
    file_system: String,
    flags: Vec<String>,
    data: String,
}

/// Whether `mounts` describe a disk that the guest can mount.
///
/// # Errors
/// For options that no machine can honour.
pub fn is_disk(mounts: &[Mount]) -> Result<bool, ShareError> {
    Ok(described(mounts)?.is_some())
}

fn described(mounts: &[Mount]) -> Result<Option<(&Mount, Options)>, ShareError> {
    let [mount] = mounts else { return Ok(None) };
    if !FILE_SYSTEMS.contains(&mount.kind.as_str()) || !matches!(mount.target.as_str(), "" | "/") {
        return Ok(None);
    }
    let mut options = Options::parse(mount.options.iter().map(String::as_str))?;
    // A file is as good a disk as a device, without a loop device in between.
    options.data.retain(|option| option != "loop");
    // One file system on several devices is not one disk.
    let several = options.data.iter().any(|option| option.starts_with("device="));
    Ok((!several).then_some((mount, options)))
}

impl Disk {
    /// The disk that `mounts` describe, if it is one and the guest can mount it; anything else is for
    /// [`Share::add_rootfs`](super::Share::add_rootfs).
    ///
    /// # Errors
    /// When it is one and cannot be opened, which is so too for a device that the host has mounted.
    pub fn of(mounts: &[Mount]) -> Result<Option<Disk>, ShareError> {
        let Some((mount, options)) = described(mounts)? else { return Ok(None) };
        let path = Path::new(&mount.source);
        let mut how = File::options();
        how.read(true).write(!options.read_only);
        let is_device = path.metadata().map_err(at("look at", path))?.file_type().is_block_device();
        if is_device && !options.read_only {
            // Of a device only: nobody else has it mounted (open(2)).
            how.custom_flags(libc::O_EXCL);
        }
        let file = how.open(path).map_err(at("open the disk", path))?;
        if !is_device && !file.metadata().map_err(at("look at", path))?.is_file() {
            return Err(at("open the disk", path)(io::ErrorKind::InvalidInput.into()));
        }
        let flags = FLAGS.iter().filter(|(_, flag)| options.flags.contains(*flag));
        Ok(Some(Disk {
            file: file.into(),
            read_only: options.read_only,
            file_system: mount.kind.clone(),
            flags: flags.map(|(name, _)| (*name).to_owned()).collect(),
            data: options.data.join(","),
        }))
    }

    /// The device to be plugged, with [`file`](Self::file) as its only descriptor.
    pub fn device(&self) -> DeviceConfig {
        device(self.read_only)
    }

    /// What the agent is to mount as the storage `id`, once the device is in `slot`.
    pub fn storage(&self, id: &str, slot: u32) -> v1::Storage {
        let block = v1::BlockDevice {
            device: Some(v1::block_device::Device::Slot(slot)),
            fs_type: self.file_system.clone(),
            data: self.data.clone(),
        };
        v1::Storage {
            id: id.to_owned(),
            source: Some(v1::storage::Source::Block(block)),
            read_only: self.read_only,
            options: self.flags.clone(),
        }
    }
}

fn device(read_only: bool) -> DeviceConfig {
    let options = BlockConfig { read_only, ..BlockConfig::default() };
    DeviceConfig::Block(BlockDevice { files: vec![FileSource::Descriptor(0)], options })
}

/// A block device of the host that a container gets as such.
#[derive(Debug)]
pub struct RawDisk {
    /// The device, open.
    pub file: OwnedFd,
    read_only: bool,
}

impl RawDisk {
    /// Opens the device with this number.
    ///
    /// # Errors
    /// When the host has no such device, or it can't be opened.
    pub fn open(major: u32, minor: u32, read_only: bool) -> Result<RawDisk, ShareError> {
        // The kernel's own name for it: what the container calls it may be a node anywhere.
        let event = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/uevent"));
        let text = fs::read_to_string(&event).map_err(at("read", &event))?;
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
        let path = Path::new("/dev").join(name);
        let file =
            File::options().read(true).write(!read_only).open(&path).map_err(at("open the disk", &path))?;
        let found = file.metadata().map_err(at("look at", &path))?;
        if !found.file_type().is_block_device() || found.rdev() != libc::makedev(major, minor) {
            return Err(at("open the disk", &path)(io::ErrorKind::NotFound.into()));
        }
        Ok(RawDisk { file: file.into(), read_only })
    }

    /// The device to be plugged, with [`file`](Self::file) as its only descriptor.
    pub fn device(&self) -> DeviceConfig {
        device(self.read_only)
    }

    /// What the agent is to keep as the storage `id`, once the device is in `slot`: a node, and no mount.
    pub fn storage(&self, id: &str, slot: u32) -> v1::Storage {
        let device = Some(v1::block_device::Device::Slot(slot));
        let block = v1::BlockDevice { device, ..v1::BlockDevice::default() };
        v1::Storage {
            id: id.to_owned(),
            source: Some(v1::storage::Source::Block(block)),
            read_only: self.read_only,
            ..v1::Storage::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Mount { kind: kind.into(), source: source.into(), options, ..Mount::default() }
    }

    fn image() -> (tempfile::NamedTempFile, String) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        (file, path)
    }

    fn access(disk: &Disk) -> rustix::fs::OFlags {
        rustix::fs::fcntl_getfl(disk.file.as_fd()).unwrap() & rustix::fs::OFlags::ACCMODE
    }

    #[test]
    fn an_image_is_a_disk_without_a_loop_device() {
        let (_file, path) = image();
        let disk = Disk::of(&[mount("ext4", &path, &["loop", "noatime", "discard"])]).unwrap().unwrap();
        assert_eq!(access(&disk), rustix::fs::OFlags::RDWR);
        let storage = disk.storage("root-c1", 5);
        assert_eq!((storage.read_only, &storage.options[..]), (false, &["noatime".to_owned()][..]));
        let Some(v1::storage::Source::Block(block)) = storage.source else { panic!("{storage:?}") };
        assert_eq!((block.fs_type.as_str(), block.data.as_str()), ("ext4", "discard"));
    }

    #[test]
    fn a_read_only_disk_is_open_to_read_alone() {
        let (_file, path) = image();
        let disk = Disk::of(&[mount("erofs", &path, &["ro", "loop"])]).unwrap().unwrap();
        assert_eq!(access(&disk), rustix::fs::OFlags::RDONLY);
        assert!(disk.storage("c1", 1).read_only);
        let DeviceConfig::Block(device) = disk.device() else { panic!("no disk") };
        assert!(device.options.read_only);
    }

    #[test]
    fn other_mounts_are_no_disks() {
        let (_file, path) = image();
        let disk = mount("ext4", &path, &["loop"]);
        for mounts in [
            vec![],
            vec![mount("overlay", "overlay", &["lowerdir=/a:/b"])],
            vec![mount("bind", &path, &["rbind"])],
            vec![mount("btrfs", &path, &[])],
            vec![mount("erofs", &path, &["ro", "loop", "device=/layer"])],
            vec![disk.clone(), disk.clone()],
            vec![Mount { target: "/data".into(), ..disk }],
        ] {
            assert!(Disk::of(&mounts).unwrap().is_none(), "{mounts:?}");
        }
    }

    #[test]
    fn what_is_neither_a_device_nor_a_file_is_refused() {
        for path in ["/nonexistent", "/dev/null", "/tmp"] {
            assert!(Disk::of(&[mount("ext4", path, &["ro"])]).is_err(), "{path}");
        }
    }
}
