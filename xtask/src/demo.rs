//! `cargo xtask demo`: the main job, shown and not told.
//!
//! containerd runs pods through the handler `caisson`, beside one of runc's. What is printed comes from the run itself;
//! the part that runs beside containerd is the command `pods` of the whole-system tests.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::{
    host::Host,
    products::Optimization,
    system::{Place, System},
    testbed::{Variant, exec},
    tools::{self, Need},
};

/// How long it may take once everything is built, in seconds.
const LIMIT: u64 = 1200;

/// Options of `cargo xtask demo`.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct DemoArgs {
    /// The Debian of the testbed, and so containerd's version.
    #[arg(long, value_enum, default_value_t)]
    variant: Variant,
    /// Run on this host, whose KVM must have hardware virtualization, instead of in the testbed.
    #[arg(long, conflicts_with = "variant")]
    direct: bool,
}

/// Builds the system and runs pods on it.
///
/// # Errors
/// When something can't be built, or the machine is lost.
pub(crate) fn run(host: &Host, args: &DemoArgs) -> Result<ExitCode> {
    tools::require(&Need::PODS)?;
    let system = System::build(host, Optimization::Quick, (!args.direct).then_some(args.variant))?;
    let scratch = host.cache.scratch()?;
    let place = Place { variant: (!args.direct).then_some(args.variant), scratch: scratch.path() };
    let pods = place.path(host, &system.products.join("pods"))?;
    let mut request = system.beside_containerd(host, &place, vec![pods, "demo".to_owned()])?;
    request.timeout = Some(LIMIT);
    exec::exec(host, &request, exec::standard_error())
}
