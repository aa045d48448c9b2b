//! How large a pod's machine is.
//!
//! containerd adds up the pod's limits in annotations of the sandbox. The machine gets these limits plus what the
//! guest needs for itself, so that a pod can use all it was promised; the RuntimeClass's overhead has to cover the
//! latter and the VMM, so that the whole stays within the pod's control group. When limits change later, so does the
//! machine: [`Demand`] says what the pod asks for by then.

mod demand;

pub use demand::{Change, Demand, Limits};
use serde::{Deserialize, Serialize};

/// Annotation: the sum of the containers' memory limits, in bytes. 0: at least one has none.
pub const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Annotation: the processor time that the pod may use in one period, in microseconds. 0 or less: no limit.
pub const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Annotation: the length of a period, in microseconds.
pub const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

const MIB: u64 = 1 << 20;
/// Memory is plugged in steps of so many MiB: what Linux can take out again at the least.
const STEP_MIB: u64 = 4;
/// What can be plugged in all comes in multiples of so many MiB: a memory block of Linux's.
const BLOCK_MIB: u64 = 128;
/// The memory in MiB that machines from templates begin with, beside what the node gives to pods without a limit. The steps
/// are small where most pods are: what a pod needs beyond one is plugged, and costs its guest as much as at a boot.
const CLASSES_MIB: [u64; 15] =
    [96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192];
/// Machines larger than their class by this factor are rather booted.
const MOST_OF_CLASS: u64 = 2;
/// One processor's time in a second, in microseconds.
const PROCESSOR: u64 = 1_000_000;

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
    /// vCPUs that a pod with fewer can grow to in place.
    pub growth_vcpus: u8,
    /// Memory in MiB that a pod can get in place beyond what it began with.
    pub growth_memory_mib: u64,
}

/// A machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Virtual processors, at least 1.
    pub vcpus: u8,
    /// Guest memory in MiB, the guest's own needs included.
    pub memory_mib: u64,
}

impl Size {
    /// The larger of both in each respect.
    pub fn or_larger(self, other: Size) -> Size {
        Size { vcpus: self.vcpus.max(other.vcpus), memory_mib: self.memory_mib.max(other.memory_mib) }
    }
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
    /// More memory than the machine was made for.
    #[error("a machine of {asked_mib} MiB: it was made to grow to {max_mib} MiB (sizing.growth_memory_mib)")]
    BeyondGrowth {
        /// What was asked for, with the guest's own.
        asked_mib: u64,
        /// What it can become.
        max_mib: u64,
    },
}

/// What a machine is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Its size at first.
    pub boot: Size,
    /// The vCPUs that it can have later.
    pub max_vcpus: u8,
    /// The memory in MiB that can be plugged beyond what it has at first.
    pub hotplug_mib: u64,
}

/// What a machine is asked to change to, for it to have another size than at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// vCPUs that are to run.
    pub vcpus: u8,
    /// Memory to be plugged, in MiB.
    pub plugged_mib: u64,
    /// Memory to be given back by the balloon, in MiB: a machine can't lose what it booted with in another way.
    pub balloon_mib: u64,
}

impl Policy {
    /// The size of a machine for a pod that asks for this.
    ///
    /// # Errors
    /// For more memory than a pod may have.
    pub fn size(&self, demand: &Demand) -> Result<Size, SizingError> {
        let limits = demand.limits();
        let (open_memory, open_cpu) = demand.is_open();
        let vcpus = u8::try_from(limits.cpu.div_ceil(PROCESSOR)).unwrap_or(u8::MAX);
        // What has no limit has the default, or all that those with limits may use.
        let vcpus = if open_cpu { vcpus.max(self.default_vcpus) } else { vcpus };
        // Rounded up: a pod must be able to use all that it was promised.
        let memory_mib = limits.memory.div_ceil(MIB);
        let asked_mib = if open_memory { memory_mib.max(self.default_memory_mib) } else { memory_mib };
        if asked_mib > self.max_memory_mib {
            return Err(SizingError::TooMuchMemory { asked_mib, max_mib: self.max_memory_mib });
        }
        Ok(Size {
            vcpus: vcpus.min(self.max_vcpus).max(1),
            memory_mib: asked_mib.saturating_add(self.guest_overhead_mib),
        })
    }

