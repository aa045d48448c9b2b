//! Whose files are made, and with which privileges.
//!
//! What a guest makes belongs to whoever in the guest made it. The calling thread takes on that id for file systems
//! alone, so that owner, inherited group and quota come out as the host's kernel has them in one step, with no
//! moment at which a file is another's. Whether the caller may do so was decided by the guest's kernel, which knows
//! all groups of its processes; this side is not asked twice and keeps CAP_DAC_OVERRIDE. Ids that the host does not
//! let this process take on end in EPERM.

use std::io;

use caps::{CapSet, Capability};

use super::sys;

/// The calling thread acts as another user until this is dropped.
pub(super) struct AsCaller {
    /// To go back to.
    own: Option<(u32, u32)>,
}

impl AsCaller {
    pub(super) fn new(uid: u32, gid: u32, umask: u32) -> io::Result<Self> {
        let own = sys::own_ids();
        sys::umask(umask);
        if own == (uid, gid) {
            return Ok(Self { own: None });
        }
        // From here on dropping goes back.
        let caller = Self { own: Some(own) };
        if sys::set_fs_ids(uid, gid) != (i64::from(uid), i64::from(gid)) {
            return Err(sys::errno(libc::EPERM));
        }
        if own.0 == 0 {
            // Leaving root dropped these (capabilities(7)); where they were never held the kernel decides alone.
            for capability in [Capability::CAP_DAC_OVERRIDE, Capability::CAP_FSETID] {
                let _ = caps::raise(None, CapSet::Effective, capability);
            }
        }
        Ok(caller)
    }
}

impl Drop for AsCaller {
    fn drop(&mut self) {
        sys::umask(0);
        if let Some((uid, gid)) = self.own {
            sys::set_fs_ids(uid, gid);
        }
    }
}

/// Until this is dropped, what the calling thread writes to loses its set-user-id and set-group-id bits, as with
/// any writer that has no privilege.
pub(super) struct Unprivileged {
    raise: bool,
}

impl Unprivileged {
    /// Only if `wanted`.
    pub(super) fn new(wanted: bool) -> Self {
        let held = || caps::has_cap(None, CapSet::Effective, Capability::CAP_FSETID).unwrap_or(false);
        let raise = wanted && held() && caps::drop(None, CapSet::Effective, Capability::CAP_FSETID).is_ok();
        Self { raise }
    }
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        if self.raise {
            // It was held, so it is permitted.
            let _ = caps::raise(None, CapSet::Effective, Capability::CAP_FSETID);
        }
    }
}
