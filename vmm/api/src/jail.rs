//! The description of the jail that a VMM enters before it runs a guest.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Where a jailed VMM sees the directory that it serves to the guest.
pub const SHARE: &str = "/share";
/// Where it sees the directory with the unix sockets that it may connect to.
pub const SOCKETS: &str = "/sockets";

/// What happens to a call that is not in the filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompMode {
    /// The process ends with SIGSYS.
    #[default]
    Kill,
    /// It passes, and is logged by the kernel. For finding out what is missing, never for running a guest
    /// that is not trusted.
    Log,
}

/// What the jail is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JailConfig {
    /// The host user id to run as, the first of [`id_count`](Self::id_count). Must be nobody else's. Only
    /// with root's privileges; by default one made from the process id, which is unique among running VMMs.
    pub uid: Option<u32>,
    /// The host group id to run as, likewise.
    pub gid: Option<u32>,
    /// How many host ids from `uid` and `gid` on exist inside, counted from 0: as many as the owners of files
    /// in the share need. Only with root's privileges.
    pub id_count: u32,
    /// Take a user namespace. Without one the owners of files in the share are the host's; to be used for a
    /// share that cannot be id-mapped, and only with root's privileges, as all others need it.
    pub user_namespace: bool,
    /// A directory that is served to the guest. It appears as [`SHARE`]; what is mounted into it later on the
    /// host appears as well, provided that it is on a mount with shared propagation.
    pub share: Option<PathBuf>,
    /// A directory with unix sockets to connect to. It appears as [`SOCKETS`].
    pub sockets: Option<PathBuf>,
    /// The directory of a cgroup to join.
    pub cgroup: Option<PathBuf>,
    /// The most descriptors that may be open at once; by default 4,096. With a share, of which every file
    /// that the guest's kernel remembers takes one, it is a sixteenth of what the host can have open
    /// (`fs.file-max`), but not less than 20,480 and not more than 1,048,576. Never more than the limit the
    /// process came with.
    pub max_open_files: Option<u64>,
    /// The longest file that may be written, in bytes. Disks, snapshots and logs are files. Writing more is an
    /// error like that of a full disk.
    pub max_file_size: Option<u64>,
    /// What happens to a system call that a thread has no business making.
    pub seccomp: SeccompMode,
}

impl Default for JailConfig {
    fn default() -> Self {
        Self {
            uid: None,
            gid: None,
            id_count: 1,
            user_namespace: true,
            share: None,
            sockets: None,
            cgroup: None,
            max_open_files: None,
            max_file_size: None,
            seccomp: SeccompMode::Kill,
        }
    }
}

impl JailConfig {
    /// Reads a jail's description, in TOML.
    ///
    /// # Errors
    /// When the file cannot be read, or says something that a jail does not know.
    pub fn from_file(path: &Path) -> Result<Self, JailFileError> {
        let error = |source| JailFileError { path: path.into(), source };
        let text = fs::read_to_string(path).map_err(error)?;
        toml::from_str(&text).map_err(|source| error(io::Error::new(io::ErrorKind::InvalidData, source)))
    }
}

/// A jail's description could not be read, or says something that a jail does not know.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub struct JailFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub source: io::Error,
}
