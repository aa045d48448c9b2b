//! Small guests, each doing one thing that a kernel does early and that only real virtualization gets right.
//!
//! Each is a few instructions in 64 KiB of memory, without interrupt controller or devices. It tells what it
//! did by writing bytes to an I/O port, then halts; every other exit is a failure.

use std::{
    arch::global_asm,
    fmt, io, slice,
    sync::atomic::{AtomicBool, Ordering},
};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

/// The guests, in the order in which they run: each needs a little more than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestTest {
    /// Real mode: an addition.
    RealMode,
    /// 64-bit mode at privilege level 0: a million turns of a loop, a CR3 reload, and a look at the own ring.
    Ring0Loop,
    /// INT3 through an IDT, and the IRETQ back.
    Int3,
    /// XSAVE, then XRSTOR of an SSE register.
    Xrstor,
}

impl GuestTest {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::RealMode, Self::Ring0Loop, Self::Int3, Self::Xrstor];

    /// What the guest writes to the port when all is well.
    fn expected(self) -> &'static [u8] {
        match self {
            Self::RealMode => b"5",
            Self::Ring0Loop => b"0L",
            Self::Int3 => b"3r",
            Self::Xrstor => b"X",
        }
    }

    fn code(self) -> &'static [u8] {
        match self {
            Self::RealMode => between(&raw const caisson_probe_real, &raw const caisson_probe_loop),
            Self::Ring0Loop => between(&raw const caisson_probe_loop, &raw const caisson_probe_int3),
            Self::Int3 => between(&raw const caisson_probe_int3, &raw const caisson_probe_xrstor),
            Self::Xrstor => between(&raw const caisson_probe_xrstor, &raw const caisson_probe_end),
        }
    }
}

impl fmt::Display for GuestTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RealMode => "real-mode arithmetic",
            Self::Ring0Loop => "a ring-0 loop in 64-bit mode",
            Self::Int3 => "an INT3 through an IDT",
            Self::Xrstor => "an XRSTOR",
        })
    }
}

/// What went wrong with a small guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestFailure {
    /// Its virtual machine could not be built.
    #[error("{what}: {error}")]
    Setup {
        /// The step.
        what: &'static str,
        /// What the kernel said.
        error: String,
    },
    /// KVM_CREATE_VM said EBUSY: another hypervisor is using the extension.
    #[error("virtualization is in use by another hypervisor")]
    Busy,
    /// KVM_RUN itself failed.
    #[error("KVM_RUN failed: {0}")]
    Run(String),
    /// The guest stopped in another way than by halting.
    #[error("the guest ended with {0}")]
    Exit(String),
    /// The guest ran to its end but got something wrong.
    #[error("the guest reported {got:?} instead of {expected:?}")]
    Output {
        /// What it should have written to the port.
        expected: String,
        /// What it wrote.
        got: String,
    },
    /// It had not ended when the time was up.
    #[error("the guest did not end in time")]
    Hung,
}

/// The port that guests write to.
const PORT: u16 = 0xe9;

// Where things are in the guest's memory.
const MEM_SIZE: usize = 0x1_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const CODE: u64 = 0x8000;
const STACK_TOP: u64 = 0xf000;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
/// The null descriptor, 64-bit code and data of privilege 0 (Intel SDM vol. 3A, 3.4.5).
const GDT_TABLE: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

// Nothing here refers to an address of this process: the code is copied to CODE in the guest's memory and
// runs there. RBX holds the XSAVE area (0x6000), which the host cannot forget to pass since it is in the
// code.
global_asm!(
    ".pushsection .rodata.caisson_probe, \"a\"",
    ".global caisson_probe_real",
    ".global caisson_probe_loop",
    ".global caisson_probe_int3",
    ".global caisson_probe_int3_handler",
    ".global caisson_probe_xrstor",
    ".global caisson_probe_end",
    "caisson_probe_real:",
    ".code16",
    "mov dx, 0xe9",
    "mov al, 2",
    "add al, 3",
    "add al, '0'",
    "out dx, al",
    "hlt",
    ".code64",
    "caisson_probe_loop:",
    "mov edx, 0xe9",
    "mov eax, cs",
    "and al, 3", // the ring that we are in
    "add al, '0'",
    "out dx, al",
    "mov ecx, 1000000",
    "2: dec ecx",
    "jnz 2b",
    "mov rax, cr3",
    "mov cr3, rax",
    "mov al, 'L'",
    "out dx, al",
    "hlt",
    "caisson_probe_int3:",
    "mov edx, 0xe9",
    "int3",
    "mov al, 'r'",
    "out dx, al",
    "hlt",
    "caisson_probe_int3_handler:",
    "mov al, '3'",
    "out dx, al",
    "iretq",
    "caisson_probe_xrstor:",
    "mov ebx, 0x6000",
    "mov eax, 'X'",
    "movd xmm0, eax",
    "mov eax, 3", // x87 and SSE
    "xor edx, edx",
    "xsave64 [rbx]",
    "pxor xmm0, xmm0",
    "mov eax, 3",
    "xrstor64 [rbx]",
    "movd eax, xmm0",
    "mov edx, 0xe9",
    "out dx, al",
    "hlt",
    "caisson_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static caisson_probe_real: u8;
    static caisson_probe_loop: u8;
    static caisson_probe_int3: u8;
    static caisson_probe_int3_handler: u8;
    static caisson_probe_xrstor: u8;
    static caisson_probe_end: u8;
}

