//! Changing attributes, and extended attributes.

use std::{ffi::CStr, fs::File, io};

use fuse_backend_rs::api::filesystem::SetattrValid;
use libc::stat64;

use super::{
    Passthrough,
    credentials::Unprivileged,
    sys,
    table::{Handle, Inode},
};

/// The longest value, and the longest list of names, that Linux knows (XATTR_SIZE_MAX).
pub(super) const MAX_XATTR: usize = 64 << 10;

/// The extended attributes that a guest sees and may set. Others would be taken for the host's own (`trusted`, and
/// the labels of its security modules).
pub(super) fn visible(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.starts_with(b"user.")
        || [&b"system.posix_acl_access"[..], b"system.posix_acl_default", b"security.capability"]
            .contains(&name)
}

/// The names of a list that are [`visible`].
pub(super) fn visible_names(names: &[u8]) -> Vec<u8> {
    let names = names.split_inclusive(|byte| *byte == 0);
    let visible = |name: &&[u8]| CStr::from_bytes_with_nul(name).is_ok_and(visible);
    names.filter(visible).flatten().copied().collect()
}

/// The part of `mode` that chmod sets.
const PERMISSIONS: u32 = 0o7777;

impl Passthrough {
    /// Does what `valid` names, in the order in which one step does not undo another's.
    pub(super) fn change(
        &self,
        inode: &Inode,
        handle: Option<&Handle>,
        attr: &stat64,
        valid: SetattrValid,
    ) -> io::Result<()> {
        let _unprivileged = Unprivileged::new(valid.contains(SetattrValid::KILL_SUIDGID));
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let wanted = |flag, id| if valid.contains(flag) { id } else { u32::MAX };
            let (uid, gid) = (wanted(SetattrValid::UID, attr.st_uid), wanted(SetattrValid::GID, attr.st_gid));
            sys::chown(inode.fd(), uid, gid)?;
        }
        if valid.contains(SetattrValid::MODE) {
            sys::chmod(self.descriptors(), inode.fd(), attr.st_mode & PERMISSIONS)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let len = u64::try_from(attr.st_size).map_err(|_| sys::errno(libc::EFBIG))?;
            match handle {
                Some(handle) => sys::truncate(&handle.file, len)?,
                None => sys::truncate(&File::from(self.open_file(inode, libc::O_WRONLY)?), len)?,
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let access = time(
                valid.contains(SetattrValid::ATIME),
                valid.contains(SetattrValid::ATIME_NOW),
                (attr.st_atime, attr.st_atime_nsec),
            );
            let change = time(
                valid.contains(SetattrValid::MTIME),
                valid.contains(SetattrValid::MTIME_NOW),
                (attr.st_mtime, attr.st_mtime_nsec),
            );
            sys::utimens(self.descriptors(), inode.fd(), &[access, change])?;
        }
        Ok(())
    }
}

fn time(set: bool, now: bool, to: (i64, i64)) -> libc::timespec {
    let (tv_sec, tv_nsec) = to;
    match (set, now) {
        (false, _) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        (true, true) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        (true, false) => libc::timespec { tv_sec, tv_nsec },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_attributes_are_listed() {
        let all = b"user.a\0trusted.overlay.opaque\0security.selinux\0security.capability\0system.posix_acl_access\0";
        assert_eq!(visible_names(all), b"user.a\0security.capability\0system.posix_acl_access\0");
        assert_eq!(visible_names(b"user.unterminated"), b"");
    }
}
