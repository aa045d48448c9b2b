//! How large a pod's machine is.
//!
//! containerd adds up the pod's limits in annotations of the sandbox. The machine gets these limits plus what the
//! guest needs for itself, so that a pod can use all it was promised; the RuntimeClass's overhead has to cover the
//! latter and the VMM, so that the whole stays within the pod's control group.

use std::collections::HashMap;
use std::str::FromStr;

use serde::Deserialize;

/// Annotation: the sum of the containers' memory limits, in bytes. 0: at least one has none.
pub const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Annotation: the processor time that the pod may use in one period, in microseconds. 0 or less: no limit.
pub const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Annotation: the length of a period, in microseconds.
pub const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

const MIB: u64 = 1 << 20;
/// The kernel's default for the period (CFS bandwidth control), in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// What a node allows, and gives to pods that do not ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// vCPUs of a pod without a limit.
    pub default_vcpus: u8,
    /// The most vCPUs a pod gets; a larger limit is cut to it, since it grants time, not processors.
    pub max_vcpus: u8,
    /// Memory of a pod without a limit, in MiB, without the guest's own.
    pub default_memory_mib: u64,
    /// The most memory a pod gets, in MiB, without the guest's own; a larger limit is refused.
    pub max_memory_mib: u64,
    /// What the guest's kernel and agent need for themselves, in MiB.
    pub guest_overhead_mib: u64,
}

/// A machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors, at least 1.
    pub vcpus: u8,
    /// Guest memory in MiB, the guest's own needs included.
    pub memory_mib: u64,
}

/// Why a pod cannot be sized.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizingError {
    /// An annotation that is no number of its range.
    #[error("annotation {name}: {value:?} is not a number that makes sense here")]
    Number {
        /// The annotation.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// More memory than the node gives to one pod.
    #[error("a pod of {asked_mib} MiB: this node gives at most {max_mib} MiB to one pod")]
    TooMuchMemory {
        /// What was asked for.
        asked_mib: u64,
        /// What is allowed.
        max_mib: u64,
    },
}

impl Policy {
    /// The size of a pod's machine, from the annotations of its sandbox.
    ///
    /// # Errors
    /// For annotations that are no numbers, and for more memory than a pod may have.
    pub fn size(&self, annotations: &HashMap<String, String>) -> Result<Size, SizingError> {
        let memory: u64 = number(annotations, MEMORY)?.unwrap_or(0);
        let quota: i64 = number(annotations, CPU_QUOTA)?.unwrap_or(0);
        let period: u64 = number(annotations, CPU_PERIOD)?.unwrap_or(DEFAULT_PERIOD);
        Ok(Size { vcpus: self.vcpus(quota, period)?, memory_mib: self.memory_mib(memory)? })
    }

    /// As many processors as it takes to use up the quota: one can use no more than one period in each.
    fn vcpus(&self, quota: i64, period: u64) -> Result<u8, SizingError> {
        if period == 0 {
            return Err(SizingError::Number { name: CPU_PERIOD, value: period.to_string() });
        }
        let wanted = match u64::try_from(quota) {
            Ok(quota) if quota > 0 => u8::try_from(quota.div_ceil(period)).unwrap_or(u8::MAX),
            _ => self.default_vcpus,
        };
        Ok(wanted.min(self.max_vcpus).max(1))
    }

    /// Rounded up to whole MiB: a pod must be able to use all that it was promised.
    fn memory_mib(&self, limit: u64) -> Result<u64, SizingError> {
        let asked_mib = if limit == 0 { self.default_memory_mib } else { limit.div_ceil(MIB) };
        if asked_mib > self.max_memory_mib {
            return Err(SizingError::TooMuchMemory { asked_mib, max_mib: self.max_memory_mib });
        }
        Ok(asked_mib.saturating_add(self.guest_overhead_mib))
    }
}

fn number<T: FromStr>(
    annotations: &HashMap<String, String>,
    name: &'static str,
) -> Result<Option<T>, SizingError> {
    let parse = |value: &String| {
        value.parse().map_err(|_| SizingError::Number { name, value: value.chars().take(64).collect() })
    };
    annotations.get(name).map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: Policy = Policy {
        default_vcpus: 1,
        max_vcpus: 8,
        default_memory_mib: 128,
        max_memory_mib: 4096,
        guest_overhead_mib: 32,
    };

    fn size(pairs: &[(&str, &str)]) -> Result<Size, SizingError> {
        POLICY.size(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_default() {
        assert_eq!(size(&[]), Ok(Size { vcpus: 1, memory_mib: 160 }));
        let unlimited = [(MEMORY, "0"), (CPU_QUOTA, "-1"), (CPU_PERIOD, "100000")];
        assert_eq!(size(&unlimited), Ok(Size { vcpus: 1, memory_mib: 160 }));
    }

    #[test]
    fn fractions_round_up() {
        let asked = [(MEMORY, "104857601"), (CPU_QUOTA, "150000"), (CPU_PERIOD, "100000")];
        assert_eq!(size(&asked), Ok(Size { vcpus: 2, memory_mib: 101 + 32 }));
        assert_eq!(size(&[(CPU_QUOTA, "100000")]).unwrap().vcpus, 1);
        assert_eq!(size(&[(CPU_QUOTA, "100001")]).unwrap().vcpus, 2);
    }

    #[test]
    fn processors_are_cut_but_memory_is_refused() {
        assert_eq!(size(&[(CPU_QUOTA, &i64::MAX.to_string()), (CPU_PERIOD, "1")]).unwrap().vcpus, 8);
        let refused = SizingError::TooMuchMemory { asked_mib: 4097, max_mib: 4096 };
        assert_eq!(size(&[(MEMORY, &(4096 * MIB + 1).to_string())]), Err(refused));
    }

    #[test]
    fn nonsense_is_an_error() {
        for (name, value) in
            [(MEMORY, "-1"), (MEMORY, "1Gi"), (CPU_QUOTA, "x"), (CPU_PERIOD, "0"), (CPU_PERIOD, "")]
        {
            assert!(matches!(size(&[(name, value)]), Err(SizingError::Number { .. })), "{name}={value}");
        }
    }

    proptest! {
        #[test]
        fn a_pod_has_what_it_was_promised(memory in 1..=4096 * MIB, quota in 1i64..2_000_000, period in 1000u64..1_000_000) {
            let size = size(&[
                (MEMORY, &memory.to_string()),
                (CPU_QUOTA, &quota.to_string()),
                (CPU_PERIOD, &period.to_string()),
            ]).unwrap();
            prop_assert!((size.memory_mib - POLICY.guest_overhead_mib) * MIB >= memory);
            prop_assert!(size.vcpus == 8 || u64::from(size.vcpus) * period >= quota.unsigned_abs());
        }
    }
}
