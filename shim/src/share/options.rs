//! The options of mounts, as containerd and the OCI specification write them (mount(8)).

use rustix::mount::MountFlags;

use super::ShareError;

/// What comes in to a mount of what is mounted on the host later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Propagation {
    /// Nothing.
    #[default]
    Private,
    /// What is mounted below the source.
    Slave,
}

/// Options, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// `bind` or `rbind`.
    pub(super) bind: bool,
    /// With all mounts below the source.
    pub(super) recursive: bool,
    pub(super) read_only: bool,
    /// Mounts below the source are read-only too.
    pub(super) recursive_read_only: bool,
    pub(super) propagation: Propagation,
    /// Flags of mount(2) for a new file system, without the ones above.
    pub(super) flags: MountFlags,
    /// Whatever else there is: the file system's own options.
    pub(super) data: Vec<String>,
}

/// Flags, the option that clears each, and whether the option sets it.
const FLAGS: [(&str, MountFlags, bool); 22] = [
    ("nosuid", MountFlags::NOSUID, true),
    ("suid", MountFlags::NOSUID, false),
    ("nodev", MountFlags::NODEV, true),
    ("dev", MountFlags::NODEV, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("noatime", MountFlags::NOATIME, true),
    ("atime", MountFlags::NOATIME, false),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("diratime", MountFlags::NODIRATIME, false),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("nostrictatime", MountFlags::STRICTATIME, false),
    ("lazytime", MountFlags::LAZYTIME, true),
    ("nolazytime", MountFlags::LAZYTIME, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("silent", MountFlags::SILENT, true),
    ("loud", MountFlags::SILENT, false),
    ("defaults", MountFlags::empty(), true),
];

impl Default for Options {
    fn default() -> Options {
        Options {
            bind: false,
            recursive: false,
            read_only: false,
            recursive_read_only: false,
            propagation: Propagation::default(),
            flags: MountFlags::empty(),
            data: Vec::new(),
        }
    }
}

impl Options {
    /// Takes options apart; a later one wins over an earlier one.
    ///
    /// # Errors
    /// For what cannot be had across the border of a machine.
    pub(super) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Options, ShareError> {
        let mut parsed = Options::default();
        for option in options.into_iter().flat_map(|option| option.split(',')).filter(|text| !text.is_empty())
        {
            parsed.take(option)?;
        }
        Ok(parsed)
    }

    fn take(&mut self, option: &str) -> Result<(), ShareError> {
        let unsupported = |why| Err(ShareError::Option { option: option.to_owned(), why });
        match option {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            "ro" => self.read_only = true,
            "rro" => (self.read_only, self.recursive_read_only) = (true, true),
            "rw" => (self.read_only, self.recursive_read_only) = (false, false),
            "rrw" => self.recursive_read_only = false,
            "private" | "rprivate" | "unbindable" | "runbindable" => self.propagation = Propagation::Private,
            "slave" | "rslave" => self.propagation = Propagation::Slave,
            "shared" | "rshared" => {
                return unsupported("what is mounted inside a virtual machine cannot appear on the host");
            }
            "remount" => return unsupported("there is nothing yet to be mounted anew"),
            _ if option.starts_with("X-containerd.") || option.starts_with("x-containerd.") => {
                return unsupported("containerd has to carry it out before it hands the mount over");
            }
            _ if option.starts_with("uidmap=") || option.starts_with("gidmap=") => {
                return unsupported("user namespaces of pods are made inside the virtual machine");
            }
            _ => match FLAGS.iter().find(|(name, ..)| *name == option) {
                Some((_, flag, set)) => self.flags.set(*flag, *set),
                None => self.data.push(option.to_owned()),
            },
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Options {
        Options::parse(text.split(' ')).unwrap()
    }

    #[test]
    fn the_later_option_wins() {
        assert!(parse("ro").read_only && !parse("ro rw").read_only);
        let both = parse("rro rw ro");
        assert!(both.read_only && !both.recursive_read_only);
        assert_eq!(parse("rslave rprivate").propagation, Propagation::Private);
        assert_eq!(parse("nodev,noexec dev").flags, MountFlags::NOEXEC);
    }

    #[test]
    fn what_is_unknown_goes_to_the_file_system() {
        let options = parse("rbind index=off nosuid errors=remount-ro");
        assert!(options.bind && options.recursive);
        assert_eq!(options.flags, MountFlags::NOSUID);
        assert_eq!(options.data, ["index=off", "errors=remount-ro"]);
    }

    #[test]
    fn what_no_machine_can_do_is_refused() {
        for option in ["rshared", "shared", "remount", "uidmap=0:1000:65536", "X-containerd.mkfs.fs=ext4"] {
            let refused = Options::parse(["rbind", option]);
            assert!(matches!(refused, Err(ShareError::Option { .. })), "{option}");
        }
    }
}
