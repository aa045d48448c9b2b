//! The tables: which calls each kind of thread makes, and why.

use super::Thread;

/// What has to be so about a call's arguments. Only their lower 32 bits are looked at, which is all that
/// these have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Nothing.
    Any,
    /// An argument is one of these.
    OneOf { argument: u8, values: &'static [u64] },
    /// An argument has none of these bits.
    Without { argument: u8, bits: u64 },
}

/// A system call, by its number.
pub(super) type Call = (i64, Check);

/// Any arguments.
const fn any(number: i64) -> Call {
    (number, Check::Any)
}

/// ioctl(2) with one of these requests.
const fn ioctl(requests: &'static [u64]) -> Call {
    (libc::SYS_ioctl, Check::OneOf { argument: 1, values: requests })
}

/// No new memory is executable, and none becomes it.
const MMAP: Call = (libc::SYS_mmap, Check::Without { argument: 2, bits: EXECUTE });
const MPROTECT: Call = (libc::SYS_mprotect, Check::Without { argument: 2, bits: EXECUTE });
const EXECUTE: u64 = libc::PROT_EXEC as u64;

/// Looking at a descriptor, and making another one for the same thing. (Debug builds of the standard library
/// look at each one that they close.)
const FCNTL: Call = (
    libc::SYS_fcntl,
    Check::OneOf {
        argument: 1,
        values: &[
            libc::F_GETFD as u64,
            libc::F_GETFL as u64,
            libc::F_SETFL as u64,
            libc::F_DUPFD_CLOEXEC as u64,
        ],
    },
);

/// Only pairs of unix sockets, of which one end is passed on.
const SOCKET_PAIR: Call =
    (libc::SYS_socketpair, Check::OneOf { argument: 0, values: &[libc::AF_UNIX as u64] });

/// What the main thread is told not to exist, as whoever asks can do without it. It has to be in the list of
/// what passes, too: both filters see a call, and the stricter answer wins.
pub(super) const REFUSED: &[i64] = &[
    // The C library makes threads by it, and falls back to clone, whose flags are where a filter sees them.
    libc::SYS_clone3,
    // A controller names a file by its path: it has to hand over a descriptor, and learns that from the
    // error.
    libc::SYS_openat,
    // A socket in the host's view is removed by the parent outside; whoever made it tries in vain.
    libc::SYS_unlink,
    // A guest dials a port, and the machine was set up to find it by a path: that is a refused connection,
    // and no reason to end. Ports are found by a descriptor here.
    libc::SYS_socket,
];

/// Only threads, as the C library makes them: not processes, and not in other namespaces.
const CLONE: Call = (libc::SYS_clone, Check::OneOf { argument: 0, values: &[THREAD_FLAGS] });
#[allow(clippy::cast_sign_loss, reason = "flags, all of them positive")]
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// A new thread names itself, and installs its own filter.
const PRCTL: Call = (
    libc::SYS_prctl,
    Check::OneOf {
        argument: 0,
        values: &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64, PR_SET_VMA],
    },
);
/// The C library names the memory of its heaps.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// SECCOMP_SET_MODE_FILTER
const SECCOMP: Call = (libc::SYS_seccomp, Check::OneOf { argument: 0, values: &[1] });

/// Requests of `linux/kvm.h` that a processor's thread makes: running it, and reading and setting its state.
const VCPU_IOCTLS: &[u64] = &[
    0xae80,      // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x8400_ae8e, // KVM_GET_LAPIC
    0x4400_ae8f, // KVM_SET_LAPIC
    0x4008_ae90, // KVM_SET_CPUID2
    0xc008_ae91, // KVM_GET_CPUID2
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x4040_aea0, // KVM_SET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x4080_aea2, // KVM_SET_DEBUGREGS
    0xaea2,      // KVM_SET_TSC_KHZ
    0xaea3,      // KVM_GET_TSC_KHZ
    0x9000_aea4, // KVM_GET_XSAVE
    0x5000_aea5, // KVM_SET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0x4188_aea7, // KVM_SET_XCRS
    0xaead,      // KVM_KVMCLOCK_CTRL
    0x9000_aecf, // KVM_GET_XSAVE2
];

/// Requests that the main thread makes besides: those of processors that it saves and starts, of the virtual
/// machine, and of taps.
const VM_IOCTLS: &[u64] = &[
    0xae03,      // KVM_CHECK_EXTENSION
    0xc004_ae02, // KVM_GET_MSR_INDEX_LIST
    0xc008_ae05, // KVM_GET_SUPPORTED_CPUID
    0xae41,      // KVM_CREATE_VCPU
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x8030_ae7c, // KVM_GET_CLOCK
    0x4030_ae7b, // KVM_SET_CLOCK
    0xc208_ae62, // KVM_GET_IRQCHIP
    0x8208_ae63, // KVM_SET_IRQCHIP
    0x8004_54d2, // TUNGETIFF
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x5421,      // FIONBIO
];

/// What every thread of a Rust program on the C library does: memory, locks, time, signals, its end.
const COMMON: &[Call] = &[
    any(libc::SYS_futex),
    any(libc::SYS_sched_yield), // the standard library's channels, when they are contended
    // Where the host's clock is one that the vDSO cannot read (HPET, ACPI), it asks the kernel.
    any(libc::SYS_clock_gettime),
    any(libc::SYS_brk),
    MMAP,
    MPROTECT,
    any(libc::SYS_munmap),
    any(libc::SYS_mremap), // a list that grows past 128 KiB, such as a disk's completions: a guest can cause it
    any(libc::SYS_madvise),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_poll), // whether the log takes more, or the console
    any(libc::SYS_close),
    FCNTL,
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

