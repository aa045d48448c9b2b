//! The whole system on a machine with KVM: our binaries, what they boot, and containerd beside a command.

use std::{
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Result, anyhow};

use crate::{
    host::{Host, cargo},
    images, initramfs,
    kernel::{self, KernelArgs},
    overview::Overview,
    proc,
    products::{self, Optimization, Purpose},
    testbed::{
        MachineArgs, Variant,
        exec::{self, ExecArgs},
        root,
    },
};

/// The steps that make it, and how many seconds each takes alone on two processors, roughly: for their shares only.
const KERNEL: (&str, u32) = ("guest kernel", 450);
const PROGRAMS: (&str, u32) = ("programs", 240);
const IMAGES: (&str, u32) = ("images", 45);
const TESTBED: (&str, u32) = ("testbed", 60);

/// Everything that it is made of, by its path on this host.
#[derive(Clone, Debug)]
pub(crate) struct System {
    /// Our binaries.
    pub(crate) products: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's initramfs, with the agent.
    pub(crate) initramfs: PathBuf,
    /// The directory of the images.
    pub(crate) images: PathBuf,
}

/// Where a command runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// The emulated machine; this host if there is none.
    pub(crate) variant: Option<Variant>,
    /// Where commands on this host keep what they make.
    pub(crate) scratch: &'a Path,
}

impl Place<'_> {
    /// The path there of a file of this host.
    ///
    /// # Errors
    /// When the testbed does not see it.
    pub(crate) fn path(&self, host: &Host, path: &Path) -> Result<String> {
        let path = if self.variant.is_some() { exec::inside(host, path)? } else { path.to_owned() };
        Ok(path.to_string_lossy().into_owned())
    }
}

impl System {
    /// Makes all of it, the commands that run beside containerd, and the variant of the testbed if one is to be used.
    ///
    /// # Errors
    /// When something can't be built.
    pub(crate) fn build(host: &Host, optimization: Optimization, variant: Option<Variant>) -> Result<Self> {
        let mut steps = vec![KERNEL, PROGRAMS, IMAGES];
        steps.extend(variant.is_some().then_some(TESTBED));
        let overview = Overview::start(&steps);
        // What each lane waits for, the network, a linker or one last crate, leaves the processors to the others. A lane
        // that fails does not stop them: what they make is in the cache for the next run.
        thread::scope(|scope| {
            let kernel =
                scope.spawn(|| overview.step(KERNEL.0, || kernel::build(host, KernelArgs::default())));
            let programs = scope.spawn(|| overview.step(PROGRAMS.0, || programs(host, optimization)));
            let fetched = (|| {
                let images = overview.step(IMAGES.0, || images::build(host))?;
                if let Some(variant) = variant {
                    overview.step(TESTBED.0, || root::build(host, variant))?;
                }
                anyhow::Ok(images)
            })();
            let kernel = kernel.join().map_err(|_| anyhow!("the thread of the guest kernel panicked"))?;
            let programs = programs.join().map_err(|_| anyhow!("the thread of the programs panicked"))?;
            let (products, initramfs) = programs?;
            Ok(Self { products, kernel: kernel?, initramfs, images: fetched? })
        })
    }

    /// How to run a command beside a containerd of its own, told by its environment where everything is.
    ///
    /// # Errors
    /// When the testbed does not see a part.
    pub(crate) fn beside_containerd(
        &self,
        host: &Host,
        place: &Place<'_>,
        command: Vec<String>,
    ) -> Result<ExecArgs> {
        let mut env = Vec::new();
        for (name, path) in [
            ("CAISSON_BIN", &self.products),
            ("CAISSON_KERNEL", &self.kernel),
            ("CAISSON_INITRAMFS", &self.initramfs),
            ("CAISSON_IMAGES", &self.images),
        ] {
            env.push(format!("{name}={}", place.path(host, path)?));
        }
        let state = if place.variant.is_some() { Path::new("/scratch") } else { place.scratch };
        env.push(format!("TMPDIR={}", state.join("tmp").display()));

        // The emulated machine's own file systems are made anew at each boot, so the directory is made there.
        let mut words: Vec<String> =
            ["sh", "-c", "mkdir -p \"$TMPDIR\" && exec \"$@\"", "sh"].map(str::to_owned).into();
        words.push(place.path(host, &self.products.join("e2e-runner"))?);
        words.push(format!("--state={}", state.join("e2e").display()));
        words.extend(command);
        Ok(ExecArgs {
            machine: MachineArgs::of(place.variant.unwrap_or_default()),
            exchange: None,
            env,
            timeout: None,
            direct: place.variant.is_none(),
            command: words,
        })
    }
}

/// Makes our programs, and the guest's initramfs of one of them.
fn programs(host: &Host, optimization: Optimization) -> Result<(PathBuf, PathBuf)> {
    let products = products::build(host, optimization, Purpose::Use)?;
    let initramfs = initramfs::build(host, &products.join("caisson-agent"))?;
    runners(host, &products)?;
    Ok((products, initramfs))
}

/// Puts the commands that run beside containerd into the directory of our binaries.
///
/// # Errors
/// When they do not build.
pub(crate) fn runners(host: &Host, products: &Path) -> Result<()> {
    let runners = ["e2e-runner", "pods"];
    let mut build = cargo();
    build.args(["build", "--package", "caisson-e2e"]);
    build.args(runners.iter().flat_map(|runner| ["--bin", runner]));
    proc::run(build.current_dir(&host.workspace))?;
    runners.iter().try_for_each(|runner| products::keep(&host.products("debug").join(runner), products))
}
