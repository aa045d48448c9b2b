//! A guest of our own VMM with a vsock device and `vsock-guest` as its `/init`.
//!
//! The machine runs inside the test's process, through the VMM's library: what is under test is the device on
//! real KVM with a real driver, so the jail and the control API stay out of the way.

use std::{
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_virtio::devices::vsock::{HostEnd, PathDialer};
use caisson_vmm::{
    boot::BootSource,
    devices::serial::ConsoleSink,
    machine::{Machine, OpenDevice, poller::Poller},
    machine_file,
    resources::{self, Descriptors, Resources},
};
use caisson_vmm_api::{config::MachineConfig, devices::VsockConfig};
use nix::sys::{
    socket::{AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket, sockopt},
    time::{TimeVal, TimeValLike},
};

use crate::{guest::Initramfs, node::Product};

/// Sends back what it receives.
pub const ECHO: u32 = 5001;
/// Sends as much of [`pattern`] as it is asked for.
pub const SOURCE: u32 = 5002;
/// Reads nothing until released.
pub const SINK: u32 = 5003;
/// Releases the sinks.
pub const RELEASE: u32 = 5004;
/// Dials a port of the host.
pub const DIAL: u32 = 5005;

/// How long a guest may take to boot on an emulated machine.
const BOOT: Duration = Duration::from_secs(120);
/// How long it may be silent afterwards.
const SILENCE: Duration = Duration::from_secs(60);

/// Bytes that show when some are lost, doubled or moved.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = std::iter::from_fn(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.to_le_bytes())
    });
    words.flatten().take(length).collect()
}

/// Connects to a port of the guest whose vsock device is at `path`.
///
/// # Errors
/// When nobody listens there.
pub fn connect(path: &Path, port: u32) -> Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let silence = TimeVal::seconds(SILENCE.as_secs().try_into()?);
    // Also for connect(2), which waits for a listener that does not accept.
    setsockopt(&socket, sockopt::SendTimeout, &silence)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &silence)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let mut stream = UnixStream::from(socket);
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            bail!("port {port} was refused");
        }
        line.extend(byte);
    }
    ensure!(line.starts_with(b"OK "), "odd answer: {}", String::from_utf8_lossy(&line));
    Ok(stream)
}

/// Connects again and again until somebody listens: for a guest that boots.
///
/// # Errors
/// When nobody does in time.
pub fn connect_patiently(path: &Path, port: u32) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match connect(path, port) {
            Err(_) if start.elapsed() < BOOT => thread::sleep(Duration::from_millis(50)),
            outcome => return outcome,
        }
    }
}

/// A running guest.
pub struct VsockGuest {
    dir: tempfile::TempDir,
    machine: Arc<Mutex<Machine>>,
    stopping: Arc<AtomicBool>,
    event_loop: Option<JoinHandle<()>>,
}

impl VsockGuest {
    /// Boots a guest and waits until it serves its ports. `program`: the `vsock-guest` binary.
    ///
    /// # Errors
    /// When the machine can't be made, or the guest does not come up.
    pub fn boot(program: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let initramfs = dir.path().join("initramfs");
        program_initramfs(program, &initramfs)?;
        let file = dir.path().join("machine.toml");
        let kernel = Product::Kernel.path()?;
        let text = format!(
            "slots = 2\n[kernel]\nimage = {kernel:?}\ninitramfs = {initramfs:?}\n\
             command_line = 'console=ttyS0 quiet'\n\
             [memory]\nsize_mib = 256\n[cpus]\nboot = 2\nmax = 2\n[console]\noutput = {:?}\n",
            dir.path().join("console"),
        );
        std::fs::write(&file, text)?;
        std::fs::write(dir.path().join("console"), "")?;
        let machine = Arc::new(Mutex::new(build(&MachineConfig::from_file(&file)?, dir.path())?));
        let stopping = Arc::new(AtomicBool::new(false));
        let event_loop = Some(thread::spawn({
            let (machine, stopping) = (machine.clone(), stopping.clone());
            move || run(&machine, &stopping)
        }));
        let guest = Self { dir, machine, stopping, event_loop };
        let console = || format!("the guest's console:\n{}", guest.console());
        drop(connect_patiently(&guest.path(), ECHO).with_context(console)?);
        Ok(guest)
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(&self, port: u32) -> Result<UnixStream> {
        connect(&self.path(), port)
    }

    /// A service of the host that the guest can dial.
    ///
    /// # Errors
    /// As bind(2).
    pub fn serve(&self, port: u32) -> Result<UnixListener> {
        let mut path = self.path().into_os_string();
        path.push(format!("_{port}"));
        let listener = UnixListener::bind(PathBuf::from(path))?;
        let boot = TimeVal::seconds(BOOT.as_secs().try_into()?);
        setsockopt(&listener, sockopt::ReceiveTimeout, &boot)?;
        Ok(listener)
    }

    /// Pauses the machine's processors, and resumes them after `pause`.
    ///
    /// # Errors
    /// When a processor has stopped for good.
    pub fn pause_for(&self, pause: Duration) -> Result<()> {
        self.lock().pause()?;
        thread::sleep(pause);
        self.lock().resume()?;
        Ok(())
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VsockGuest {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the guest's console:\n{}", self.console());
        }
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(event_loop) = self.event_loop.take() {
            let _ = event_loop.join();
        }
    }
}

fn build(config: &MachineConfig, dir: &Path) -> Result<Machine> {
    let kvm = resources::open_kvm()?;
    let resources = Resources::open(config, &Descriptors::Inherited)?;
    let sink = ConsoleSink::new(resources.console.output, config.console.rate);
    let mut machine = Machine::new(&kvm, config.into(), Arc::new(Poller::new()?), sink, Instant::now())?;
    let path = dir.join("vsock");
    let host =
        HostEnd { listener: Some(UnixListener::bind(&path)?), dialer: Some(Box::new(PathDialer::new(path))) };
    machine.plug(0, OpenDevice::Vsock(VsockConfig { guest_cid: 3 }, host))?;
    let command_line = machine_file::command_line(config)?;
    let source = BootSource {
        kernel: &resources.kernel,
        initramfs: resources.initramfs.as_ref(),
        protocol: config.kernel.protocol,
        command_line: &command_line,
        processors: config.cpus.max,
    };
    machine.load(&source, config.cpus.boot)?;
    machine.resume()?;
    Ok(machine)
}

/// The event loop of `caisson-vmm`, but for a lock that lets the test pause the machine.
fn run(machine: &Mutex<Machine>, stopping: &AtomicBool) {
    let lock = || machine.lock().unwrap_or_else(PoisonError::into_inner);
    let poller = lock().poller().clone();
    while !stopping.load(Ordering::Relaxed) && lock().ended().is_none() {
        let Ok(events) = poller.wait(50) else { return };
        for (token, events) in events {
            lock().handle(token, events);
        }
    }
}

/// Makes an initramfs of one program as `/init`, with the libraries that it needs from this machine.
///
/// # Errors
/// When a tool is missing or the file can't be written.
pub fn program_initramfs(program: &Path, output: &Path) -> Result<()> {
    let initramfs = Initramfs::new()?;
    initramfs.program(program, "init")?;
    initramfs.write(output)
}
