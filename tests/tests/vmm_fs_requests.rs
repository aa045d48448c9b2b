//! How many requests a guest makes of a shared directory for what programs do with files: each is a way out of the
//! guest and back.

use std::{collections::BTreeMap, fs};

use anyhow::{Result, bail, ensure};
use caisson_e2e::{guest_share::Script, vmm::Vmm};
use caisson_vmm_api::control::metrics::Counter;

/// Files in each phase.
const FILES: u64 = 50;

/// It is waited for the host after each phase, by lookups only.
const GUEST: &str = "
cd $DIR; mkdir d; echo log > log
phase() { echo phase $1; while [ ! -e $DIR/$1 ]; do usleep 200000; done; }
phase begin
i=0; while [ $i -lt 50 ]; do echo $i > d/$i; i=$((i + 1)); done; phase made
i=0; while [ $i -lt 50 ]; do echo $i >> log; i=$((i + 1)); done; phase appended
i=0; while [ $i -lt 50 ]; do echo $i 1<> d/$i; i=$((i + 1)); done; phase updated
i=0; while [ $i -lt 50 ]; do read line < d/$i; i=$((i + 1)); done; phase read
sleep 1000";

/// The requests so far, by operation.
fn operations(vmm: &mut Vmm) -> Result<BTreeMap<String, u64>> {
    let metrics = vmm.client.metrics()?;
    let counts = metrics.slots.values().find_map(|device| device.counter("fs", "operations"));
    let Some(Counter::ByName(counts)) = counts else { bail!("no share's metrics: {metrics:?}") };
    Ok(counts.clone())
}

#[test]
fn programs_take_no_more_requests_than_they_must() -> Result<()> {
    let mut guest = Script { text: GUEST, ..Script::default() }.boot()?;
    let mut before = BTreeMap::new();
    for (phase, most, flushes) in [
        ("begin", u64::MAX, false),
        // create, getxattr, write, release
        ("made", 4, false),
        // open, write, release; and getxattr when what is known of the file is too old
        ("appended", 4, false),
        // open, getxattr, write, release; and flush, twice as the shell closes it twice
        ("updated", 6, true),
        // open, read, release
        ("read", 3, false),
    ] {
        guest.vmm.expect(&format!("phase {phase}"))?;
        let now = operations(&mut guest.vmm)?;
        let since = |(name, count): (&String, &u64)| {
            (name.clone(), count - before.get(name).copied().unwrap_or_default())
        };
        let mut made: BTreeMap<_, _> = now.iter().map(since).filter(|(_, count)| *count > 0).collect();
        // How many of these there are depends on the time that it takes.
        made.retain(|name, _| !["lookup", "getattr"].contains(&&**name));
        let count: u64 = made.values().sum();
        // What the shell itself and the ends of the phase before take.
        ensure!(count <= most.saturating_mul(FILES).saturating_add(FILES / 2), "{phase}: {made:?}");
        ensure!(made.contains_key("flush") == flushes, "{phase}: {made:?}");
        println!("{phase}: {made:?}");
        before = now;
        fs::write(guest.directory.join(phase), "")?;
    }
    Ok(())
}
