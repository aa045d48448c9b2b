//! Getting a thread out of `KVM_RUN` from another thread.
//!
//! A signal ends `KVM_RUN`, but one that arrives just before the call would be lost; its handler therefore
//! also sets `kvm_run.immediate_exit`, which makes the call return at once.

use std::{
    cell::Cell,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the processor that this thread runs; null on other threads. Const-initialised and
    /// without a destructor, so that a signal handler may use it at any moment.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// The signal that is used.
pub(super) fn signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    request_exit();
}

/// Makes the calling thread's next `KVM_RUN` return at once.
fn request_exit() {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable` sets the pointer for as long as the processor's shared page is mapped, on the
        // same thread that this runs on.
        unsafe { (*flag).store(1, Ordering::Relaxed) };
    }
}

/// Installs the handler, once per process.
pub(super) fn install() -> Result<(), vmm_sys_util::errno::Error> {
    static INSTALLED: OnceLock<Result<(), vmm_sys_util::errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(signal(), handle))
}

/// A processor whose thread can be kicked while this lives.
pub(super) struct Kickable {
    pub(super) vcpu: VcpuFd,
}

impl Kickable {
    /// Ties the processor to the calling thread.
    pub(super) fn new(mut vcpu: VcpuFd) -> Self {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag.cast::<AtomicU8>().cast_const());
        Self { vcpu }
    }

    /// Forgets kicks that have arrived. What they were sent for is to be looked at afterwards, never before.
    pub(super) fn clear(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}
