//! The clients that a node's users have, as tools of the tests: the modules below `tests/clients` pin them, Go builds them.
//!
//! Each directory there is a module of its own, so that a client is built with the dependencies that its release was made
//! with. Its `tool` lines name the programs, its `go.sum` what everything must hash to.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use nix::sys::signal::Signal;

use crate::{
    apt::{PrivateApt, Suite},
    cache::Key,
    host::Host,
    proc,
    testbed::Variant,
    tools::{self, Need},
};

/// Options of `cargo xtask clients`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClientsArgs {
    /// The modules to build; all but Kubernetes, which takes half an hour, if none is named.
    modules: Vec<Module>,
}

/// A directory below `tests/clients`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Module {
    /// `crictl` and `critest`.
    CriTools,
    /// `nerdctl`.
    Nerdctl,
    /// containerd's newest release: itself, `ctr`, and its shim for runc.
    Containerd,
    /// What a node and a control plane run: `kubelet`, `kube-apiserver`, `kube-controller-manager`, `kube-scheduler`.
    Kubernetes,
}

/// The module that has critest as its test, not as a program.
const CRITEST: &str = "sigs.k8s.io/cri-tools/cmd/critest";

/// What every build is told.
const FLAGS: &str = "-mod=readonly -trimpath";
/// Without tables of symbols and for debuggers.
const LINKER_FLAGS: &str = "-s -w";

impl Module {
    /// All.
    const ALL: [Self; 4] = [Self::CriTools, Self::Nerdctl, Self::Containerd, Self::Kubernetes];

    /// Its directory's name.
    fn name(self) -> &'static str {
        match self {
            Self::CriTools => "cri-tools",
            Self::Nerdctl => "nerdctl",
            Self::Containerd => "containerd",
            Self::Kubernetes => "kubernetes",
        }
    }

    /// The module that it pins, and the variable by which the programs know their version.
    fn pinned(self) -> (&'static str, &'static str) {
        match self {
            Self::CriTools => ("sigs.k8s.io/cri-tools", "sigs.k8s.io/cri-tools/pkg/version.Version"),
            Self::Nerdctl => {
                ("github.com/containerd/nerdctl/v2", "github.com/containerd/nerdctl/v2/pkg/version.Version")
            }
            Self::Containerd => {
                ("github.com/containerd/containerd/v2", "github.com/containerd/containerd/v2/version.Version")
            }
            Self::Kubernetes => ("k8s.io/kubernetes", "k8s.io/component-base/version.gitVersion"),
        }
    }

    fn directory(self, host: &Host) -> PathBuf {
        host.workspace.join("tests/clients").join(self.name())
    }
}

/// Builds the clients, unless the cache has them, and prints where they are.
///
/// # Errors
/// When one does not build.
pub(crate) fn run(host: &Host, args: &ClientsArgs) -> Result<()> {
    let usual = Module::ALL.into_iter().filter(|module| *module != Module::Kubernetes).collect();
    for module in if args.modules.is_empty() { usual } else { args.modules.clone() } {
        println!("{}", build(host, module)?.display());
    }
    Ok(())
}

/// Builds a module's programs, unless the cache has them, and returns the directory that they are in.
///
/// # Errors
/// When Go can't be had, a module does not have the sum that it should, or a program does not build.
pub(crate) fn build(host: &Host, module: Module) -> Result<PathBuf> {
    tools::require(&[Need::Clients])?;
    let recipe = Recipe::read(host, module)?;
    let go = Go::find(host, recipe.minimum()?)?;
    host.cache.entry("clients", &recipe.key(&go), |output| {
        let log = host.log(&format!("clients-{}", module.name()));
        for package in recipe.tools() {
            recipe.build(host, &go, package, output, &log)?;
        }
        Ok(())
    })
}

/// What a module is built from.
struct Recipe {
    module: Module,
    /// Its directory's files by their path in it.
    files: BTreeMap<PathBuf, String>,
}

impl Recipe {
    fn read(host: &Host, module: Module) -> Result<Self> {
        let mut files = BTreeMap::new();
        let directory = module.directory(host);
        read_all(&directory, Path::new(""), &mut files)
            .with_context(|| format!("reading {}", directory.display()))?;
        Ok(Self { module, files })
    }