    /// How a template is made for machines of this size: one that many sizes share, and which can become of this size.
    /// `None`: for a size that no template comes near.
    pub fn template(&self, size: Size) -> Option<Shape> {
        let default_mib = self.default_memory_mib.saturating_add(self.guest_overhead_mib);
        let classes = || CLASSES_MIB.into_iter().chain([default_mib]);
        let class = classes().filter(|class| *class <= size.memory_mib).max()?;
        if size.memory_mib > class.saturating_mul(MOST_OF_CLASS) {
            return None;
        }
        // The largest of the class can grow as much as it could if it were booted.
        let above = classes().filter(|above| *above > class).min();
        let largest = Size { memory_mib: above.unwrap_or(class.saturating_mul(MOST_OF_CLASS)), ..size };
        let most_mib = self
            .max_memory_mib
            .saturating_add(self.guest_overhead_mib)
            .min(largest.memory_mib.saturating_add(self.growth_memory_mib));
        Some(Shape {
            boot: Size { vcpus: 1, memory_mib: class },
            max_vcpus: self
                .growth_vcpus
                .max(size.vcpus.checked_next_power_of_two()?)
                .min(self.max_vcpus)
                .max(1),
            hotplug_mib: most_mib.saturating_sub(class).next_multiple_of(BLOCK_MIB),
        })
    }

    /// How a machine of this size is made, so that it can become another.
    pub fn shape(&self, boot: Size) -> Shape {
        let most_mib = self.max_memory_mib.saturating_add(self.guest_overhead_mib);
        let growth_mib = most_mib.saturating_sub(boot.memory_mib).min(self.growth_memory_mib);
        Shape {
            boot,
            max_vcpus: self.growth_vcpus.min(self.max_vcpus).max(boot.vcpus),
            hotplug_mib: growth_mib.next_multiple_of(BLOCK_MIB),
        }
    }
}

