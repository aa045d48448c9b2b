//! Another size for a machine that runs.

use std::time::Duration;

use caisson_protocol::client::call;
use caisson_protocol::v1;
use caisson_vmm_api::control::{
    self,
    metrics::{MemoryMetrics, Metrics},
    protocol::Resize,
};
use tokio::time::{Instant, sleep};

use super::{Machine, MachineError};
use crate::sizing::Target;

/// How long the guest may take to plug memory or give it back.
pub(super) const GUEST: Duration = Duration::from_secs(10);
/// Between two looks at how far it is. It does not tell.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

impl Machine {
    /// Has the machine become of this size, and returns when it is.
    ///
    /// # Errors
    /// When the VMM or the guest refuses, or the guest does not get there in time because it uses what it should give
    /// back. It goes on trying then.
    pub async fn resize(&self, target: Target) -> Result<(), MachineError> {
        // A processor exists before the guest can bring it up, and goes on existing after the guest has let go of it.
        if u32::from(target.vcpus) > self.metrics().await?.vcpus {
            let cpus = Resize { cpus: Some(target.vcpus), ..Resize::default() };
            self.control(move |vmm| vmm.resize(cpus)).await?;
        }
        let online = v1::OnlineCpusRequest { count: target.vcpus.into() };
        self.answer(self.agent().machine().online_cpus(call(online))).await?;
        let memory = Resize {
            plugged_mib: Some(target.plugged_mib),
            balloon_mib: Some(u32::try_from(target.balloon_mib).unwrap_or(u32::MAX)),
            ..Resize::default()
        };
        self.control(move |vmm| vmm.resize(memory)).await?;
        self.settle(target).await
    }

    async fn settle(&self, target: Target) -> Result<(), MachineError> {
        let deadline = Instant::now() + GUEST;
        loop {
            let (plugged_mib, balloon_mib) = sizes(&self.metrics().await?.memory);
            if (plugged_mib, balloon_mib) == (target.plugged_mib, target.balloon_mib) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(MachineError::Stuck {
                    plugged_mib,
                    wanted_mib: target.plugged_mib,
                    balloon_mib,
                    wanted_balloon_mib: target.balloon_mib,
                });
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    async fn metrics(&self) -> Result<Metrics, MachineError> {
        self.control(control::Client::metrics).await
    }
}

/// The MiB that are plugged and the MiB in the balloon. A machine without the device has none of either.
fn sizes(memory: &MemoryMetrics) -> (u64, u64) {
    let plugged = memory.plugged_bytes.unwrap_or(0);
    let balloon = u64::from(memory.balloon_pages.unwrap_or(0)).saturating_mul(PAGE);
    (plugged / MIB, balloon / MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resize_sizes_are_mib_of_bytes_and_of_pages() {
        let memory = MemoryMetrics {
            plugged_bytes: Some(3 * MIB + 1),
            balloon_pages: Some(512),
            ..MemoryMetrics::default()
        };
        assert_eq!(sizes(&memory), (3, 2));
        assert_eq!(sizes(&MemoryMetrics::default()), (0, 0), "a machine without either device");
    }
}
