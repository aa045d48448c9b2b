//! The tools of the host: every program that a step or a unit test starts, and the Debian package that has it.
//!
//! What a command needs is looked for before its first step, and installed when xtask runs as root; otherwise the missing
//! packages are named. A test reads the sources and fails for a program that is not in the table.

use std::{env, ffi::OsStr};

use anyhow::{Result, bail};

use crate::apt;

/// What needs a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The unit tests.
    UnitTests,
    /// The build of the guest kernel.
    GuestKernel,
    /// The clients: Go reaches its module proxy by TLS.
    Clients,
    /// The container images.
    Images,
    /// The test suites for file systems.
    Suites,
    /// The testbed: its making and its start.
    Testbed,
}

impl Need {
    /// All that runs pods in the testbed.
    pub(crate) const PODS: [Self; 3] = [Self::GuestKernel, Self::Images, Self::Testbed];
    /// All that the whole-system tests take, too.
    pub(crate) const WHOLE_SYSTEM_TESTS: [Self; 4] =
        [Self::GuestKernel, Self::Images, Self::Testbed, Self::Suites];
}

/// A package, what is started of it, and what for. A package without programs is linked with, or read.
struct Tool {
    package: &'static str,
    programs: &'static [&'static str],
    needs: &'static [Need],
}

/// Everything that is not part of every Debian (`Essential: yes`).
const TOOLS: &[Tool] = &[
    tool("bc", &[], &[Need::GuestKernel]),
    tool("binutils", &["size"], &[Need::GuestKernel, Need::Testbed]),
    tool("bison", &[], &[Need::GuestKernel]),
    tool("ca-certificates", &[], &[Need::Clients]),
    tool("cpio", &["cpio"], &[Need::UnitTests]),
    tool("debian-archive-keyring", &[], &[Need::Images, Need::Testbed]),
    tool("e2fsprogs", &["mke2fs"], &[Need::Testbed]),
    tool("flex", &[], &[Need::GuestKernel]),
    tool("gcc", &["gcc"], &[Need::GuestKernel, Need::Suites]),
    // The network namespaces of the shim's tests.
    tool("iproute2", &["ip", "tc"], &[Need::UnitTests]),
    tool("kmod", &["depmod"], &[Need::Testbed]),
    tool("libacl1-dev", &[], &[Need::Suites]),
    tool("libelf-dev", &[], &[Need::GuestKernel]),
    tool("make", &["make"], &[Need::GuestKernel]),
    tool("mmdebstrap", &["mmdebstrap"], &[Need::Images, Need::Testbed]),
    tool("mount", &["mount"], &[Need::UnitTests]),
    tool("patch", &["patch"], &[Need::GuestKernel]),
    tool("procps", &["kill"], &[Need::UnitTests]),
    tool("xz-utils", &["xz"], &[Need::GuestKernel, Need::Testbed]),
];

const fn tool(package: &'static str, programs: &'static [&'static str], needs: &'static [Need]) -> Tool {
    Tool { package, programs, needs }
}

/// Makes sure that the host has all tools for these needs.
///
/// # Errors
/// When one is missing and cannot be installed from here, or is in no directory of `PATH`.
pub(crate) fn require(needs: &[Need]) -> Result<()> {
    let tools: Vec<&Tool> =
        TOOLS.iter().filter(|tool| tool.needs.iter().any(|need| needs.contains(need))).collect();
    apt::require(&tools.iter().map(|tool| tool.package).collect::<Vec<_>>())?;
    let path = env::var_os("PATH").unwrap_or_default();
    for Tool { package, programs, .. } in tools {
        let missing = programs.iter().find(|program| !is_in(&path, program));
        if let Some(program) = missing {
            bail!("{program} of Debian's package {package} is in no directory of PATH; is /usr/sbin in it?");
        }
    }
    Ok(())
}

/// Whether one of the directories has a file of this name.
fn is_in(path: &OsStr, program: &str) -> bool {
    env::split_paths(path).any(|directory| directory.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        fs,
        path::{Path, PathBuf},
    };

    use super::*;

    /// What every Debian has, and what building this workspace takes.
    const ALWAYS_THERE: [&str; 16] = [
        "apt-get",
        "bash",
        "cargo",
        "cat",
        "cp",
        "dpkg-deb",
        "dpkg-query",
        "find",
        "rustc",
        "setpriv",
        "sh",
        "sleep",
        "stty",
        "tar",
        "true",
        "unshare",
    ];

    /// Sources whose programs are started in the testbed, whose root has packages of its own.
    const IN_THE_TESTBED: [&str; 5] = ["inside.rs", "machine.rs", "guest.rs", "share.rs", "vsock.rs"];

    /// How our sources start programs.
    const STARTS: [&str; 6] = [
        "Command::new(\"",
        "contained(\"",
        "dies_with_us(\"",
        "self.run(\"",
        "inside.run(\"",
        "other.run(\"",
    ];

    fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let in_the_testbed = directory.ends_with("xtask/src/bench")
                && IN_THE_TESTBED.iter().any(|name| path.ends_with(name));
            if path.is_dir() && !path.ends_with("target") {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !in_the_testbed {
                found.push(path);
            }
        }
    }

    #[test]
    fn tools_that_sources_start_are_in_the_table() {
        let known: BTreeSet<&str> =
            TOOLS.iter().flat_map(|tool| tool.programs).copied().chain(ALWAYS_THERE).collect();
        let mut files = Vec::new();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for member in ["agent", "protocol", "shim", "vmm", "xtask"] {
            sources(&workspace.join(member), &mut files);
        }
        let mut seen = BTreeSet::new();
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for start in STARTS {
                for rest in text.split(start).skip(1) {
                    let program = rest.split('"').next().unwrap();
                    let name = program.rsplit('/').next().unwrap().to_owned();
                    assert!(
                        name.is_empty() || known.contains(&*name),
                        "{} starts {program}: say in the table of tools which package has it",
                        file.display()
                    );
                    seen.insert(name);
                }
            }
        }
        assert!(seen.contains("cpio") && seen.contains("mke2fs"), "the sources were not read: {seen:?}");
    }

    #[test]
    fn tools_are_looked_for_in_all_of_path() {
        let path = OsStr::new("/nonexistent:/bin");
        assert!(is_in(path, "sh"));
        assert!(!is_in(path, "no-such-program"));
        assert!(!is_in(OsStr::new(""), "sh"));
    }

    #[test]
    fn tools_of_a_package_stand_in_one_row() {
        let packages: BTreeSet<&str> = TOOLS.iter().map(|tool| tool.package).collect();
        assert_eq!(packages.len(), TOOLS.len());
    }
}
