//! What a machine answers to [`Command::Metrics`](super::protocol::Command::Metrics).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Sizes, times and counters of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// vCPUs that exist, online or not.
    pub vcpus: u32,
    /// Whether they run: the machine is not paused.
    pub running: bool,
    /// The guest's memory.
    pub memory: MemoryMetrics,
    /// Each boot phase that the guest has reported, with the microseconds from the machine's start to it.
    pub phases_us: Vec<(u8, u64)>,
    /// The console's output.
    pub console: ConsoleMetrics,
    /// The devices' counters, by slot. Empty slots are left out.
    pub slots: BTreeMap<u8, DeviceMetrics>,
}

/// Sizes of the guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryMetrics {
    /// Bytes that the machine was booted with.
    pub boot_bytes: u64,
    /// Bytes that the guest has plugged beyond them. None: the machine has no memory device.
    pub plugged_bytes: Option<u64>,
    /// Pages of 4 KiB that the guest has given back by its balloon. None: the machine has no balloon.
    pub balloon_pages: Option<u32>,
    /// What the guest last reported. None: the machine has no balloon.
    pub guest: Option<GuestStatistics>,
}

/// How the guest uses its memory, as its driver reports it. A figure that the driver leaves out is `None`. Good for
/// sizing and for people, not for anything that must be true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestStatistics {
    /// Bytes swapped in since boot.
    pub swap_in: Option<u64>,
    /// Bytes swapped out since boot.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O since boot.
    pub major_faults: Option<u64>,
    /// Page faults that needed none since boot.
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    pub free_memory: Option<u64>,
    /// Bytes of memory that the guest sees.
    pub total_memory: Option<u64>,
    /// Bytes that a new workload could have without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of file caches that can be dropped.
    pub disk_caches: Option<u64>,
    /// Huge pages allocated since boot.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated since boot.
    pub hugetlb_failures: Option<u64>,
    /// Processes that the guest's OOM killer ended since boot.
    pub oom_kills: Option<u64>,
}

/// Counters of the console's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleMetrics {
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes dropped because the guest wrote faster than allowed, or nobody read.
    pub bytes_dropped: u64,
}

/// The counters of one device, by the name of its kind and their own. They are for observers: nothing is controlled by
/// them, and each device names its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceMetrics(BTreeMap<String, BTreeMap<String, Counter>>);

/// One counter, or several of the same kind by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Counter {
    /// One.
    Single(u64),
    /// Several.
    ByName(BTreeMap<String, u64>),
}

impl DeviceMetrics {
    /// The counter of this name, if the device is of this kind.
    ///
    /// ```
    /// use caisson_vmm_api::control::metrics::{Counter, DeviceMetrics};
    ///
    /// let metrics: DeviceMetrics = serde_json::from_str(r#"{"block":{"reads":3}}"#)?;
    /// assert_eq!(metrics.counter("block", "reads"), Some(&Counter::Single(3)));
    /// assert_eq!(metrics.counter("net", "reads"), None);
    /// # Ok::<(), serde_json::Error>(())
    /// ```
    #[must_use]
    pub fn counter(&self, kind: &str, name: &str) -> Option<&Counter> {
        self.0.get(kind)?.get(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_survive_the_control_socket() {
        let device = r#"{"fs":{"requests":7,"operations":{"lookup":2}}}"#;
        let metrics = Metrics {
            vcpus: 2,
            memory: MemoryMetrics { plugged_bytes: Some(5), ..MemoryMetrics::default() },
            slots: BTreeMap::from([(3, serde_json::from_str(device).unwrap())]),
            ..Metrics::default()
        };
        let text = serde_json::to_string(&metrics).unwrap();
        assert_eq!(serde_json::from_str::<Metrics>(&text).unwrap(), metrics);
    }

    #[test]
    fn metrics_with_a_field_of_another_name_are_refused() {
        let text = serde_json::to_string(&Metrics::default()).unwrap();
        for name in ["vcpus", "plugged_bytes", "balloon_pages"] {
            let renamed = text.replace(name, "renamed");
            assert_ne!(renamed, text, "{name} is not there");
            assert!(serde_json::from_str::<Metrics>(&renamed).is_err(), "{name}");
        }
    }
}
