//! What a template depends on.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{TemplateError, at};
use crate::config;
use crate::sizing::Shape;

/// The version of what is in a template's directory.
const FORMAT: u32 = 1;
/// Anew with each start of the host's kernel. That covers its release, its parameters (mitigations among them), the
/// processor's model and what KVM offers of it; and the clocks of a guest would not survive the host's restart either.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Microcode may be loaded while the host runs, and change what guests have adapted to.
const MICROCODE: &str = "/sys/devices/system/cpu/cpu0/microcode/version";
/// KVM's modules. One that is loaded again, maybe with other parameters, has another inode in sysfs.
const KVM: [&str; 3] = ["/sys/module/kvm", "/sys/module/kvm_amd", "/sys/module/kvm_intel"];
/// Hexadecimal digits of a key's name.
const NAME_LENGTH: usize = 32;

/// Everything that a template was made from. One whose key is not a pod's is of no use to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    format: u32,
    vmm: FileIdentity,
    kernel: FileIdentity,
    initramfs: FileIdentity,
    kernel_parameters: String,
    host: Host,
    shape: Shape,
}

/// A file as it was. One that is replaced or written has another time of change, which nobody can set back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileIdentity {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    changed_ns: i128,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Host {
    boot_id: String,
    microcode: Option<String>,
    kvm: Vec<Option<u64>>,
}

impl Key {
    /// The key of a machine of this shape, made from these programs on this host.
    ///
    /// # Errors
    /// [`TemplateError::Io`] when a program or the host's kernel cannot be looked at.
    pub fn of(programs: &config::Machine, shape: Shape) -> Result<Key, TemplateError> {
        Ok(Key {
            format: FORMAT,
            vmm: FileIdentity::of(&programs.vmm)?,
            kernel: FileIdentity::of(&programs.kernel)?,
            initramfs: FileIdentity::of(&programs.initramfs)?,
            kernel_parameters: programs.kernel_parameters.clone(),
            host: Host::now()?,
            shape,
        })
    }

    /// Whether a template with this key could be made again now, so that it may still be of use.
    pub(super) fn still_fits(&self) -> bool {
        let programs = config::Machine {
            vmm: self.vmm.path.clone(),
            kernel: self.kernel.path.clone(),
            initramfs: self.initramfs.path.clone(),
            kernel_parameters: self.kernel_parameters.clone(),
        };
        Key::of(&programs, self.shape).is_ok_and(|now| now == *self)
    }

    /// The name of the template's directory.
    ///
    /// # Errors
    /// [`TemplateError::Describe`] when a path is not UTF-8.
    pub fn name(&self) -> Result<String, TemplateError> {
        Ok(digest(&serde_json::to_vec(self)?))
    }
}

/// A file name for any bytes.
pub(super) fn digest(bytes: &[u8]) -> String {
    let digits = Sha256::digest(bytes);
    digits.iter().map(|byte| format!("{byte:02x}")).collect::<String>().chars().take(NAME_LENGTH).collect()
}

impl FileIdentity {
    fn of(path: &Path) -> Result<FileIdentity, TemplateError> {
        let metadata = fs::metadata(path).map_err(at("look at", path))?;
        Ok(FileIdentity {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed_ns: i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec()),
        })
    }
}

impl Host {
    fn now() -> Result<Host, TemplateError> {
        let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
        Ok(Host {
            boot_id: read(BOOT_ID).map_err(at("read", BOOT_ID))?,
            microcode: absent_is_none(read(MICROCODE)).map_err(at("read", MICROCODE))?,
            kvm: KVM.iter().map(|path| fs::metadata(path).ok().map(|metadata| metadata.ino())).collect(),
        })
    }
}

fn absent_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sizing::Size;

    const SHAPE: Shape = Shape { boot: Size { vcpus: 1, memory_mib: 256 }, max_vcpus: 4, hotplug_mib: 1024 };

    fn programs(directory: &Path) -> config::Machine {
        let file = |name: &str| {
            let path = directory.join(name);
            fs::write(&path, name).unwrap();
            path
        };
        config::Machine {
            vmm: file("vmm"),
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            kernel_parameters: String::new(),
        }
    }

    #[test]
    fn template_keys_are_alike_only_for_the_same_machine_from_the_same_files() {
        let directory = tempfile::tempdir().unwrap();
        let programs = programs(directory.path());
        let key = Key::of(&programs, SHAPE).unwrap();
        assert_eq!(Key::of(&programs, SHAPE).unwrap(), key);
        assert!(key.still_fits());
        let larger = Shape { max_vcpus: 5, ..SHAPE };
        assert_ne!(Key::of(&programs, larger).unwrap().name().unwrap(), key.name().unwrap());
        let debugged = config::Machine { kernel_parameters: "debug".into(), ..programs.clone() };
        assert_ne!(Key::of(&debugged, SHAPE).unwrap().name().unwrap(), key.name().unwrap());
        // The same content, by a file that was put in its place.
        let replacement = directory.path().join("new");
        fs::write(&replacement, "kernel").unwrap();
        fs::rename(replacement, &programs.kernel).unwrap();
        assert_ne!(Key::of(&programs, SHAPE).unwrap(), key);
        assert!(!key.still_fits());
    }

    #[test]
    fn template_keys_survive_being_written_down() {
        let directory = tempfile::tempdir().unwrap();
        let key = Key::of(&programs(directory.path()), SHAPE).unwrap();
        let written = serde_json::to_vec(&key).unwrap();
        assert_eq!(serde_json::from_slice::<Key>(&written).unwrap(), key);
        assert_eq!(key.name().unwrap().len(), NAME_LENGTH);
    }
}
