//! The thread that runs one virtual processor.

use std::{
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
    thread::JoinHandle,
};

use caisson_vmm_api::exit::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::Killable;

use super::{
    VcpuError,
    kick::{self, Kickable},
};

/// Small, since the thread does no more than look up a register: less than it takes to serve a device.
const STACK_SIZE: usize = 128 << 10;

/// What a processor reaches by port and memory-mapped I/O. Reads start from all ones, as on a bus where
/// nothing answers.
pub trait Bus: Send + Sync {
    /// `in` from a port.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `out` to a port; a reason when it ends the machine.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<ExitReason>;
    /// A read of memory that is not RAM.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// A write to memory that is not RAM.
    fn mmio_write(&self, addr: u64, data: &[u8]);
    /// The machine has come to its end, on this processor. Called at most once for each processor.
    fn ended(&self, reason: ExitReason);
}

/// A command did not reach a processor: its thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {id} has stopped")]
pub struct VcpuCommandError {
    /// The processor.
    pub id: u8,
}

enum Command {
    Pause(Sender<()>),
    Resume,
    /// Runs with the processor at rest.
    Inspect(Box<dyn FnOnce(&VcpuFd) + Send>),
    Stop,
}

/// A processor and its thread. It starts paused; dropping it stops the processor and waits for the thread.
pub struct VcpuThread {
    id: u8,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of processor `id`, paused. `prepare` runs on the new thread before anything else.
    ///
    /// # Errors
    /// When the thread or its signal handler cannot be set up.
    pub fn spawn(
        id: u8,
        vcpu: VcpuFd,
        bus: Arc<dyn Bus>,
        prepare: impl FnOnce() + Send + 'static,
    ) -> Result<Self, VcpuError> {
        let failed = |source| VcpuError::Thread { id, source };
        kick::install().map_err(|error| failed(error.into()))?;
        let (commands, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                prepare();
                Runner { vcpu: Kickable::new(vcpu), bus, commands: receiver, state: State::Paused }.run();
            })
            .map_err(failed)?;
        Ok(Self { id, commands, thread: Some(thread) })
    }

    /// The processor's number, which is its APIC id.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Asks the processor to stop executing and returns a receiver that tells when it has.
    ///
    /// # Errors
    /// When its thread is gone.
    pub fn pause(&self) -> Result<Receiver<()>, VcpuCommandError> {
        let (done, receiver) = mpsc::channel();
        self.send(Command::Pause(done))?;
        Ok(receiver)
    }

    /// Lets the processor execute.
    ///
    /// # Errors
    /// When its thread is gone.
    pub fn resume(&self) -> Result<(), VcpuCommandError> {
        // A processor at rest waits for commands; one that runs has nothing to do.
        self.queue(Command::Resume)
    }

    /// Runs `f` on the processor's own thread, where KVM answers fastest, and returns its result. The
    /// processor must be paused for a result that means anything.
    ///
    /// # Errors
    /// When its thread is gone.
    pub fn inspect<T: Send + 'static>(
        &self,
        f: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, VcpuCommandError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Inspect(Box::new(move |vcpu| {
            // The receiver waits below; it cannot be gone.
            let _ = sender.send(f(vcpu));
        })))?;
        receiver.recv().map_err(|_| VcpuCommandError { id: self.id })
    }

    fn queue(&self, command: Command) -> Result<(), VcpuCommandError> {
        self.commands.send(command).map_err(|_| VcpuCommandError { id: self.id })
    }

    fn send(&self, command: Command) -> Result<(), VcpuCommandError> {
        self.queue(command)?;
        if let Some(thread) = &self.thread {
            // A thread that has just ended has dropped its receiver, which the caller learns from its reply.
            let _ = thread.kill(kick::signal());
        }
        Ok(())
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported; there is nobody to hand it to.
            let _ = thread.join();
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Paused,
    Running,
    /// The machine has ended; what remains is to be inspected and stopped.
    Ended,
    Stopped,
}

struct Runner {
    vcpu: Kickable,
    bus: Arc<dyn Bus>,
    commands: Receiver<Command>,
    state: State,
}

impl Runner {
    fn run(&mut self) {
        loop {
            match self.state {
                State::Running => self.execute(),
                State::Paused | State::Ended => self.await_command(),
                State::Stopped => return,
            }
        }
    }

    fn await_command(&mut self) {
        match self.commands.recv() {
            Ok(command) => self.obey(command),
            Err(_) => self.state = State::Stopped,
        }
    }

    fn obey_all(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.state = State::Stopped;
                    return;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Pause(done) => {
                if self.state == State::Running {
                    self.state = State::Paused;
                }
                let _ = done.send(());
            }
            Command::Resume if self.state == State::Paused => self.state = State::Running,
            Command::Resume => {}
            Command::Inspect(f) => f(&self.vcpu.vcpu),
            Command::Stop => self.state = State::Stopped,
        }
    }

    /// Runs guest code until something is to be done about it.
    fn execute(&mut self) {
        let reason = match self.vcpu.vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                data.fill(0xff);
                self.bus.port_read(port, data);
                return;
            }
            Ok(VcpuExit::IoOut(port, data)) => self.bus.port_write(port, data),
            Ok(VcpuExit::MmioRead(addr, data)) => {
                data.fill(0xff);
                self.bus.mmio_read(addr, data);
                return;
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                self.bus.mmio_write(addr, data);
                return;
            }
            Ok(VcpuExit::Shutdown) => Some(ExitReason::TripleFault),
            Ok(VcpuExit::FailEntry(code, _)) => {
                Some(ExitReason::Fault(format!("KVM could not enter the guest (hardware reason {code:#x})")))
            }
            Ok(VcpuExit::InternalError) => Some(self.internal_error()),
            // With the interrupt controller in the kernel a halted processor stays there, so anything else is
            // an exit that was not enabled.
            Ok(other) => Some(ExitReason::Fault(format!("unexpected exit from KVM: {other:?}"))),
            Err(error) if error.errno() == libc::EINTR => {
                self.vcpu.clear();
                self.obey_all();
                return;
            }
            Err(error) if error.errno() == libc::EAGAIN => return,
            Err(error) => Some(ExitReason::Fault(format!("KVM_RUN: {error}"))),
        };
        if let Some(reason) = reason {
            self.state = State::Ended;
            self.bus.ended(reason);
        }
    }

    fn internal_error(&mut self) -> ExitReason {
        // SAFETY: the exit reason says that `internal` is the union's live member; any bits make a valid one.
        let suberror = unsafe { self.vcpu.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let rip = self.vcpu.vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
        ExitReason::Fault(format!("KVM internal error {suberror} at guest address {rip:#x}"))
    }
}
