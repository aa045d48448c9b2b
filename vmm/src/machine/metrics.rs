//! What the control API reports of a machine.

use caisson_vmm_api::control::metrics::{
    self as reply, ConsoleMetrics, GuestStatistics, MemoryMetrics, Metrics,
};

use caisson_virtio::devices::{
    balloon::{Balloon, Statistics},
    mem::MemoryDevice,
};

use super::{DeviceMetrics, Machine};

impl Machine {
    /// Sizes, times and counters.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let slots = (0u8..).take(self.bus.slots.count()).filter_map(|slot| {
            let metrics = self.bus.slots.with(slot, DeviceMetrics::of).ok()???;
            Some((slot, of_device(&metrics)))
        });
        let console = self.bus.console.metrics();
        Metrics {
            vcpus: u32::try_from(self.processors.count()).unwrap_or(u32::MAX),
            running: self.processors.running(),
            memory: MemoryMetrics {
                boot_bytes: self.shape.ram.size,
                plugged_bytes: self.first_device::<MemoryDevice, _>(|mem| mem.plugged_size()),
                balloon_pages: self.first_device::<Balloon, _>(|balloon| balloon.actual_pages()),
                guest: self.guest_statistics(),
            },
            phases_us: self.bus.exit_port.phases(),
            console: ConsoleMetrics {
                bytes_written: console.bytes_written.get(),
                bytes_dropped: console.bytes_dropped.get(),
            },
            slots: slots.collect(),
        }
    }

    /// What the guest last reported of its memory. It is asked to report again, for the next request.
    fn guest_statistics(&self) -> Option<GuestStatistics> {
        let running = self.processors.running();
        self.first_device::<Balloon, _>(|balloon| {
            let last = of_guest(balloon.statistics());
            if running {
                // A ring that is broken ends the device at its next event.
                let _ = balloon.request_statistics();
            }
            last
        })
    }
}

/// A device's counters, which it names itself.
fn of_device(metrics: &DeviceMetrics) -> reply::DeviceMetrics {
    // All are numbers, or numbers by name: a test checks it for each kind.
    serde_json::to_value(metrics).and_then(serde_json::from_value).unwrap_or_default()
}

fn of_guest(statistics: &Statistics) -> GuestStatistics {
    GuestStatistics {
        swap_in: statistics.swap_in,
        swap_out: statistics.swap_out,
        major_faults: statistics.major_faults,
        minor_faults: statistics.minor_faults,
        free_memory: statistics.free_memory,
        total_memory: statistics.total_memory,
        available_memory: statistics.available_memory,
        disk_caches: statistics.disk_caches,
        hugetlb_allocations: statistics.hugetlb_allocations,
        hugetlb_failures: statistics.hugetlb_failures,
        oom_kills: statistics.oom_kills,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use caisson_vmm_api::control::metrics::Counter;

    use super::*;

    #[test]
    fn metrics_have_the_counters_of_each_kind_of_device() {
        use DeviceMetrics as Device;
        let all = [
            (Device::Balloon(Arc::default()), "balloon", "inflated_pages"),
            (Device::Mem(Arc::default()), "mem", "plugged_bytes"),
            (Device::Rng(Arc::default()), "rng", "requests"),
            (Device::Block(Arc::default()), "block", "reads"),
            (Device::Net(Arc::default()), "net", "rx_frames"),
            (Device::Vsock(Arc::default()), "vsock", "rx_packets"),
            (Device::Fs(Arc::default()), "fs", "requests"),
        ];
        for (metrics, kind, name) in all {
            assert_eq!(of_device(&metrics).counter(kind, name), Some(&Counter::Single(0)), "{kind}");
        }
        let operations = of_device(&Device::Fs(Arc::default())).counter("fs", "operations").cloned();
        assert_eq!(operations, Some(Counter::ByName(Default::default())));
    }
}