impl Shape {
    /// How to get to another size, with as many of its vCPUs as the machine can have.
    ///
    /// # Errors
    /// For more memory than it can have.
    pub fn target(&self, size: Size) -> Result<Target, SizingError> {
        let max_mib = self.boot.memory_mib.saturating_add(self.hotplug_mib);
        if size.memory_mib > max_mib {
            return Err(SizingError::BeyondGrowth { asked_mib: size.memory_mib, max_mib });
        }
        let beyond = size.memory_mib.saturating_sub(self.boot.memory_mib);
        Ok(Target {
            vcpus: size.vcpus.min(self.max_vcpus),
            plugged_mib: beyond.next_multiple_of(STEP_MIB).min(self.hotplug_mib),
            balloon_mib: self.boot.memory_mib.saturating_sub(size.memory_mib),
        })
    }
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
        growth_vcpus: 4,
        growth_memory_mib: 4096,
    };

    fn size(pairs: &[(&str, &str)]) -> Result<Size, SizingError> {
        let annotations = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        POLICY.size(&Demand::new(Change::of_annotations(&annotations.collect())?.apply(Limits::default())))
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_default() {
        assert_eq!(size(&[]), Ok(Size { vcpus: 1, memory_mib: 160 }));
        let unlimited = [(MEMORY, "0"), (CPU_QUOTA, "-1"), (CPU_PERIOD, "100000")];
        assert_eq!(size(&unlimited), Ok(Size { vcpus: 1, memory_mib: 160 }));
    }

    #[test]
    fn containers_with_limits_beside_one_without_can_use_theirs() {
        let mut demand = Demand::default();
        demand.add("a", "1", Limits { memory: 100 * MIB, cpu: 500_000 });
        assert_eq!(POLICY.size(&demand), Ok(Size { vcpus: 1, memory_mib: 160 }));
        demand.add("b", "2", Limits { memory: 100 * MIB, cpu: 1_000_000 });
        assert_eq!(POLICY.size(&demand), Ok(Size { vcpus: 2, memory_mib: 232 }));
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
        for (name, value) in [(MEMORY, "-1"), (MEMORY, "1Gi"), (CPU_QUOTA, "x"), (CPU_PERIOD, "")] {
            assert!(matches!(size(&[(name, value)]), Err(SizingError::Number { .. })), "{name}={value}");
        }
    }

    #[test]
    fn a_machine_grows_by_plugging_and_shrinks_below_its_first_size_by_its_balloon() {
        let shape = POLICY.shape(Size { vcpus: 1, memory_mib: 160 });
        assert_eq!((shape.max_vcpus, shape.hotplug_mib), (4, 3968));
        let target = |vcpus, memory_mib| {
            let target = shape.target(Size { vcpus, memory_mib }).unwrap();
            (target.vcpus, target.plugged_mib, target.balloon_mib)
        };
        assert_eq!(target(1, 160), (1, 0, 0));
        assert_eq!(target(3, 261), (3, 104, 0));
        assert_eq!(target(9, 100), (4, 0, 60));
        let small = Policy { growth_memory_mib: 256, ..POLICY }.shape(Size { vcpus: 1, memory_mib: 160 });
        let refused = SizingError::BeyondGrowth { asked_mib: 417, max_mib: 416 };
        assert_eq!(small.target(Size { vcpus: 1, memory_mib: 417 }), Err(refused));
    }

    #[test]
    fn template_classes_are_few_and_the_nodes_default_is_one() {
        let template =
            |memory_mib| POLICY.template(Size { vcpus: 1, memory_mib }).map(|shape| shape.boot.memory_mib);
        assert_eq!(template(160), Some(160), "the default");
        assert_eq!((template(191), template(192), template(255)), (Some(160), Some(192), Some(192)));
        assert_eq!((template(95), template(16384), template(16385)), (None, Some(8192), None));
        let odd = Policy { default_memory_mib: 1000, ..POLICY };
        assert_eq!(odd.template(Size { vcpus: 1, memory_mib: 1032 }).unwrap().boot.memory_mib, 1032);
        let vcpus = |vcpus| POLICY.template(Size { vcpus, memory_mib: 160 }).unwrap().max_vcpus;
        assert_eq!((vcpus(1), vcpus(4), vcpus(5)), (4, 4, 8));
    }

    proptest! {
        #[test]
        fn template_becomes_what_a_boot_would_and_grows_as_far(first in 65..=4096u64, then in 1..=4096u64, vcpus in 1..=8u8) {
            let of = |mib| Size { vcpus, memory_mib: mib + POLICY.guest_overhead_mib };
            for policy in [POLICY, Policy { growth_memory_mib: 100, ..POLICY }] {
                let (booted, template) = (policy.shape(of(first)), policy.template(of(first)).unwrap());
                prop_assert!(template.boot.vcpus == 1 && template.boot.memory_mib <= of(first).memory_mib);
                let now = template.target(of(first)).unwrap();
                prop_assert_eq!((now.vcpus, now.balloon_mib), (vcpus, 0));
                let missing = of(first).memory_mib - template.boot.memory_mib;
                prop_assert!(now.plugged_mib >= missing && now.plugged_mib < missing + STEP_MIB);
                if booted.target(of(then)).is_ok() {
                    prop_assert!(template.target(of(then)).is_ok());
                }
            }
        }

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

        #[test]
        fn every_size_that_a_pod_may_have_is_in_reach(first in 1..=4096u64, then in 1..=4096u64) {
            let of = |mib| Size { vcpus: 1, memory_mib: mib + POLICY.guest_overhead_mib };
            let shape = POLICY.shape(of(first));
            let target = shape.target(of(then)).unwrap();
            let reached = shape.boot.memory_mib + target.plugged_mib - target.balloon_mib;
            prop_assert!(reached >= of(then).memory_mib && reached < of(then).memory_mib + STEP_MIB);
        }
    }
}
