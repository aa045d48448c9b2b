//! Saving a machine and going on from what was saved. QEMU's `microvm` has no counterpart that maps saved
//! memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::{
    guest,
    inside::{Bench, as_f64},
    machine::Vmm,
    report::Figures,
};

impl Bench<'_> {
    /// Saves the guest once it has reached its init, and restores it.
    pub(super) fn snapshots(&self, figures: &mut Figures) -> Result<()> {
        let name = Vmm::Caisson.name();
        let initramfs = self.file("small.cpio", &guest::minimal_initramfs()?)?;
        let whole = self.guest(self.directory.join("vmlinux"), initramfs);
        eprintln!("==> snapshots of {name}");
        let (state, memory) = (self.directory.join("state"), self.directory.join("memory"));
        let (mut create, mut restore, mut resident) = (Vec::new(), Vec::new(), Vec::new());
        // The first is for the page cache.
        for run in 0..=self.runs {
            let (mut machine, mut control) = whole.start_controlled()?;
            machine.mark()?;
            std::thread::sleep(Duration::from_millis(50));
            let started = Instant::now();
            control.call(&json!("pause"))?;
            control.call(&json!({ "snapshot": { "state": state, "memory": memory } }))?;
            let saved = started.elapsed();
            drop(machine);

            let (machine, mut control) = whole.start_empty()?;
            control.call(&json!({ "restore": { "state": state, "memory": memory } }))?;
            control.call(&json!("resume"))?;
            let restored = machine.age();
            let held = machine.memory().context("the restored machine's memory")?;
            if run > 0 {
                create.push(saved.as_secs_f64() * 1000.0);
                restore.push(restored.as_secs_f64() * 1000.0);
                resident.push(as_f64(held.guest));
            }
        }
        figures.add("snapshot_create_minstr", name, create);
        figures.add("restore_to_running_minstr", name, restore);
        figures.add("guest_rss_restored_kb", name, resident);
        Ok(())
    }
}