    fn go_mod(&self) -> &str {
        self.files.get(Path::new("go.mod")).map_or("", String::as_str)
    }

    /// The packages that its `tool` lines name.
    fn tools(&self) -> Vec<&str> {
        directives(self.go_mod(), "tool")
    }

    /// The oldest Go that it can be built with.
    fn minimum(&self) -> Result<Version> {
        let version = directives(self.go_mod(), "go").first().and_then(|version| Version::parse(version));
        version.with_context(|| format!("go.mod of {} has no go line", self.module.name()))
    }

    /// The version of what it pins.
    fn version(&self) -> Result<&str> {
        let (pinned, _) = self.module.pinned();
        let mut required = directives(self.go_mod(), "require").into_iter();
        let version = required.find_map(|line| line.strip_prefix(pinned)?.split_whitespace().next());
        version.with_context(|| format!("go.mod of {} requires no {pinned}", self.module.name()))
    }

    fn key(&self, go: &Go) -> Key {
        let mut key = Key::new("clients-1").with(self.module.name()).with(FLAGS).with(LINKER_FLAGS);
        for (path, content) in &self.files {
            key = key.with(path.to_string_lossy().as_bytes()).with(content);
        }
        key.with(&go.version)
    }

    /// Builds one program.
    fn build(&self, host: &Host, go: &Go, package: &str, output: &Path, log: &Path) -> Result<()> {
        let name = package.rsplit('/').next().unwrap_or(package);
        let (_, variable) = self.module.pinned();
        let mut build = go.command();
        build.args(if package == CRITEST { &["test", "-c"][..] } else { &["build"] });
        build.arg("-ldflags").arg(format!("{LINKER_FLAGS} -X {variable}={}", self.version()?));
        build.arg("-o").arg(output.join(name)).arg(package);
        build.current_dir(self.module.directory(host));
        proc::run_logged(&format!("building {name} {}", self.version()?), &mut build, log)
    }
}

/// Adds the files below a directory.
fn read_all(root: &Path, below: &Path, files: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            read_all(root, &path, files)?;
        } else {
            let content = fs::read_to_string(entry.path());
            files.insert(path, content.with_context(|| format!("reading {}", entry.path().display()))?);
        }
    }
    Ok(())
}

/// What a go.mod says by a directive, alone on its line or in blocks (<https://go.dev/ref/mod#go-mod-file>).
fn directives<'a>(go_mod: &'a str, directive: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut block = None;
    for line in go_mod.lines().map(str::trim) {
        match (block, line.split_once(' ')) {
            (Some(_), _) if line == ")" => block = None,
            (Some(open), _) if open == directive && !line.is_empty() => found.push(line),
            (None, Some((open, "("))) => block = Some(open),
            (None, Some((alone, rest))) if alone == directive => found.push(rest),
            _ => {}
        }
    }
    found
}

/// A version of Go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32, u32);

impl Version {
    /// Reads `1.26.6`, and `1.27`.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('.').map(|number| number.parse::<u32>());
        let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let patch = numbers.next().unwrap_or(Ok(0)).ok()?;
        Some(Self(major, minor, patch))
    }
}

/// A Go.
struct Go {
    program: PathBuf,
    /// Where it is, if it has to be told.
    root: Option<PathBuf>,
    /// What it says of itself.
    version: String,
}

impl Go {
    /// The host's, or Debian unstable's if that is missing or too old.
    fn find(host: &Host, minimum: Version) -> Result<Self> {
        match Self::of_host() {
            Some(go) if go.number().is_some_and(|version| version >= minimum) => Ok(go),
            _ => Self::unpack(host, minimum),
        }
    }

    fn of_host() -> Option<Self> {
        let path = env::var_os("PATH")?;
        let program = env::split_paths(&path).map(|place| place.join("go")).find(|go| go.is_file())?;
        let mut go = Self { program, root: None, version: String::new() };
        go.version = go.ask().ok()?;
        Some(go)
    }

