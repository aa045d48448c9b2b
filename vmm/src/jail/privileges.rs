//! Identity, capabilities, limits, and the second wall.

use std::io;

use caisson_vmm_api::jail::{JailConfig, SHARE};
use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::{
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigHandler, Signal, signal},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

use super::{JailError, step};

/// What serving files with their owners takes, and no more: no mounts, no device nodes, no other namespace.
/// (A file's capabilities that are set from a user namespace mean nothing outside of it.)
pub(super) const SHARE_CAPABILITIES: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETFCAP,
];

/// The most processes and threads of a VM's user: its vCPUs, and a few for devices.
const MAX_THREADS: u64 = 512;

/// What may be locked in memory: io_uring's rings, on kernels that charge them there.
const MAX_LOCKED: u64 = 16 << 20;

/// `SECBIT_NOROOT` and its lock (capabilities(7)): being user 0 of a namespace brings no capability on
/// execve.
const SECBITS: libc::c_ulong = 0b11;

/// How much of the Landlock rules is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LandlockStatus {
    /// All of them.
    Full,
    /// Those that this kernel knows.
    Partial,
    /// None: the kernel has no Landlock, or it is turned off.
    None,
}

/// Sets the limits of the process. With a user of its own that includes the number of its threads.
///
/// Whoever would make a file too long gets an error (EFBIG): a guest that fills a disk, and a console that
/// writes to a file, are no reason for the machine to end by a signal.
pub(super) fn limit_resources(
    config: &JailConfig,
    max_open_files: u64,
    own_user: bool,
) -> Result<(), JailError> {
    // SAFETY: the signal is ignored, so no code runs as its handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.map_err(step("ignoring SIGXFSZ"))?;
    let mut limits = vec![
        (Resource::RLIMIT_NOFILE, max_open_files),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, MAX_LOCKED),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_NICE, 0),
        (Resource::RLIMIT_RTPRIO, 0),
    ];
    if own_user {
        limits.push((Resource::RLIMIT_NPROC, MAX_THREADS));
    }
    if let Some(max) = config.max_file_size {
        limits.push((Resource::RLIMIT_FSIZE, max));
    }
    for (resource, limit) in limits {
        let doing = step("limiting resources");
        let lower = getrlimit(resource).and_then(|(_, hard)| {
            let limit = limit.min(hard);
            setrlimit(resource, limit, limit)
        });
        lower.map_err(doing)?;
    }
    Ok(())
}

/// How many descriptors there may be, see [`JailConfig::max_open_files`]. To be asked while there is a
/// `/proc`.
pub(super) fn max_open_files(config: &JailConfig) -> u64 {
    let default = || {
        if config.share.is_none() {
            return 4096;
        }
        // One guest must not be able to take all that the host has.
        let host = std::fs::read_to_string("/proc/sys/fs/file-max").ok();
        let host = host.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
        (host / 16).clamp(20_480, 1 << 20)
    };
    config.max_open_files.unwrap_or_else(default)
}

/// Gives up other groups, the user, capabilities, and the ways to regain any of them.
///
/// The capabilities in `keep` stay *permitted*, so that a thread can make them effective for itself.
pub(super) fn drop_all(ids: Option<(Uid, Gid)>, keep: &[Capability]) -> Result<(), JailError> {
    let capabilities = JailError::Capabilities;
    caps::clear(None, CapSet::Ambient).map_err(capabilities)?;
    caps::clear(None, CapSet::Bounding).map_err(capabilities)?;
    set_secbits()?;
    if let Some((uid, gid)) = ids {
        // A change of user would clear the permitted set.
        prctl::set_keepcaps(!keep.is_empty()).map_err(step("keeping capabilities"))?;
        setgroups(&[]).map_err(step("leaving groups"))?;
        setresgid(gid, gid, gid).map_err(step("changing the group"))?;
        setresuid(uid, uid, uid).map_err(step("changing the user"))?;
        prctl::set_keepcaps(false).map_err(step("keeping capabilities"))?;
    }
    prctl::set_no_new_privs().map_err(step("renouncing new privileges"))?;
    prctl::set_dumpable(false).map_err(step("forbidding dumps"))?;

    caps::clear(None, CapSet::Inheritable).map_err(capabilities)?;
    caps::clear(None, CapSet::Effective).map_err(capabilities)?;
    let permitted: CapsHashSet = keep.iter().copied().collect();
    caps::set(None, CapSet::Permitted, &permitted).map_err(capabilities)
}

/// Makes the capabilities for serving the share effective in the calling thread, and in those that it starts.
///
/// # Errors
/// When the jail was made without a share, or the thread has dropped them.
pub fn raise_share_capabilities() -> Result<(), JailError> {
    let set = SHARE_CAPABILITIES.into_iter().collect();
    caps::set(None, CapSet::Effective, &set).map_err(JailError::Capabilities)
}

/// Gives up, in the calling thread and those that it starts, what [`raise_share_capabilities`] needs. To be
/// called by every thread that does not serve the share before it runs anything that a guest has a hand in.
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn drop_thread_capabilities() -> Result<(), JailError> {
    caps::clear(None, CapSet::Effective).map_err(JailError::Capabilities)?;
    caps::clear(None, CapSet::Permitted).map_err(JailError::Capabilities)
}

fn set_secbits() -> Result<(), JailError> {
    // SAFETY: PR_SET_SECUREBITS takes a number.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBITS, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(step("setting secure bits")(io::Error::last_os_error())) }
}

/// Landlock: no file can be reached by its path, except for those of the share; no TCP; no abstract sockets
/// and no signals to processes outside.
pub(super) fn confine_paths(share: bool) -> Result<LandlockStatus, JailError> {
    landlock_rules(share).map_err(|error| JailError::Landlock(error.into()))
}

fn landlock_rules(share: bool) -> Result<LandlockStatus, landlock::RulesetError> {
    let abi = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    let ruleset = match PathFd::new(SHARE) {
        Ok(directory) if share => {
            // Character devices take CAP_MKNOD, but for an overlay's mark for a deleted file, which is none.
            let refused: BitFlags<AccessFs> = AccessFs::Execute | AccessFs::MakeBlock;
            ruleset.add_rule(PathBeneath::new(directory, AccessFs::from_all(abi) & !refused))?
        }
        _ => ruleset,
    };
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => LandlockStatus::Full,
        RulesetStatus::PartiallyEnforced => LandlockStatus::Partial,
        RulesetStatus::NotEnforced => LandlockStatus::None,
    })
}
