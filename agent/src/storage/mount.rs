//! One mount(2) for each kind of storage.

use std::io;
use std::path::Path;

use caisson_protocol::v1::{BlockDevice, Overlay, Storage, Tmpfs, VirtioFs, storage::Source};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};

use super::{StorageError, check_id, device};
use crate::namespace::aside;

/// The kernel copies a page of mount data.
const MAX_DATA: usize = 4095;
const FILE_SYSTEMS: [&str; 4] = ["ext4", "erofs", "xfs", "squashfs"];

struct Call {
    device: String,
    kind: String,
    flags: MsFlags,
    data: String,
}

/// Mounts `storage` on its directory, which is `directory`/id.
pub(super) fn mount(directory: &Path, storage: &Storage, source: &Source) -> Result<(), StorageError> {
    let mut call = match source {
        Source::VirtioFs(share) => virtio_fs(share)?,
        Source::Block(block) => block_device(block)?,
        Source::Tmpfs(tmpfs) => memory(tmpfs)?,
        Source::Overlay(parts) => overlay(directory, storage, parts)?,
        // It is no file system of its own.
        Source::Part(_) => return Err(StorageError::invalid("source", &storage.id)),
    };
    call.flags |= flags(&storage.options)?;
    if storage.read_only {
        call.flags |= MsFlags::MS_RDONLY;
    }
    if call.data.len() > MAX_DATA {
        return Err(StorageError::invalid("lowers", "more than one page of paths"));
    }
    // Relative paths keep an overlay of many layers within a page; the working directory is the thread's own.
    aside(|| {
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(directory)?;
        let (device, kind, data) = (call.device.as_str(), call.kind.as_str(), call.data.as_str());
        nix::mount::mount(Some(device), storage.id.as_str(), Some(kind), call.flags, Some(data))?;
        Ok(())
    })
    .map_err(StorageError::io("mount", &storage.id))
}

fn virtio_fs(share: &VirtioFs) -> Result<Call, StorageError> {
    // 36 bytes: virtio 1.3, section 5.11.4.
    if share.tag.is_empty() || share.tag.len() > 36 || share.tag.bytes().any(|byte| byte == 0) {
        return Err(StorageError::invalid("tag", &share.tag));
    }
    let data = if share.dax { "dax" } else { "" };
    Ok(call(&share.tag, "virtiofs", data.to_owned()))
}

fn block_device(block: &BlockDevice) -> Result<Call, StorageError> {
    if !FILE_SYSTEMS.contains(&block.fs_type.as_str()) {
        return Err(StorageError::invalid("fs_type", &block.fs_type));
    }
    if block.data.bytes().any(|byte| byte == 0) {
        return Err(StorageError::invalid("data", &block.data));
    }
    Ok(call(&device::node(block)?.to_string_lossy(), &block.fs_type, block.data.clone()))
}

fn memory(tmpfs: &Tmpfs) -> Result<Call, StorageError> {
    if tmpfs.mode > 0o7777 {
        return Err(StorageError::invalid("mode", format!("{:o}", tmpfs.mode)));
    }
    let mode = if tmpfs.mode == 0 { 0o755 } else { tmpfs.mode };
    let mut data = format!("mode={mode:o},uid={},gid={}", tmpfs.uid, tmpfs.gid);
    if tmpfs.size != 0 {
        data.push_str(&format!(",size={}", tmpfs.size));
    }
    if tmpfs.inodes != 0 {
        data.push_str(&format!(",nr_inodes={}", tmpfs.inodes));
    }
    Ok(call("tmpfs", "tmpfs", data))
}

fn overlay(directory: &Path, storage: &Storage, parts: &Overlay) -> Result<Call, StorageError> {
    if parts.lowers.is_empty() {
        return Err(StorageError::invalid("lowers", ""));
    }
    parts.lowers.iter().try_for_each(|lower| check_id(lower))?;
    // A read-only overlay of one layer needs a second one: it names an empty directory.
    let mut data = format!("lowerdir={}", parts.lowers.join(":"));
    if parts.upper.is_empty() {
        if parts.lowers.len() == 1 {
            std::fs::create_dir_all(directory.join(".empty"))
                .map_err(StorageError::io("make the empty layer of", &storage.id))?;
            data.push_str(":.empty");
        }
    } else {
        check_id(&parts.upper)?;
        // Several overlays may share one upper storage.
        let (upper, work) =
            (format!("{}/{}.upper", parts.upper, storage.id), format!("{}/{}.work", parts.upper, storage.id));
        for part in [&upper, &work] {
            let made = std::fs::create_dir(directory.join(part));
            match made {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(StorageError::io("make the upper layer of", &storage.id)(error));
                }
                _ => {}
            }
        }
        data.push_str(&format!(",upperdir={upper},workdir={work}"));
    }
    Ok(call("overlay", "overlay", data))
}

fn call(device: &str, kind: &str, data: String) -> Call {
    Call { device: device.to_owned(), kind: kind.to_owned(), flags: MsFlags::empty(), data }
}

fn flags(options: &[String]) -> Result<MsFlags, StorageError> {
    options.iter().try_fold(MsFlags::empty(), |flags, option| {
        Ok(flags
            | match option.as_str() {
                "nosuid" => MsFlags::MS_NOSUID,
                "nodev" => MsFlags::MS_NODEV,
                "noexec" => MsFlags::MS_NOEXEC,
                "noatime" => MsFlags::MS_NOATIME,
                "nodiratime" => MsFlags::MS_NODIRATIME,
                "relatime" => MsFlags::MS_RELATIME,
                "sync" => MsFlags::MS_SYNCHRONOUS,
                "dirsync" => MsFlags::MS_DIRSYNC,
                _ => return Err(StorageError::invalid("options", option)),
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmpfs_data() {
        let tmpfs = Tmpfs { size: 4096, inodes: 10, mode: 0o1777, uid: 1, gid: 2 };
        assert_eq!(memory(&tmpfs).unwrap().data, "mode=1777,uid=1,gid=2,size=4096,nr_inodes=10");
        assert!(memory(&Tmpfs { mode: 0o10000, ..Tmpfs::default() }).is_err());
    }

    #[test]
    fn an_overlay_can_not_name_a_path() {
        let storage = Storage { id: "root".into(), ..Storage::default() };
        for bad in ["../x", "a/b", "a:b", "a,upperdir=/etc", ""] {
            let parts = Overlay { lowers: vec![bad.into()], upper: String::new() };
            assert!(overlay(Path::new("/nowhere"), &storage, &parts).is_err(), "{bad}");
        }
    }

    #[test]
    fn unknown_options_are_errors() {
        assert!(flags(&["nosuid".into(), "nodev".into()]).is_ok());
        assert!(flags(&["suid".into()]).is_err());
    }
}
