//! What a machine needs from the host, opened before it runs.
//!
//! This is the only place that opens files. It runs in the launcher, with the host in view; the machine that
//! is made from its result runs where nothing can be opened.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::PathBuf,
};

use caisson_virtio::devices::{
    net::Tap,
    vsock::{Dialer, HostEnd, PassingDialer, PathDialer},
};
use caisson_vmm_api::config::{ConsoleConfig, DeviceConfig, FileSource, MachineConfig, VsockDevice};
use kvm_ioctls::Kvm;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::machine::OpenDevice;

/// A resource that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A file could not be opened.
    #[error("{field}: opening {name}")]
    Open {
        /// The field of the configuration that names it.
        field: String,
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// KVM could not be opened.
    #[error("opening /dev/kvm")]
    Kvm(#[source] io::Error),
}

/// Where `fd:N` finds descriptor N.
pub enum Descriptors {
    /// Among those that the process was started with.
    Inherited,
    /// Among those that came with a request.
    Passed(Vec<OwnedFd>),
}

/// How a file is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read.
    Read,
    /// To append to, and made if it is not there.
    Append,
    /// To read and write.
    ReadWrite,
    /// To write, and made if it is not there. What is in it stays until it is known that it is to go.
    Create,
    /// A directory, to find files in.
    Directory,
}