    /// Debian's Go is static, so it runs on an older Debian, too.
    fn unpack(host: &Host, minimum: Version) -> Result<Self> {
        let apt = PrivateApt::open(&host.cache, Suite::Sid)?;
        let package = apt.dependency("golang-go", "golang-1")?;
        let key = Key::new("go-1").with(&package).with(apt.version(&package)?);
        let entry = host.cache.entry("go", &key, |output| {
            apt.unpack(&package, output)?;
            apt.unpack(&apt.dependency(&package, "golang-")?, output)
        })?;
        let go = Self::unpacked(&entry)?;
        ensure!(
            go.number().is_some_and(|version| version >= minimum),
            "the clients need Go {}.{}.{}, and Debian has {}",
            minimum.0,
            minimum.1,
            minimum.2,
            go.version
        );
        Ok(go)
    }

    /// The one in an entry of the cache.
    fn unpacked(entry: &Path) -> Result<Self> {
        let roots = fs::read_dir(entry.join("usr/lib")).context("listing what came with Debian's Go")?;
        let mut roots = roots.flatten().map(|root| root.path());
        let root = roots.find(|root| root.join("bin/go").exists()).context("Debian's package has no Go")?;
        let mut go = Self { program: root.join("bin/go"), root: Some(root), version: String::new() };
        go.version = go.ask()?;
        Ok(go)
    }

    /// The host's and those that were fetched before.
    fn at_hand(host: &Host) -> Vec<Self> {
        let entries = fs::read_dir(host.cache.root().join("go")).into_iter().flatten().flatten();
        let unpacked = entries.filter_map(|entry| Self::unpacked(&entry.path()).ok());
        Self::of_host().into_iter().chain(unpacked).collect()
    }

    fn ask(&self) -> Result<String> {
        let mut ask = proc::dies_with_us(&self.program, Signal::SIGKILL);
        self.environment(&mut ask);
        Ok(proc::output(ask.args(["env", "GOVERSION"]))?.trim().to_owned())
    }

    /// The number in `go1.26.8`, and in `go1.27.3 X:nodwarf5`.
    fn number(&self) -> Option<Version> {
        Version::parse(self.version.strip_prefix("go")?.split([' ', '-']).next()?)
    }

    /// A command that ends with xtask, and all that it started with it.
    fn command(&self) -> Command {
        let mut command = proc::contained(&self.program);
        self.environment(&mut command);
        command
    }

    /// Static programs for this machine, by this Go and no other, from what go.sum says and nothing else.
    fn environment(&self, command: &mut Command) {
        command.envs([
            ("CGO_ENABLED", "0"),
            ("GOARCH", "amd64"),
            ("GOFLAGS", FLAGS),
            ("GOOS", "linux"),
            ("GOTOOLCHAIN", "local"),
            ("GOWORK", "off"),
        ]);
        match &self.root {
            Some(root) => command.env("GOROOT", root),
            None => command.env_remove("GOROOT"),
        };
    }
}

/// The directories of clients that a command finds its programs in: those before the machine's own, and those after.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// In front of the machine's own.
    pub(crate) first: Vec<PathBuf>,
    /// Behind them.
    pub(crate) last: Vec<PathBuf>,
}

