//! `cargo xtask kernel`: the guest kernel, from Debian's source package and `guest-kernel-config/`, whose `patches/`
//! are applied in the order of their names.
//!
//! | module | owns |
//! |---|---|
//! | [`fragment`] | what the fragments ask for, and whether a configuration has it |
//! | here | fetching, configuring, building, caching |

mod fragment;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{
    apt::{PrivateApt, Suite},
    cache::Key,
    host::Host,
    proc,
    tools::{self, Need},
};
use fragment::Fragment;

/// Debian's package of the newest 6.12 sources.
const SOURCE: &str = "linux-source-6.12";

/// The fragments that every guest kernel is made of, in the order of their application.
const FRAGMENTS: [&str; 3] = ["base.config", "virtio.config", "container.config"];

/// The fragment for those who debug the kernel.
const DEBUG_FRAGMENT: &str = "debug.config";

/// Options of `cargo xtask kernel`.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct KernelArgs {
    /// Add the debugging fragment: symbols, tracing, lock checking.
    #[arg(long)]
    pub(crate) debug: bool,
}

/// Builds the kernel, unless the cache has it, and returns the path of its `vmlinux`.
///
/// # Errors
/// When the sources can't be fetched, an asked-for option does not survive, or the build fails.
pub(crate) fn build(host: &Host, args: KernelArgs) -> Result<PathBuf> {
    let names = FRAGMENTS.iter().copied().chain(args.debug.then_some(DEBUG_FRAGMENT));
    let directory = host.workspace.join("guest-kernel-config");
    let fragments = names.map(|name| Fragment::read(&directory.join(name))).collect::<Result<Vec<_>>>()?;

    tools::require(&[Need::GuestKernel])?;
    let apt = PrivateApt::open(&host.cache, Suite::Trixie)?;
    let version = apt.version(SOURCE)?;
    let compiler = proc::output(Command::new("gcc").arg("--version"))?;
    let patches = patches(&directory.join("patches"))?;
    let mut key = Key::new("guest-kernel-2").with(&version).with(&compiler);
    for fragment in &fragments {
        key = key.with(fragment.text());
    }
    for (_, text) in &patches {
        key = key.with(text);
    }
    let entry = host.cache.entry("guest-kernel", &key, |output| {
        let sources = sources(host, &apt, &version, &patches)?;
        let scratch = host.cache.scratch()?;
        let build = Build { host, sources: &sources, objects: scratch.path() };
        build.configure(&fragments)?;
        build.compile()?;
        for file in ["vmlinux", ".config"] {
            fs::copy(scratch.path().join(file), output.join(file.trim_start_matches('.')))
                .with_context(|| format!("keeping the kernel's {file}"))?;
        }
        Ok(())
    })?;
    Ok(entry.join("vmlinux"))
}

/// Prints where the kernel is and how large its parts are.
///
/// # Errors
/// When `size` does not understand the file.
pub(crate) fn report(vmlinux: &Path) -> Result<()> {
    let sizes = proc::output(Command::new("size").arg("--format=berkeley").arg(vmlinux))?;
    let numbers: Vec<u64> =
        sizes.lines().nth(1).unwrap_or("").split_whitespace().flat_map(str::parse).collect();
    let [text, data, bss, ..] = numbers[..] else { anyhow::bail!("`size` said {sizes}") };
    let config = vmlinux.with_file_name("config");
    let config = fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
    let cpus = config.lines().find_map(|line| line.strip_prefix("CONFIG_NR_CPUS=")).unwrap_or("?");
    println!("{}", vmlinux.display());
    println!("text {}, data {}, bss {}, at most {cpus} CPUs", mib(text), mib(data), mib(bss));
    Ok(())
}

fn mib(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

/// Every patch's path and text, in the order of their names.
fn patches(directory: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let read = |path: PathBuf| {
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok((path, text))
    };
    let entries = fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    paths.sort();
    paths.into_iter().map(read).collect()
}

/// The unpacked sources with the patches applied.
fn sources(host: &Host, apt: &PrivateApt, version: &str, patches: &[(PathBuf, Vec<u8>)]) -> Result<PathBuf> {
    let mut key = Key::new("linux-source-2").with(version);
    for (_, text) in patches {
        key = key.with(text);
    }
    let entry = host.cache.entry("linux-source", &key, |output| {
        let scratch = host.cache.scratch()?;
        apt.unpack(SOURCE, scratch.path())?;
        let archive = scratch.path().join(format!("usr/src/{SOURCE}.tar.xz"));
        let mut tar = proc::contained("tar");
        tar.arg("--extract")
            .arg("--strip-components=1")
            .arg("--file")
            .arg(archive)
            .arg("--directory")
            .arg(output);
        proc::run_logged(&format!("unpacking {SOURCE} {version}"), &mut tar, &host.log("linux-source"))?;
        for (path, _) in patches {
            let mut patch = proc::contained("patch");
            // A hunk that does not fit exactly must be looked at by a person.
            patch.args(["--strip=1", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "--directory"]);
            patch.arg(output).arg("--input").arg(path);
            let what = format!("applying {}", path.display());
            proc::run_logged(&what, &mut patch, &host.log("linux-source"))?;
        }
        Ok(())
    })?;
    Ok(entry)
}

/// One build of a kernel, out of tree.
struct Build<'a> {
    host: &'a Host,
    sources: &'a Path,
    objects: &'a Path,
}

impl Build<'_> {
    /// `tinyconfig` with the fragments on top.
    fn configure(&self, fragments: &[Fragment]) -> Result<()> {
        let log = self.host.log("guest-kernel-config");
        proc::run_logged("starting from tinyconfig", self.make().arg("tinyconfig"), &log)?;
        // The script only reads its own directory and writes the output's .config.
        let mut merge = proc::contained(self.sources.join("scripts/kconfig/merge_config.sh"));
        merge.args(["-m", "-O"]).arg(self.objects).arg(self.objects.join(".config"));
        merge.args(fragments.iter().map(Fragment::path)).current_dir(self.objects);
        proc::run_logged("merging the fragments", &mut merge, &log)?;
        proc::run_logged("resolving dependencies", self.make().arg("olddefconfig"), &log)?;

        let config =
            fs::read_to_string(self.objects.join(".config")).context("reading the merged configuration")?;
        let lost = fragment::lost(fragments, &config);
        ensure!(
            lost.is_empty(),
            "Kconfig did not keep what the fragments ask for (a dependency is missing, or something selects it):\n{}",
            lost.join("\n")
        );
        Ok(())
    }

    fn compile(&self) -> Result<()> {
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let mut make = self.make();
        make.arg(format!("-j{jobs}")).arg("vmlinux");
        proc::run_logged("building the guest kernel", &mut make, &self.host.log("guest-kernel"))
    }

    /// `make` with everything fixed that would otherwise differ between two builds.
    fn make(&self) -> Command {
        let mut make = proc::contained("make");
        make.arg("-s").arg("-C").arg(self.sources).arg(format!("O={}", self.objects.display()));
        make.args(["ARCH=x86_64", "KBUILD_BUILD_TIMESTAMP=@0", "KBUILD_BUILD_USER=caisson"]);
        make.arg("KBUILD_BUILD_HOST=caisson");
        make
    }
}
