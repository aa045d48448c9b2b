//! A KVM probe that tells the truth.
//!
//! `/dev/kvm` that opens, and even one that answers every question, proves little: paravirtual
//! implementations exist that run small programs well and lose a Linux kernel in its first instructions. So
//! the probe looks at what the CPU offers, asks for every capability that the machine needs, and then *runs*
//! small guests that do what a kernel does (see [`GuestTest`]). It ends within a given time whatever the
//! kernel does.
//!
//! | module | owns |
//! |---|---|
//! | `guests` | the small guests: their code, their machine, their run loop |
//! | `host` | what the host says about itself: CPU flags, modules, the device node |
//!
//! ```no_run
//! let verdict = caisson_vmm::probe::probe(std::time::Duration::from_secs(5));
//! println!("{verdict}");
//! assert!(verdict.is_usable());
//! ```

mod guests;
mod host;

use std::{
    fmt, fs, io,
    os::{
        fd::{FromRawFd, IntoRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

pub use guests::{GuestFailure, GuestTest};
pub use host::{DeviceNode, HostFacts, Vendor};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::signal::{Killable, SIGRTMAX, register_signal_handler};

/// The version of the KVM interface that every kernel since 2.6.22 speaks (`KVM_API_VERSION`).
const API_VERSION: i32 = 12;

/// Memory slots that the machine needs: boot memory, and what virtio-mem plugs in pieces.
const MIN_MEMSLOTS: usize = 32;

/// How long the guest thread is given to notice that its time is up.
const GRACE: Duration = Duration::from_secs(1);

/// Every capability that the machine relies on, with the name in `linux/kvm.h` and what for.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    // What a snapshot saves.
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
];

/// What the probe found. [`Display`](fmt::Display) is one or two sentences that a person can act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Hardware virtualization, every capability, and the small guests ran as on real hardware.
    Hardware {
        /// Whose extension it is.
        vendor: Vendor,
        /// This machine is itself a guest: KVM is nested, correct but slower.
        nested: bool,
        /// KVM offers nested virtualization. Our guests are not offered it; others on this host may be.
        nested_guests: bool,
    },
    /// There is no KVM device.
    Missing {
        /// The path that was tried.
        device: PathBuf,
        /// What the host says about itself.
        host: HostFacts,
    },
    /// The device is there, but this user may not open it.
    PermissionDenied {
        /// The path that was tried.
        device: PathBuf,
        /// Who may open it.
        node: Option<DeviceNode>,
    },
    /// The device cannot be opened for another reason.
    Unopenable {
        /// The path that was tried.
        device: PathBuf,
        /// What the kernel said.
        error: String,
    },
    /// Something else than KVM answers at that path, or a KVM of another age.
    WrongApi {
        /// The path that was tried.
        device: PathBuf,
        /// What `KVM_GET_API_VERSION` returned.
        version: i32,
    },
    /// This kernel's KVM lacks what the machine needs.
    TooOld {
        /// What is missing, named as in `linux/kvm.h`.
        missing: Vec<&'static str>,
    },
    /// Another hypervisor on this host holds the CPU's virtualization extension.
    Busy,
    /// `/dev/kvm` answers, but not by hardware virtualization.
    Paravirtual {
        /// The first small guest that went wrong, if one did.
        failed: Option<(GuestTest, GuestFailure)>,
    },
    /// The CPU has the extension, yet a small guest went wrong.
    Broken {
        /// Which one.
        test: GuestTest,
        /// What happened.
        failure: GuestFailure,
    },
}

impl Verdict {
    /// Whether a Linux guest can be expected to run.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Hardware { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hardware { vendor, nested, nested_guests } => {
                let guest = if *nested {
                    ", nested: this machine is itself a virtual machine, expect guests to run slower"
                } else {
                    ""
                };
                write!(f, "KVM works ({vendor}{guest}).")?;
                if *nested_guests {
                    write!(
                        f,
                        " Warning: nested virtualization is on (nested=1), which opens more of KVM to guests than \
                         Caisson's are offered; turn it off with `options {} nested=0` in a file of /etc/modprobe.d.",
                        vendor.module()
                    )?;
                }
                Ok(())
            }
            Self::Missing { device, host } => {
                write!(f, "{} does not exist: {}", device.display(), host.why_missing())
            }
            Self::PermissionDenied { device, node: Some(node) } => {
                write!(f, "No permission to open {}: {}", device.display(), node.how_to_open())
            }
            Self::PermissionDenied { device, node: None } => {
                write!(f, "No permission to reach {}: run as root, or open up its directory.", device.display())
            }
            Self::Unopenable { device, error } => write!(f, "{} cannot be opened: {error}.", device.display()),
            Self::WrongApi { device, version } => write!(
                f,
                "{} is not the KVM device: it answers API version {version} where {API_VERSION} is expected.",
                device.display()
            ),
            Self::TooOld { missing } => write!(
                f,
                "This kernel's KVM lacks {}: a host kernel 5.10 or newer is needed.",
                missing.join(", ")
            ),
            Self::Busy => f.write_str(
                "KVM cannot start a virtual machine because another hypervisor (VirtualBox, VMware) holds the \
                 CPU's virtualization extension: stop its virtual machines or unload its kernel module.",
            ),
            Self::Paravirtual { failed } => {
                f.write_str(
                    "/dev/kvm answers, but this CPU shows neither VMX nor SVM: it is a paravirtual KVM, which \
                     cannot run an unmodified Linux guest",
                )?;
                match failed {
                    Some((test, failure)) => write!(f, " ({test}: {failure}).")?,
                    None => f.write_str(" reliably.")?,
                }
                f.write_str(
                    " Use bare metal or an instance type with nested virtualization; tests can run in the \
                     project's own testbed.",
                )
            }
            Self::Broken { test, failure } => write!(
                f,
                "The CPU has virtualization, but a small guest went wrong ({test}: {failure}): update the host's \
                 kernel and firmware; if this is a virtual machine, its hypervisor's nesting is at fault."
            ),
        }
    }
}