/// The clients for a command in the testbed: those that its variant is made of or that it is itself are built; of the
/// others it gets what was built before. Nothing is fetched to look for those: a machine without Go has none of them.
///
/// # Errors
/// When one does not build.
pub(crate) fn find(host: &Host, variant: Variant, command: &[String]) -> Result<Found> {
    let mut found = Found::default();
    if variant == Variant::Newest {
        found.first.push(build(host, Module::Containerd)?);
    }
    let gos = Go::at_hand(host);
    let asked_for = command.first().map(String::as_str);
    for module in [Module::CriTools, Module::Nerdctl, Module::Kubernetes] {
        let recipe = Recipe::read(host, module)?;
        let mut programs = recipe.tools().into_iter().filter_map(|package| package.rsplit('/').next());
        if programs.any(|program| Some(program) == asked_for) {
            found.last.push(build(host, module)?);
        } else {
            let built = gos.iter().find_map(|go| host.cache.existing("clients", &recipe.key(go)));
            found.last.extend(built);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::cache::Cache;

    fn recipe(module: Module) -> Recipe {
        let mut files = BTreeMap::new();
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/clients").join(module.name());
        read_all(&directory, Path::new(""), &mut files).unwrap();
        Recipe { module, files }
    }

    #[test]
    fn clients_are_pinned_with_their_sums() {
        let mut programs = Vec::new();
        for module in Module::ALL {
            let recipe = recipe(module);
            assert!(recipe.minimum().unwrap() >= Version(1, 24, 0), "older ones know no tool lines");
            let (version, sums) = (recipe.version().unwrap(), &recipe.files[Path::new("go.sum")]);
            let (pinned, _) = module.pinned();
            assert!(sums.contains(&format!("{pinned} {version} h1:")), "{pinned} {version} has no sum");
            programs.extend(recipe.tools().iter().map(|tool| tool.rsplit('/').next().unwrap().to_owned()));
        }
        programs.sort();
        assert_eq!(
            programs,
            [
                "containerd",
                "containerd-shim-runc-v2",
                "crictl",
                "critest",
                "ctr",
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "nerdctl"
            ]
        );
    }

    #[test]
    fn clients_are_built_again_for_every_change() {
        let go = |version: &str| Go { program: "go".into(), root: None, version: version.to_owned() };
        let mut recipe = recipe(Module::Nerdctl);
        let before = recipe.key(&go("go1.26.8")).hex();
        assert_eq!(recipe.key(&go("go1.26.8")).hex(), before);
        assert_ne!(recipe.key(&go("go1.27.3")).hex(), before);
        recipe.files.get_mut(Path::new("tigron/tig/tig.go")).unwrap().push('\n');
        assert_ne!(recipe.key(&go("go1.26.8")).hex(), before);
    }

    #[test]
    fn clients_are_looked_up_by_every_go_at_hand_and_by_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
        let cache = Cache::at(&directory.path().join("cache")).unwrap();
        let host = Host { workspace, target: directory.path().join("target"), cache };
        let asked = ["true".to_owned()];
        assert!(find(&host, Variant::Trixie, &asked).unwrap().last.is_empty());
        assert!(!host.cache.root().join("apt").exists(), "a package index was fetched to look a client up");

        let debian = Go { program: "go".into(), root: None, version: "go9.9.9".to_owned() };
        let nerdctl = host.cache.entry("clients", &recipe(Module::Nerdctl).key(&debian), |_| Ok(())).unwrap();
        assert!(find(&host, Variant::Trixie, &asked).unwrap().last.is_empty());
        let unpack = |entry: &Path| {
            let bin = entry.join("usr/lib/go-9.9/bin");
            fs::create_dir_all(&bin)?;
            fs::write(bin.join("go"), "#!/bin/sh\necho go9.9.9\n")?;
            Ok(fs::set_permissions(bin.join("go"), fs::Permissions::from_mode(0o755))?)
        };
        host.cache.entry("go", &Key::new("go-test"), unpack).unwrap();
        assert_eq!(find(&host, Variant::Trixie, &asked).unwrap().last, [nerdctl]);
    }

    #[test]
    fn clients_directives_stand_alone_or_in_blocks() {
        let text = "module m\n\ngo 1.26.6\n\ntool a/b\n\ntool (\n\tc/d\n\te\n)\n\nrequire (\n\ttool v1 // indirect\n)\n";
        assert_eq!(directives(text, "tool"), ["a/b", "c/d", "e"]);
        assert_eq!(directives(text, "require"), ["tool v1 // indirect"]);
        assert_eq!(directives(text, "go"), ["1.26.6"]);
    }

    #[test]
    fn clients_compare_versions_of_go_as_numbers() {
        let number =
            |version: &str| Go { program: "go".into(), root: None, version: version.to_owned() }.number();
        assert!(number("go1.26.10 X:nodwarf5") > number("go1.26.8"));
        assert_eq!(number("go1.27"), Some(Version(1, 27, 0)));
        assert_eq!(number("devel"), None);
    }
}
