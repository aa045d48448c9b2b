//! Who a program runs as and what it inherits, and its execution.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::personality::Persona;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};
use rustix::thread::CapabilitySet;

use crate::container::seccomp::{self, Filter};
use crate::container::{Error, sys};
use crate::oci::Linux;
use crate::oci::process::{Capabilities, Process};

/// By number, capabilities(7).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapabilitySets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl CapabilitySets {
    /// Reads the sets. Names that do not exist are warned of, as the specification demands: what can not be granted is
    /// no reason to fail. An ambient one must be permitted and inheritable.
    pub(crate) fn parse(capabilities: Option<&Capabilities>) -> Result<CapabilitySets, Error> {
        let Some(capabilities) = capabilities else { return Ok(CapabilitySets::default()) };
        let set = |field: &str, names: &[String]| {
            names.iter().fold(0_u64, |set, name| {
                let bare = name.strip_prefix("CAP_").unwrap_or_default();
                match CAPABILITIES.iter().position(|known| *known == bare) {
                    Some(number) => set | 1 << number,
                    None => {
                        tracing::warn!(field, name, "there is no such capability");
                        set
                    }
                }
            })
        };
        let sets = CapabilitySets {
            bounding: set("bounding", &capabilities.bounding),
            effective: set("effective", &capabilities.effective),
            inheritable: set("inheritable", &capabilities.inheritable),
            permitted: set("permitted", &capabilities.permitted),
            ambient: set("ambient", &capabilities.ambient),
        };
        if sets.effective & !sets.permitted != 0 {
            return Err(Error::invalid("process.capabilities.effective", "has more than is permitted"));
        }
        if sets.ambient & !(sets.permitted & sets.inheritable) != 0 {
            return Err(Error::invalid(
                "process.capabilities.ambient",
                "has more than is permitted and inheritable",
            ));
        }
        Ok(sets)
    }
}

/// The argument of personality(2), if it is to be called.
pub(crate) fn personality(linux: &Linux) -> Result<Option<libc::c_ulong>, Error> {
    let Some(personality) = &linux.personality else { return Ok(None) };
    if let Some(flag) = personality.flags.first() {
        return Err(Error::unsupported("linux.personality.flags", format!("unknown flag {flag:?}")));
    }
    match personality.domain.as_str() {
        "LINUX" => Ok(Some(0)),
        "LINUX32" => Ok(Some(8)),
        other => Err(Error::invalid("linux.personality.domain", format!("there is no {other:?}"))),
    }
}