/// A processor's thread. It also brings up devices, as the driver's write of DRIVER_OK arrives on it.
const VCPU: &[Call] = &[
    ioctl(VCPU_IOCTLS),
    ioctl(VM_IOCTLS),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_timerfd_settime),
    // A driver resets its disk, and what is on its way has to end before its memory is given back.
    any(libc::SYS_io_uring_enter),
];

/// The main thread, for devices: what a guest can have it do.
const DEVICES: &[Call] = &[
    ioctl(VCPU_IOCTLS),
    ioctl(VM_IOCTLS),
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_timerfd_settime),
    // Net, vsock, block, rng.
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_socket), // "does not exist", see REFUSED
    SOCKET_PAIR,
    any(libc::SYS_accept4),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_shutdown),
    any(libc::SYS_io_uring_enter),
    any(libc::SYS_getrandom),
    // Kicking other threads.
    any(libc::SYS_gettid),
    any(libc::SYS_getpid),
    any(libc::SYS_tgkill),
];

/// The main thread, for its controller: what plugging devices, adding processors and saving the machine
/// takes.
const CONTROL: &[Call] = &[
    any(libc::SYS_eventfd2),
    any(libc::SYS_timerfd_create),
    any(libc::SYS_fstat),
    any(libc::SYS_statx),
    any(libc::SYS_lseek),
    any(libc::SYS_ftruncate),
    any(libc::SYS_mincore),
    any(libc::SYS_sysinfo),
    any(libc::SYS_unlink), // "does not exist", see REFUSED
    any(libc::SYS_openat), // "does not exist", see REFUSED
    // Starting threads.
    CLONE,
    any(libc::SYS_clone3), // "does not exist", see REFUSED
    any(libc::SYS_set_robust_list),
    any(libc::SYS_rseq),
    any(libc::SYS_sched_getaffinity), // asked by the C library about a new thread's stack
    PRCTL,
    SECCOMP,
    any(libc::SYS_capget), // a new processor's thread gives up what this one has given up already
    any(libc::SYS_capset),
    // Disks, and what their workers do: they start with the filter of this thread.
    any(libc::SYS_io_uring_setup),
    any(libc::SYS_io_uring_register),
    any(libc::SYS_preadv2),
    any(libc::SYS_pwritev2),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fallocate),
];

/// A disk's worker: its files.
const BLOCK: &[Call] =
    &[any(libc::SYS_preadv2), any(libc::SYS_pwritev2), any(libc::SYS_fdatasync), any(libc::SYS_fallocate)];

/// A shared directory's worker: everything about files that the guest may ask for, always on descriptors. Its
/// own directory and mask are made before the filter is installed.
const FS: &[Call] = &[
    // Finding, opening, looking.
    any(libc::SYS_openat), // within /proc/self/fd
    any(libc::SYS_openat2),
    any(libc::SYS_newfstatat),
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    any(libc::SYS_getdents64),
    any(libc::SYS_readlinkat),
    // Contents.
    any(libc::SYS_lseek),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_syncfs),
    // Names.
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_linkat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_unlinkat),
    // The C library calls the older one when there are no flags.
    any(libc::SYS_renameat),
    any(libc::SYS_renameat2),
    // Attributes.
    any(libc::SYS_utimensat),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchownat),
    any(libc::SYS_getxattr),
    any(libc::SYS_setxattr),
    any(libc::SYS_listxattr),
    any(libc::SYS_removexattr),
    // Acting as the guest's user.
    any(libc::SYS_umask),
    any(libc::SYS_geteuid),
    any(libc::SYS_getegid),
    any(libc::SYS_setfsuid),
    any(libc::SYS_setfsgid),
    any(libc::SYS_capget),
    any(libc::SYS_capset),
    // Seeds of the standard library's hash tables.
    any(libc::SYS_getrandom),
];

/// Waits, and ends as it was told (see [`Ended::mirror`](crate::jail::Ended::mirror)).
const SUPERVISOR: &[Call] = &[
    any(libc::SYS_wait4),
    any(libc::SYS_rt_sigaction),
    any(libc::SYS_kill),
    any(libc::SYS_getpid),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigtimedwait),
    any(libc::SYS_unlink), // a socket that the inner process cannot reach
];

/// The calls of a kind of thread.
pub(super) fn of(thread: Thread) -> Vec<&'static Call> {
    let (own, more): (&[_], &[_]) = match thread {
        Thread::Vcpu => (VCPU, &[]),
        Thread::Devices => (DEVICES, CONTROL),
        Thread::Block => (BLOCK, &[]),
        Thread::Fs => (FS, &[]),
        Thread::Supervisor => (SUPERVISOR, &[]),
    };
    COMMON.iter().chain(own).chain(more).collect()
}

/// The numbers of all calls that a guest can have processors' threads and the main thread make.
#[cfg(test)]
pub(super) fn guest_driven() -> std::collections::BTreeSet<i64> {
    let calls = COMMON.iter().chain(VCPU).chain(DEVICES);
    calls.map(|(number, _)| *number).filter(|number| !REFUSED.contains(number)).collect()
}
