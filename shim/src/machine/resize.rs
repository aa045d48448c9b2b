//! Another size for a machine that runs.

use std::time::Duration;

use caisson_protocol::client::call;
use caisson_protocol::v1;
use caisson_vmm_api::control::protocol::Resize;
use tokio::time::{Instant, sleep};

use super::{Machine, MachineError};
use crate::sizing::Target;

/// How long the guest may take to plug memory or give it back.
pub(super) const GUEST: Duration = Duration::from_secs(10);
/// Between two looks at how far it is. It does not tell.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// What the VMM says of the machine.
struct Sizes {
    /// Processors that exist.
    vcpus: u64,
    plugged_mib: u64,
    balloon_mib: u64,
}

impl Machine {
    /// Has the machine become of this size, and returns when it is.
    ///
    /// # Errors
    /// When the VMM or the guest refuses, or the guest does not get there in time because it uses what it should give
    /// back. It goes on trying then.
    pub async fn resize(&self, target: Target) -> Result<(), MachineError> {
        // A processor exists before the guest can bring it up, and goes on existing after the guest has let go of it.
        if u64::from(target.vcpus) > self.sizes().await?.vcpus {
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
            let Sizes { plugged_mib, balloon_mib, .. } = self.sizes().await?;
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

    async fn sizes(&self) -> Result<Sizes, MachineError> {
        let metrics = self.control(caisson_vmm_api::control::Client::metrics).await?;
        let number = |name: &str| metrics.pointer(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        Ok(Sizes {
            vcpus: number("/vcpus"),
            plugged_mib: number("/memory/plugged_bytes") / MIB,
            balloon_mib: number("/memory/balloon_pages").saturating_mul(PAGE) / MIB,
        })
    }
}