/// Everything of a program's start that comes after its surroundings are made.
pub(super) struct Identity<'a> {
    process: &'a Process,
    capabilities: CapabilitySets,
    personality: Option<libc::c_ulong>,
    filter: Option<&'a Filter>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl<'a> Identity<'a> {
    pub(super) fn new(
        process: &'a Process,
        personality: Option<libc::c_ulong>,
        filter: Option<&'a Filter>,
    ) -> Result<Identity<'a>, Error> {
        let strings = |field: &str, list: &[String]| {
            let strings: Result<_, _> = list.iter().map(|text| CString::new(text.as_str())).collect();
            strings.map_err(|_| Error::invalid(format!("process.{field}"), "has a null byte"))
        };
        let mut env: Vec<CString> = strings("env", &process.env)?;
        // An empty one is none.
        env.retain(|entry| entry.as_bytes() != b"HOME=");
        if !env.iter().any(|entry| entry.as_bytes().starts_with(b"HOME=")) {
            let home = CString::new(format!("HOME={}", home(process.user.uid)));
            env.extend(home.ok());
        }
        Ok(Identity {
            process,
            capabilities: CapabilitySets::parse(process.capabilities.as_ref())?,
            personality,
            filter,
            args: strings("args", &process.args)?,
            env,
        })
    }

    /// Finds out before the start whether there is a program at all.
    pub(super) fn check_program(&self) -> Result<(), Error> {
        let (cwd, mut refused) = (&self.process.cwd, libc::ENOENT);
        for candidate in self.candidates() {
            match std::fs::metadata(cwd.join(candidate)) {
                Ok(found) if found.is_file() => return Ok(()),
                // What execve(2) would say. A directory that PATH has by this name is passed over.
                Ok(_) if self.is_path() => refused = libc::EACCES,
                _ => {}
            }
        }
        Err(self.not_executed(io::Error::from_raw_os_error(refused)))
    }

    /// Whether the program is given by its path, and not by a name to be looked for.
    fn is_path(&self) -> bool {
        self.process.args.first().is_some_and(|program| program.contains('/'))
    }

    fn not_executed(&self, source: io::Error) -> Error {
        // An error of this kind travels as its number.
        let source = match source.raw_os_error() {
            Some(_) => source,
            None => io::Error::from_raw_os_error(libc::ENOENT),
        };
        Error::Exec { program: self.process.args.first().cloned().unwrap_or_default(), source }
    }

    /// Paths of the program from the working directory, by PATH if it has no slash.
    fn candidates(&self) -> Vec<PathBuf> {
        let program = self.process.args.first().map(String::as_str).unwrap_or_default();
        if self.is_path() {
            return vec![program.into()];
        }
        let path = self.process.env.iter().rev().find_map(|entry| entry.strip_prefix("PATH="));
        let path = path.unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        path.split(':').map(|directory| Path::new(directory).join(program)).collect()
    }

    /// Takes on all that the program inherits.
    pub(super) fn assume(&self) -> Result<(), Error> {
        let user = &self.process.user;
        let field = |name: &'static str, action: &'static str| {
            move |errno: nix::errno::Errno| Error::apply(name, action)(errno.into())
        };
        nix::sys::stat::umask(Mode::from_bits_truncate(user.umask.unwrap_or(0o022)));
        // Rust's runtime ignores it, and what is ignored stays so for the program.
        // SAFETY: the default action runs no code of this process.
        unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }
            .map_err(|errno| Error::system("set the default action of SIGPIPE")(errno.into()))?;
        if let Some(persona) = self.personality {
            let domain = libc::c_int::try_from(persona)
                .map_err(|_| Error::invalid("linux.personality", "is unknown"))?;
            nix::sys::personality::set(Persona::from_bits_retain(domain))
                .map_err(field("linux.personality", "set the execution domain"))?;
        }
        self.bound_capabilities()?;
        self.guard_vsock()?;
        nix::sys::prctl::set_keepcaps(true)
            .map_err(|errno| Error::system("keep capabilities")(errno.into()))?;
        let groups: Vec<_> = user.additional_gids.iter().copied().map(Gid::from_raw).collect();
        // A single group id in a user namespace may come with setgroups denied; then there is nothing to set.
        match nix::unistd::setgroups(&groups) {
            Err(nix::errno::Errno::EPERM) if groups.is_empty() => {}
            other => other.map_err(field("process.user.additionalGids", "set the groups"))?,
        }
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        nix::unistd::setresgid(gid, gid, gid).map_err(field("process.user.gid", "set the group"))?;
        nix::unistd::setresuid(uid, uid, uid).map_err(field("process.user.uid", "set the user"))?;
        // The change of the user took the effective ones. They are wanted once more.
        self.enter_directory()?;
        if self.process.no_new_privileges {
            self.reduce_capabilities()?;
            nix::sys::prctl::set_no_new_privs()
                .map_err(field("process.noNewPrivileges", "set no_new_privs"))?;
            self.filter_calls()
        } else {
            // Takes CAP_SYS_ADMIN.
            let all = sys::permitted().map_err(Error::system("read capabilities"))?;
            sys::capset(all, all, self.capabilities.inheritable & all)
                .map_err(Error::apply("process.capabilities", "raise capabilities"))?;
            self.filter_calls()?;
            self.reduce_capabilities()
        }
    }

    fn bound_capabilities(&self) -> Result<(), Error> {
        for number in 0..64_u64 {
            // An error is the end of what this kernel knows.
            let capability = CapabilitySet::from_bits_retain(1 << number);
            let Ok(present) = rustix::thread::capability_is_in_bounding_set(capability) else { break };
            if present && self.capabilities.bounding & capability.bits() == 0 {
                rustix::thread::remove_capability_from_bounding_set(capability).map_err(|errno| {
                    Error::apply("process.capabilities.bounding", "drop a capability")(errno.into())
                })?;
            }
        }
        Ok(())
    }

    fn reduce_capabilities(&self) -> Result<(), Error> {
        let sets = &self.capabilities;
        let failed = || Error::apply("process.capabilities", "set the capabilities");
        sys::capset(sets.effective, sets.permitted, sets.inheritable).map_err(failed())?;
        rustix::thread::clear_ambient_capability_set().map_err(|errno| failed()(errno.into()))?;
        for number in (0..64_u64).filter(|number| sets.ambient & (1 << number) != 0) {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            rustix::thread::configure_capability_in_ambient_set(capability, true)
                .map_err(|errno| failed()(errno.into()))?;
        }
        Ok(())
    }

    fn guard_vsock(&self) -> Result<(), Error> {
        let guard = seccomp::vsock_guard();
        sys::seccomp(&guard.instructions(), guard.flags).map_err(Error::system("install the socket filter"))
    }

    fn filter_calls(&self) -> Result<(), Error> {
        let Some(filter) = self.filter else { return Ok(()) };
        sys::seccomp(&filter.instructions(), filter.flags)
            .map_err(Error::apply("linux.seccomp", "install the filter"))
    }

    /// Changes to the working directory as the user, and makes sure that it is in the container.
    fn enter_directory(&self) -> Result<(), Error> {
        let failed = || Error::apply("process.cwd", "change to the directory");
        let cwd = &self.process.cwd;
        if nix::unistd::chdir(cwd).is_err() {
            // The user may not be let in by root, whose capabilities it may be meant to have.
            let all = sys::permitted().map_err(failed())?;
            sys::capset(all, all, 0).map_err(failed())?;
            nix::unistd::chdir(cwd).map_err(|errno| failed()(errno.into()))?;
        }
        // The kernel says "(unreachable)" before what is outside this root.
        let path = nix::unistd::getcwd().map_err(|errno| failed()(errno.into()))?;
        if path.is_absolute() {
            return Ok(());
        }
        Err(Error::invalid("process.cwd", "is outside of the container"))
    }

    /// Becomes the program; returns only why not.
    pub(super) fn execute(&self) -> Error {
        let mut refused = None;
        for candidate in self.candidates() {
            let Ok(path) = super::root::c_path(&candidate) else { continue };
            match nix::unistd::execve(&path, &self.args, &self.env) {
                Ok(never) => match never {},
                Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => {}
                // Another directory of PATH may have one that may be executed.
                Err(nix::errno::Errno::EACCES) => refused = Some(libc::EACCES),
                Err(errno) => return self.not_executed(errno.into()),
            }
        }
        self.not_executed(io::Error::from_raw_os_error(refused.unwrap_or(libc::ENOENT)))
    }
}

