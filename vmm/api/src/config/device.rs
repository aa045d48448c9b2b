use serde::{Deserialize, Serialize};

use super::FileSource;
use crate::devices::{BalloonConfig, BlockConfig, FsConfig, NetConfig, RngConfig, VsockConfig};

/// A device in the machine file, or to be plugged.
///
/// The devices of a machine file fill its slots in order:
///
/// ```toml
/// [[devices]]
/// rng = {}
///
/// [[devices]]
/// block.files = ["/srv/root.erofs"]
/// block.options.read_only = true
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum DeviceConfig {
    /// Entropy source.
    Rng(RngConfig),
    /// Memory balloon.
    Balloon(BalloonConfig),
    /// Disk.
    Block(BlockDevice),
    /// Network card.
    Net(NetDevice),
    /// Socket device.
    Vsock(VsockDevice),
    /// Shared directory.
    Fs(FsDevice),
}

impl DeviceConfig {
    /// Whether the device is something of the host: a restored machine has to be given it anew.
    #[must_use]
    pub fn needs_host(&self) -> bool {
        match self {
            Self::Rng(_) | Self::Balloon(_) => false,
            Self::Block(_) | Self::Net(_) | Self::Vsock(_) | Self::Fs(_) => true,
        }
    }
}

/// A disk and its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDevice {
    /// The file or block device; several make a read-only disk that shows them one after the other.
    pub files: Vec<FileSource>,
    /// The disk itself.
    #[serde(default)]
    pub options: BlockConfig,
}

/// A network card and its tap device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetDevice {
    /// The tap device: the name of one that is there, or a descriptor (`fd:N`) that was attached with
    /// TUNSETIFF (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`). A process in a jail takes descriptors alone.
    pub tap: FileSource,
    /// The card itself.
    pub options: NetConfig,
}

/// A shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsDevice {
    /// The directory. In a jail it must be left out: the jail's own share is served, and no other can be
    /// reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<FileSource>,
    /// How it is shared.
    pub options: FsConfig,
}

/// A socket device and its host's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockDevice {
    /// Where the host's clients connect to reach the guest: a path, at which a socket is made, or a socket
    /// that listens.
    pub socket: FileSource,
    /// Who serves the guest's connections to the host: a unix socket over which the other process is sent one
    /// end of each. Without, and with `socket` a path, the guest's connection to port N goes to the socket
    /// `<path>_N`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialer: Option<FileSource>,
    /// The ports that whoever is at the other end of `dialer` serves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dialer_ports: Vec<u32>,
    /// The device itself.
    pub options: VsockConfig,
}