/// The bytes between two labels of the assembly above.
fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both are labels in one read-only section, `end` after `start`, with initialised bytes in
    // between that live as long as the program.
    unsafe { slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Where the INT3 guest's handler is in its memory.
fn int3_handler() -> u64 {
    CODE + between(&raw const caisson_probe_int3, &raw const caisson_probe_int3_handler).len() as u64
}

/// Builds and runs one guest. Returns [`GuestFailure::Hung`] once `expired` is set and KVM_RUN was
/// interrupted.
pub(super) fn run(kvm: &Kvm, test: GuestTest, expired: &AtomicBool) -> Result<(), GuestFailure> {
    let memory = build_memory(test)?;
    let vm = build_vm(kvm, &memory)?;
    let mut vcpu = build_vcpu(kvm, &vm, test)?;
    let got = run_to_halt(&mut vcpu, expired)?;
    if got == test.expected() {
        return Ok(());
    }
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
    Err(GuestFailure::Output { expected: text(test.expected()), got: text(&got) })
}

fn setup<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> GuestFailure {
    move |error| GuestFailure::Setup { what, error: error.into().to_string() }
}

fn build_memory(test: GuestTest) -> Result<GuestMemoryMmap<()>, GuestFailure> {
    let memory = |error: &dyn fmt::Display| GuestFailure::Setup { what: "memory", error: error.to_string() };
    let region = MmapRegion::new(MEM_SIZE).map_err(|e| memory(&e))?;
    let region = vm_memory::GuestRegionMmap::new(region, GuestAddress(0))
        .ok_or_else(|| memory(&"region out of range"))?;
    let mem = GuestMemoryMmap::from_regions(vec![region]).map_err(|e| memory(&e))?;

    let mut image: Vec<(u64, u64)> = vec![(PML4, PDPT | 0b11), (PDPT, PD | 0b11), (PD, 0b1000_0011)];
    image.extend((GDT..).step_by(8).zip(GDT_TABLE));
    image.extend((IDT + 3 * 16..).step_by(8).zip(interrupt_gate(int3_handler())));
    for (address, value) in image {
        mem.write_obj(value, GuestAddress(address)).map_err(|e| memory(&e))?;
    }
    mem.write_slice(test.code(), GuestAddress(CODE)).map_err(|e| memory(&e))?;
    Ok(mem)
}

/// A present 64-bit interrupt gate of privilege 0 (Intel SDM vol. 3A, 7.14.1).
fn interrupt_gate(handler: u64) -> [u64; 2] {
    let low =
        handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32 | (handler & 0xffff_0000) << 32;
    [low, handler >> 32]
}

fn build_vm(kvm: &Kvm, memory: &GuestMemoryMmap<()>) -> Result<VmFd, GuestFailure> {
    let vm = kvm.create_vm().map_err(|error| match error.errno() {
        libc::EBUSY => GuestFailure::Busy,
        _ => setup("KVM_CREATE_VM")(error),
    })?;
    // VMX without unrestricted guests runs real mode with the help of a task segment; it has to be somewhere.
    vm.set_tss_address(0xfffb_d000).map_err(setup("KVM_SET_TSS_ADDR"))?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the region is mapped, of that length, and outlives the virtual machine (see `run`).
        unsafe { vm.set_user_memory_region(slot) }.map_err(setup("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(vm)
}

fn build_vcpu(kvm: &Kvm, vm: &VmFd, test: GuestTest) -> Result<VcpuFd, GuestFailure> {
    let vcpu = vm.create_vcpu(0).map_err(setup("KVM_CREATE_VCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(setup("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(setup("KVM_SET_CPUID2"))?;

    let mut sregs = vcpu.get_sregs().map_err(setup("KVM_GET_SREGS"))?;
    if test == GuestTest::RealMode {
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
    } else {
        long_mode(&mut sregs, test == GuestTest::Xrstor);
    }
    vcpu.set_sregs(&sregs).map_err(setup("KVM_SET_SREGS"))?;
    if test == GuestTest::Xrstor {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = 0b11;
        vcpu.set_xcrs(&xcrs).map_err(setup("KVM_SET_XCRS"))?;
    }
    // Bit 1 of RFLAGS is always set.
    let regs = kvm_regs { rip: CODE, rsp: STACK_TOP, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(setup("KVM_SET_REGS"))?;
    Ok(vcpu)
}

/// 64-bit mode at privilege 0 with the first 2 MiB mapped one to one.
fn long_mode(sregs: &mut kvm_sregs, xsave: bool) {
    const CR0_PE: u64 = 1;
    const CR0_NE: u64 = 1 << 5;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const CR4_OSFXSR: u64 = 1 << 9;
    const CR4_OSXMMEXCPT: u64 = 1 << 10;
    const CR4_OSXSAVE: u64 = 1 << 18;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;

    let code = kvm_segment {
        selector: CODE_SELECTOR,
        limit: u32::MAX,
        type_: 0b1011, // code, readable, accessed
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 0b0011, // data, writable, accessed
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // VM entry insists on a busy 64-bit task segment; none is ever used.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0b1011, present: 1, ..Default::default() };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 8 * 3 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = 16 * 4 - 1;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE | if xsave { CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE } else { 0 };
    sregs.cr0 = CR0_PE | CR0_NE | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Runs until the guest halts; returns what it wrote to the port.
fn run_to_halt(vcpu: &mut VcpuFd, expired: &AtomicBool) -> Result<Vec<u8>, GuestFailure> {
    /// More than any guest writes: one that goes astray may write for ever.
    const MAX_OUTPUT: usize = 16;
    let mut output = Vec::new();
    while !expired.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(output),
            Ok(VcpuExit::IoOut(PORT, data)) if output.len() + data.len() <= MAX_OUTPUT => {
                output.extend_from_slice(data);
            }
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return Err(GuestFailure::Exit(format!("{exit:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(GuestFailure::Run(error.to_string())),
        }
    }
    Err(GuestFailure::Hung)
}