/// The user's home by the container's own `/etc/passwd`, or the root.
fn home(uid: u32) -> String {
    use std::io::Read;
    let mut text = String::new();
    // The file is the container's: however big it is, this much is looked at.
    // So may be a FIFO in its place, which nobody writes to.
    let options = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    if let Ok(file) = nix::fcntl::open("/etc/passwd", options, Mode::empty()).map(std::fs::File::from)
        && file.metadata().is_ok_and(|meta| meta.is_file())
    {
        let _ = file.take(1 << 20).read_to_string(&mut text);
    }
    let entry = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let home = entry
        .filter(|e| e.get(2).and_then(|id| id.parse().ok()) == Some(uid))
        .find_map(|e| e.get(5).copied());
    home.filter(|home| !home.is_empty()).unwrap_or("/").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_bits() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let capabilities = Capabilities {
            bounding: names(&["CAP_CHOWN", "CAP_OF_TOMORROW", "KILL", "CAP_CHECKPOINT_RESTORE"]),
            permitted: names(&["CAP_KILL"]),
            effective: names(&["CAP_KILL"]),
            ..Capabilities::default()
        };
        let sets = CapabilitySets::parse(Some(&capabilities)).unwrap();
        assert_eq!((sets.bounding, sets.permitted), (1 | 1 << 40, 1 << 5));
        assert_eq!(CapabilitySets::parse(None).unwrap(), CapabilitySets::default());
    }

    #[test]
    fn impossible_sets_are_refused() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let effective = Capabilities { effective: names(&["CAP_KILL"]), ..Capabilities::default() };
        let ambient = Capabilities {
            ambient: names(&["CAP_KILL"]),
            permitted: names(&["CAP_KILL"]),
            ..Capabilities::default()
        };
        for capabilities in [effective, ambient] {
            assert!(CapabilitySets::parse(Some(&capabilities)).is_err(), "{capabilities:?}");
        }
    }
}