impl Descriptors {
    /// Opens what `source` names; `field` is for the error.
    ///
    /// # Errors
    /// When it does not exist or may not be opened.
    pub fn open(&self, field: &str, source: &FileSource, access: Access) -> Result<File, ResourceError> {
        let opened = match source {
            FileSource::Path(path) => {
                let mut options = OpenOptions::new();
                match access {
                    Access::Read => options.read(true),
                    Access::Append => options.append(true).create(true),
                    Access::ReadWrite => options.read(true).write(true),
                    Access::Create => options.write(true).create(true).truncate(false),
                    Access::Directory => options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY),
                };
                options.open(path)
            }
            FileSource::Descriptor(number) => self.duplicate(*number, access),
        };
        opened.map_err(|source_error| ResourceError::Open {
            field: field.to_owned(),
            name: source.to_string(),
            source: source_error,
        })
    }

    fn duplicate(&self, number: u32, access: Access) -> io::Result<File> {
        let missing = || io::Error::from_raw_os_error(libc::EBADF);
        let descriptor = match self {
            Self::Inherited => {
                let raw = i32::try_from(number).map_err(|_| missing())?;
                // SAFETY: the borrow ends with the call below, which fails cleanly on a number that is not
                // open.
                let inherited = unsafe { BorrowedFd::borrow_raw(raw) };
                duplicate(inherited)?
            }
            Self::Passed(passed) => {
                let index = usize::try_from(number).map_err(|_| missing())?;
                duplicate(passed.get(index).ok_or_else(missing)?.as_fd())?
            }
        };
        check_access(&descriptor, access)?;
        Ok(File::from(descriptor))
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: the call has just returned it, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// A descriptor that was handed over must allow what it is for, or a guest finds out at the worst moment.
fn check_access(fd: &OwnedFd, access: Access) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    let mode = flags & OFlag::O_ACCMODE;
    let allowed = match access {
        Access::Read => mode != OFlag::O_WRONLY,
        Access::Append | Access::Create => mode != OFlag::O_RDONLY,
        Access::ReadWrite => mode == OFlag::O_RDWR,
        // That it is one is seen when it is served.
        Access::Directory => true,
    };
    if allowed { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Opens KVM.
///
/// # Errors
/// When the device is missing or may not be used.
pub fn open_kvm() -> Result<Kvm, ResourceError> {
    Kvm::new().map_err(|error| ResourceError::Kvm(error.into()))
}

/// The host's ends of a console.
#[derive(Debug, Default)]
pub struct ConsoleEnds {
    /// Where its output goes.
    pub output: Option<File>,
    /// Where its input comes from.
    pub input: Option<File>,
}

impl ConsoleEnds {
    /// Opens what `config` names.
    ///
    /// # Errors
    /// When one could not be opened.
    pub fn open(config: &ConsoleConfig, descriptors: &Descriptors) -> Result<Self, ResourceError> {
        let open = |field, source: &Option<FileSource>, access| {
            source.as_ref().map(|source| descriptors.open(field, source, access)).transpose()
        };
        let output = open("console.output", &config.output, Access::Append)?;
        let input = open("console.input", &config.input, Access::Read)?;
        Ok(Self { output, input })
    }
}

/// Everything that a machine file names.
pub struct Resources {
    /// The kernel image.
    pub kernel: File,
    /// The initial RAM disk.
    pub initramfs: Option<File>,
    /// Where the console goes, and comes from.
    pub console: ConsoleEnds,
    /// The devices, in order.
    pub devices: Vec<OpenDevice>,
}

impl Resources {
    /// Opens everything that `config` names.
    ///
    /// # Errors
    /// The first file that could not be opened, with the field that names it.
    pub fn open(config: &MachineConfig, descriptors: &Descriptors) -> Result<Self, ResourceError> {
        let kernel = descriptors.open("kernel.image", &config.kernel.image, Access::Read)?;
        let initramfs = config.kernel.initramfs.as_ref();
        let initramfs =
            initramfs.map(|source| descriptors.open("kernel.initramfs", source, Access::Read)).transpose()?;
        let console = ConsoleEnds::open(&config.console, descriptors)?;
        let mut devices = Vec::with_capacity(config.devices.len());
        for (index, device) in config.devices.iter().enumerate() {
            devices.push(open_device(&format!("devices[{index}]"), device, descriptors)?);
        }
        Ok(Self { kernel, initramfs, console, devices })
    }
}

/// Opens what a device needs; `field` is where it is configured.
///
/// # Errors
/// The first file that could not be opened.
pub fn open_device(
    field: &str,
    device: &DeviceConfig,
    descriptors: &Descriptors,
) -> Result<OpenDevice, ResourceError> {
    Ok(match device {
        DeviceConfig::Rng(config) => OpenDevice::Rng(*config),
        DeviceConfig::Balloon(config) => OpenDevice::Balloon(*config),
        DeviceConfig::Block(disk) => {
            let access = if disk.options.read_only { Access::Read } else { Access::ReadWrite };
            let open = |(index, source)| {
                descriptors.open(&format!("{field}.block.files[{index}]"), source, access).map(OwnedFd::from)
            };
            let files = disk.files.iter().enumerate().map(open).collect::<Result<_, _>>()?;
            OpenDevice::Block(disk.options.clone(), files)
        }
        DeviceConfig::Net(card) => OpenDevice::Net(
            card.options.clone(),
            open_tap(format!("{field}.net.tap"), &card.tap, descriptors)?,
        ),
        DeviceConfig::Fs(share) => {
            let open = |source| descriptors.open(&format!("{field}.fs.directory"), source, Access::Directory);
            let directory = share.directory.as_ref().map(open).transpose()?;
            OpenDevice::Fs(share.options.clone(), directory.map(OwnedFd::from))
        }
        DeviceConfig::Vsock(device) => {
            OpenDevice::Vsock(device.options, open_vsock(&format!("{field}.vsock"), device, descriptors)?)
        }
    })
}

/// Attaches to a tap device by its name, or takes one that is attached.
fn open_tap(field: String, tap: &FileSource, descriptors: &Descriptors) -> Result<OwnedFd, ResourceError> {
    let FileSource::Path(name) = tap else {
        return Ok(descriptors.open(&field, tap, Access::ReadWrite)?.into());
    };
    Tap::attach(name.as_os_str()).map_err(|source| ResourceError::Open {
        field,
        name: tap.to_string(),
        source,
    })
}

fn open_vsock(
    field: &str,
    device: &VsockDevice,
    descriptors: &Descriptors,
) -> Result<HostEnd, ResourceError> {
    let dialer = device.dialer.as_ref().map(|source| -> Result<Box<dyn Dialer>, ResourceError> {
        let socket = descriptors.open(&format!("{field}.dialer"), source, Access::ReadWrite)?;
        Ok(Box::new(PassingDialer::new(socket.into(), device.dialer_ports.iter().copied())))
    });
    let dialer = dialer.transpose()?;
    let field = format!("{field}.socket");
    Ok(match &device.socket {
        FileSource::Descriptor(_) => {
            let socket = descriptors.open(&field, &device.socket, Access::ReadWrite)?;
            HostEnd { listener: Some(OwnedFd::from(socket).into()), dialer }
        }
        FileSource::Path(path) => {
            let bound = UnixListener::bind(path).map_err(|source| ResourceError::Open {
                field,
                name: path.display().to_string(),
                source,
            });
            let listener = bound?;
            let ours = BoundPath { path: path.clone(), inner: PathDialer::new(path) };
            HostEnd { listener: Some(listener), dialer: Some(dialer.unwrap_or(Box::new(ours))) }
        }
    })
}

/// A socket device's own path: dials beside it, and removes it at the end.
struct BoundPath {
    path: PathBuf,
    inner: PathDialer,
}

impl Dialer for BoundPath {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        self.inner.dial(port)
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        // Someone else may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}
