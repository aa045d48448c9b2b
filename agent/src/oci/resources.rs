//! `linux.resources`: control group limits.

use std::collections::BTreeMap;

use super::json::{self, ParseError, members};

/// Control group limits. What is absent stays as it is.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Resources {
    /// Device access rules; the last one that matches decides.
    pub devices: Vec<DeviceRule>,
    pub memory: Option<Memory>,
    pub cpu: Option<Cpu>,
    pub pids: Option<Pids>,
    pub block_io: Option<BlockIo>,
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Classic network classes and priorities have no cgroup v2 counterpart; refused when set.
    pub network: Option<Network>,
    pub rdma: BTreeMap<String, Rdma>,
    /// Files of the control group and what is written to them, verbatim and last.
    pub unified: BTreeMap<String, String>,
}

members! { Resources {
    "devices": devices, "memory": memory, "cpu": cpu, "pids": pids, "blockIO": block_io,
    "hugepageLimits": hugepage_limits, "network": network, "rdma": rdma, "unified": unified,
} }

impl Resources {
    /// A `resources` object.
    ///
    /// # Errors
    /// When it is not JSON, or a member has a type that the specification does not allow.
    pub fn from_json(text: &[u8]) -> Result<Resources, ParseError> {
        json::parse("linux.resources", text)
    }
}

/// A device access rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRule {
    /// Whether access is given or taken.
    pub allow: bool,
    /// "a", "c" or "b"; absent: "a".
    pub kind: Option<String>,
    /// Absent or -1: all.
    pub major: Option<i64>,
    /// Absent or -1: all.
    pub minor: Option<i64>,
    /// Any of "r", "w", "m"; absent: all.
    pub access: Option<String>,
}

members! { DeviceRule { "allow": allow, "type": kind, "major": major, "minor": minor, "access": access } }

/// Memory, in bytes; -1 is unlimited.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
    pub kernel: Option<i64>,
    pub kernel_tcp: Option<i64>,
    pub swappiness: Option<u64>,
    pub disable_oom_killer: Option<bool>,
    pub use_hierarchy: Option<bool>,
    pub check_before_update: Option<bool>,
}

members! { Memory {
    "limit": limit, "reservation": reservation, "swap": swap, "kernel": kernel, "kernelTCP": kernel_tcp,
    "swappiness": swappiness, "disableOOMKiller": disable_oom_killer, "useHierarchy": use_hierarchy,
    "checkBeforeUpdate": check_before_update,
} }

/// CPU time and placement.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Cpu {
    /// cgroup v1 shares, 2 to 262,144; 0 is unset.
    pub shares: Option<u64>,
    /// Microseconds a period, 0 or less: unlimited.
    pub quota: Option<i64>,
    pub burst: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
    pub realtime_runtime: Option<i64>,
    pub realtime_period: Option<u64>,
    pub cpus: String,
    pub mems: String,
    pub idle: Option<i64>,
}

members! { Cpu {
    "shares": shares, "quota": quota, "burst": burst, "period": period, "realtimeRuntime": realtime_runtime,
    "realtimePeriod": realtime_period, "cpus": cpus, "mems": mems, "idle": idle,
} }

/// Number of tasks.
#[derive(Clone, Debug, Default)]
pub struct Pids {
    /// 0 or less: unlimited; absent: as it is.
    pub limit: Option<i64>,
}

members! { Pids { "limit": limit } }

/// Block device I/O.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct BlockIo {
    pub weight: Option<u16>,
    pub leaf_weight: Option<u16>,
    pub weight_device: Vec<WeightDevice>,
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

members! { BlockIo {
    "weight": weight, "leafWeight": leaf_weight, "weightDevice": weight_device,
    "throttleReadBpsDevice": throttle_read_bps_device, "throttleWriteBpsDevice": throttle_write_bps_device,
    "throttleReadIOPSDevice": throttle_read_iops_device,
    "throttleWriteIOPSDevice": throttle_write_iops_device,
} }

/// Weight of one block device.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct WeightDevice {
    pub major: u32,
    pub minor: u32,
    pub weight: Option<u16>,
    pub leaf_weight: Option<u16>,
}

members! { WeightDevice { "major": major, "minor": minor, "weight": weight, "leafWeight": leaf_weight } }

/// Rate limit of one block device.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct ThrottleDevice {
    pub major: u32,
    pub minor: u32,
    /// Bytes or operations a second; 0: unlimited.
    pub rate: u64,
}

members! { ThrottleDevice { "major": major, "minor": minor, "rate": rate } }

/// Limit of huge pages of one size.
#[derive(Clone, Debug, Default)]
pub struct HugepageLimit {
    /// "2MB", "1GB".
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

members! { HugepageLimit { "pageSize": page_size, "limit": limit } }

/// cgroup v1 network controllers.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Network {
    pub class_id: Option<u32>,
    pub priorities: Vec<serde_json::Value>,
}

members! { Network { "classID": class_id, "priorities": priorities } }

/// RDMA limits of one device.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Rdma {
    pub hca_handles: Option<u32>,
    pub hca_objects: Option<u32>,
}

members! { Rdma { "hcaHandles": hca_handles, "hcaObjects": hca_objects } }
