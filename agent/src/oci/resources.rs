//! `linux.resources`: control group limits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::null_default;

/// Control group limits. What is absent stays as it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Resources {
    /// Device access rules; the last one that matches decides.
    #[serde(deserialize_with = "null_default")]
    pub devices: Vec<DeviceRule>,
    pub memory: Option<Memory>,
    pub cpu: Option<Cpu>,
    pub pids: Option<Pids>,
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    #[serde(deserialize_with = "null_default")]
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Classic network classes and priorities have no cgroup v2 counterpart; refused when set.
    pub network: Option<Network>,
    #[serde(deserialize_with = "null_default")]
    pub rdma: BTreeMap<String, Rdma>,
    /// Files of the control group and what is written to them, verbatim and last.
    #[serde(deserialize_with = "null_default")]
    pub unified: BTreeMap<String, String>,
}

/// A device access rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Whether access is given or taken.
    pub allow: bool,
    /// "a", "c" or "b"; absent: "a".
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Absent or -1: all.
    pub major: Option<i64>,
    /// Absent or -1: all.
    pub minor: Option<i64>,
    /// Any of "r", "w", "m"; absent: all.
    pub access: Option<String>,
}

/// Memory, in bytes; -1 is unlimited.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
    pub kernel: Option<i64>,
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: Option<i64>,
    pub swappiness: Option<u64>,
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: Option<bool>,
    pub use_hierarchy: Option<bool>,
    pub check_before_update: Option<bool>,
}

/// CPU time and placement.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
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

/// Number of tasks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// 0 or less: unlimited; absent: as it is.
    pub limit: Option<i64>,
}

/// Block device I/O.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct BlockIo {
    pub weight: Option<u16>,
    pub leaf_weight: Option<u16>,
    #[serde(deserialize_with = "null_default")]
    pub weight_device: Vec<WeightDevice>,
    #[serde(deserialize_with = "null_default")]
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    #[serde(deserialize_with = "null_default")]
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleReadIOPSDevice", deserialize_with = "null_default")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteIOPSDevice", deserialize_with = "null_default")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

/// Weight of one block device.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct WeightDevice {
    pub major: u32,
    pub minor: u32,
    pub weight: Option<u16>,
    pub leaf_weight: Option<u16>,
}

/// Rate limit of one block device.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct ThrottleDevice {
    pub major: u32,
    pub minor: u32,
    /// Bytes or operations a second; 0: unlimited.
    pub rate: u64,
}

/// Limit of huge pages of one size.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HugepageLimit {
    /// "2MB", "1GB".
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// cgroup v1 network controllers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Network {
    #[serde(rename = "classID")]
    pub class_id: Option<u32>,
    #[serde(deserialize_with = "null_default")]
    pub priorities: Vec<serde_json::Value>,
}

/// RDMA limits of one device.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the specification.
pub struct Rdma {
    pub hca_handles: Option<u32>,
    pub hca_objects: Option<u32>,
}