/// Probes `/dev/kvm`. All guests together get `timeout`; a second or so is plenty on hardware.
pub fn probe(timeout: Duration) -> Verdict {
    probe_at(Path::new("/dev/kvm"), timeout)
}

/// Probes the KVM device at another path.
///
/// Installs a handler that does nothing for the last real-time signal (`SIGRTMAX`), by which a guest that
/// does not end is interrupted.
pub fn probe_at(device: &Path, timeout: Duration) -> Verdict {
    let host = HostFacts::read();
    let kvm = match open(device) {
        Ok(kvm) => kvm,
        Err(error) => return unopenable(device, &error, host),
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Verdict::WrongApi { device: device.into(), version };
    }
    let missing = missing_capabilities(&kvm);
    if !missing.is_empty() {
        return Verdict::TooOld { missing };
    }
    judge(&host, run_guests(kvm, timeout))
}

fn open(device: &Path) -> io::Result<Kvm> {
    let file = fs::File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(device)?;
    // SAFETY: the descriptor is open and its ownership passes to `Kvm`. If it is not the KVM device, its
    // ioctls fail (the API version is asked for before anything else).
    Ok(unsafe { Kvm::from_raw_fd(file.into_raw_fd()) })
}

fn unopenable(device: &Path, error: &io::Error, host: HostFacts) -> Verdict {
    let device = device.to_path_buf();
    match (error.kind(), error.raw_os_error()) {
        // A node without a driver behind it is as good as none.
        (io::ErrorKind::NotFound, _) | (_, Some(libc::ENODEV | libc::ENXIO)) => {
            Verdict::Missing { device, host }
        }
        (io::ErrorKind::PermissionDenied, _) => {
            let node = DeviceNode::read(&device);
            Verdict::PermissionDenied { device, node }
        }
        _ => Verdict::Unopenable { device, error: error.to_string() },
    }
}

fn missing_capabilities(kvm: &Kvm) -> Vec<&'static str> {
    let lacks = |&&(cap, _): &&(Cap, &str)| !kvm.check_extension(cap);
    let mut missing: Vec<_> = REQUIRED.iter().filter(lacks).map(|&(_, name)| name).collect();
    if kvm.get_nr_memslots() < MIN_MEMSLOTS {
        missing.push("KVM_CAP_NR_MEMSLOTS (32 or more)");
    }
    missing
}

/// The first small guest that went wrong, and how.
type GuestsResult = Result<(), (GuestTest, GuestFailure)>;

/// From the facts to the verdict.
fn judge(host: &HostFacts, guests: GuestsResult) -> Verdict {
    match (host.vendor, guests) {
        (_, Err((_, GuestFailure::Busy))) => Verdict::Busy,
        // KVM proper does not load without the flag, so whatever answered is something else, even if it ran
        // the guests well.
        (None, outcome) => Verdict::Paravirtual { failed: outcome.err() },
        (Some(vendor), Ok(())) => {
            Verdict::Hardware { vendor, nested: host.under_hypervisor, nested_guests: host.nested_guests }
        }
        (Some(_), Err((test, failure))) => Verdict::Broken { test, failure },
    }
}

/// Runs every guest on a thread of its own, so that one that never ends costs `timeout` and not the caller.
fn run_guests(kvm: Kvm, timeout: Duration) -> GuestsResult {
    extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    let first = GuestTest::ALL[0];
    let setup = |error: io::Error| (first, GuestFailure::Setup { what: "thread", error: error.to_string() });
    register_signal_handler(SIGRTMAX(), interrupted).map_err(|e| setup(e.into()))?;

    let (report, reports) = mpsc::channel();
    let expired = Arc::new(AtomicBool::new(false));
    let thread = thread::Builder::new()
        .name("kvm-probe".into())
        .spawn({
            let expired = Arc::clone(&expired);
            move || {
                for test in GuestTest::ALL {
                    // The receiver may have given up: nothing is left to do then.
                    let outcome = guests::run(&kvm, test, &expired);
                    let last = outcome.is_err();
                    if report.send((test, outcome)).is_err() || last {
                        return;
                    }
                }
            }
        })
        .map_err(setup)?;

    let outcome = collect(&reports, timeout);
    if matches!(outcome, Err((_, GuestFailure::Hung))) {
        interrupt(&thread, &expired);
    } else if thread.join().is_err() {
        return Err((first, GuestFailure::Setup { what: "thread", error: "panicked".into() }));
    }
    outcome
}

/// Takes one report for each guest until one is bad or the time is up.
fn collect(
    reports: &mpsc::Receiver<(GuestTest, Result<(), GuestFailure>)>,
    timeout: Duration,
) -> GuestsResult {
    let deadline = Instant::now() + timeout;
    for test in GuestTest::ALL {
        match reports.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((test, outcome)) => outcome.map_err(|failure| (test, failure))?,
            Err(_) => return Err((test, GuestFailure::Hung)),
        }
    }
    Ok(())
}

/// Gets the thread out of `KVM_RUN`. One that is stuck in the kernel for good is left behind.
///
/// The signal is sent again and again because one that arrives just before `KVM_RUN` interrupts nothing.
fn interrupt(thread: &thread::JoinHandle<()>, expired: &AtomicBool) {
    expired.store(true, Ordering::Release);
    let deadline = Instant::now() + GRACE;
    while !thread.is_finished() && Instant::now() < deadline {
        if thread.kill(SIGRTMAX()).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests;
