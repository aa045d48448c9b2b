//! What the host says about itself.

use std::{
    arch::x86_64::{__cpuid, __get_cpuid_max},
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::unistd::{Gid, Group, Uid, User};

/// The maker of a CPU's virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

impl Vendor {
    /// The kernel module that drives it.
    pub(super) fn module(self) -> &'static str {
        match self {
            Self::Vmx => "kvm_intel",
            Self::Svm => "kvm_amd",
        }
    }

    /// Its flag in `/proc/cpuinfo`.
    fn flag(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "Intel VT-x",
            Self::Svm => "AMD-V",
        })
    }
}

/// What can be learnt about virtualization without touching `/dev/kvm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// The extension that the CPU reports by CPUID.
    pub vendor: Option<Vendor>,
    /// The kernel lists the extension in `/proc/cpuinfo`; it hides one that the firmware locked.
    pub kernel_lists_it: bool,
    /// The machine runs under a hypervisor (CPUID leaf 1, ECX bit 31).
    pub under_hypervisor: bool,
    /// The KVM module for this CPU is loaded or built in.
    pub module_present: bool,
    /// KVM offers nested virtualization to guests that are offered it (the module's parameter `nested`).
    pub nested_guests: bool,
}

impl HostFacts {
    /// Reads them all. What cannot be read counts as absent.
    pub fn read() -> Self {
        let vendor = cpuid_vendor();
        let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            vendor,
            kernel_lists_it: vendor.is_some_and(|v| lists_flag(&flags, v.flag())),
            under_hypervisor: __cpuid(1).ecx & (1 << 31) != 0,
            module_present: vendor.is_some_and(|v| Path::new("/sys/module").join(v.module()).exists()),
            nested_guests: vendor.is_some_and(|v| offers_nested(&Path::new("/sys/module").join(v.module()))),
        }
    }

    /// Why there is no `/dev/kvm`, and what to do.
    pub(super) fn why_missing(&self) -> String {
        match self.vendor {
            None if self.under_hypervisor => {
                "this machine is a virtual machine without nested virtualization; \
                turn that on in its hypervisor, or choose an instance type that has it."
                    .into()
            }
            None => {
                "the CPU offers no virtualization (VT-x or AMD-V); turn it on in the firmware (BIOS) setup \
                if the CPU has it."
                    .into()
            }
            Some(vendor) if !self.kernel_lists_it => {
                format!(
                    "{vendor} is locked by the firmware; turn virtualization on in the firmware (BIOS) setup."
                )
            }
            Some(vendor) if !self.module_present => {
                format!("load the kernel module with `modprobe {}`.", vendor.module())
            }
            Some(vendor) => format!(
                "the module {} is loaded, so only the device node is missing; in a container, pass the device \
                 in (`--device /dev/kvm`); on a host, start udev or run `mknod /dev/kvm c 10 232`.",
                vendor.module()
            ),
        }
    }
}

/// Whether the KVM module in this directory of sysfs is told to offer nested virtualization: 1 or Y, by its version.
fn offers_nested(module: &Path) -> bool {
    let parameter = fs::read_to_string(module.join("parameters/nested")).unwrap_or_default();
    matches!(parameter.trim(), "1" | "Y")
}

/// Intel SDM vol. 2A, CPUID leaf 1, ECX bit 5 (VMX); AMD APM vol. 3, leaf 8000_0001h, ECX bit 2 (SVM).
fn cpuid_vendor() -> Option<Vendor> {
    const EXTENDED: u32 = 0x8000_0001;
    if __cpuid(1).ecx & (1 << 5) != 0 {
        return Some(Vendor::Vmx);
    }
    let has_extended = __get_cpuid_max(0x8000_0000).0 >= EXTENDED;
    (has_extended && __cpuid(EXTENDED).ecx & (1 << 2) != 0).then_some(Vendor::Svm)
}

/// Whether the first CPU of a `/proc/cpuinfo` text has a flag.
pub(super) fn lists_flag(cpuinfo: &str, flag: &str) -> bool {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags").and_then(|rest| rest.trim_start().strip_prefix(':')))
        .is_some_and(|flags| flags.split_ascii_whitespace().any(|f| f == flag))
}

/// Who may open a device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// The owner's name, or number if it has none.
    pub owner: String,
    /// The group's name, or number if it has none.
    pub group: String,
    /// The permission bits, as in stat(2).
    pub mode: u32,
    /// Who asked.
    pub user: String,
}

impl DeviceNode {
    /// Reads it, or `None` when the node cannot be looked at.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self {
            owner: user_name(Uid::from_raw(meta.uid())),
            group: group_name(Gid::from_raw(meta.gid())),
            mode: meta.mode() & 0o777,
            user: user_name(Uid::effective()),
        })
    }

    /// What to do to be let in.
    pub(super) fn how_to_open(&self) -> String {
        let Self { owner, group, mode, user } = self;
        let root_group = group == "root" || group == "0";
        if mode & 0o060 == 0o060 && !root_group {
            format!("add {user} to the group {group} (`usermod -aG {group} {user}`) and log in again.")
        } else {
            format!(
                "its mode is {mode:04o}, owner {owner}, group {group}; run as {owner}, or let {user} in with \
                 `setfacl -m u:{user}:rw /dev/kvm`."
            )
        }
    }
}

fn user_name(uid: Uid) -> String {
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

fn group_name(gid: Gid) -> String {
    Group::from_gid(gid).ok().flatten().map_or_else(|| gid.to_string(), |group| group.name)
}
