//! The measurements, where there is a real KVM.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    net::TcpListener,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::{
    guest,
    machine::{Guest, Running, Vmm},
    report::Figures,
    share::Share,
    vsock,
};

/// Where the results are, in the directory.
pub(super) const RESULTS: &str = "results.json";

/// Bytes of the disk, all of which are read and half of which are written.
const DISK: u64 = 32 << 20;
/// Bytes that go through the network in each direction.
const STREAM: usize = 8 << 20;
/// Small requests for a latency.
const REQUESTS: u32 = 100;
/// Our address at the guest's cable.
const HOST_ADDRESS: &str = "10.91.0.1";

/// Options of the half that runs in the testbed.
#[derive(Args, Debug)]
pub(crate) struct InsideArgs {
    /// Has `caisson-vmm` and `vmlinux`, and takes the results.
    #[arg(long)]
    directory: PathBuf,
    /// Measure everything but throughput so many times.
    #[arg(long)]
    runs: usize,
    /// Measure throughput so many times.
    #[arg(long)]
    throughput_runs: usize,
    /// Measure only these.
    #[arg(long, value_enum)]
    only: Vec<Part>,
}

/// A part of the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// Spawn to init, the jail, memory.
    Starts,
    /// Saving and restoring.
    Snapshots,
    /// Block, network, shared directory and vsock: throughput and latency.
    Throughput,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = clap::ValueEnum::to_possible_value(self);
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// Measures everything.
///
/// # Errors
/// When a guest does not come as far as it should.
pub(crate) fn run(args: &InsideArgs) -> Result<ExitCode> {
    // Reading over the share would be measured, too.
    let local = tempfile::tempdir().context("making a directory")?;
    for name in ["caisson-vmm", "vmlinux"] {
        fs::copy(args.directory.join(name), local.path().join(name))
            .with_context(|| format!("copying {name}"))?;
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let instructions = command_line.contains("caisson.icount");
    let mut figures = Figures {
        runs: args.runs,
        throughput_runs: args.throughput_runs,
        instructions,
        ..Figures::default()
    };
    let bench = Bench { directory: local.path(), runs: args.runs, throughput_runs: args.throughput_runs };
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    if wanted(Part::Starts) {
        bench.starts(&mut figures)?;
    }
    if wanted(Part::Snapshots) {
        bench.snapshots(&mut figures)?;
    }
    if wanted(Part::Throughput) {
        bench.throughput(&mut figures)?;
    }
    let results = serde_json::to_string(&figures).context("formatting the results")?;
    fs::write(args.directory.join(RESULTS), results).context("writing the results")?;
    for failure in &figures.failures {
        eprintln!("==> {failure}");
    }
    Ok(if figures.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is common to all measurements.
pub(super) struct Bench<'a> {
    pub(super) directory: &'a Path,
    pub(super) runs: usize,
    throughput_runs: usize,
}

impl Bench<'_> {
    pub(super) fn file(&self, name: &str, contents: &[u8]) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::write(&path, contents).with_context(|| format!("writing {name}"))?;
        Ok(path)
    }

    pub(super) fn guest(&self, kernel: PathBuf, initramfs: PathBuf) -> Guest<'_> {
        Guest {
            directory: self.directory,
            kernel,
            initramfs,
            disk: None,
            share: None,
            tap: None,
            vsock: None,
            jailed: false,
        }
    }

    /// Spawn to init, the kernel's share of it, and memory.
    fn starts(&self, figures: &mut Figures) -> Result<()> {
        let kernel = self.directory.join("vmlinux");
        let image = fs::read(&kernel).context("reading the kernel")?;
        let stopped = self.file("vmlinux.stopped", &guest::stopped_kernel(&image)?)?;
        let initramfs = self.file("small.cpio", &guest::minimal_initramfs()?)?;
        let whole = self.guest(kernel, initramfs.clone());
        let entered = self.guest(stopped, initramfs);
        for vmm in Vmm::ALL {
            eprintln!("==> starts of {}", vmm.name());
            // The first start of each reads its files from the disk.
            entered.start(vmm)?.mark().context("a start to the kernel's entry")?;
            whole.start(vmm)?.mark().context("a start to init")?;
            let (mut to_entry, mut to_init) = (Vec::new(), Vec::new());
            let (mut private, mut resident) = (Vec::new(), Vec::new());
            for _ in 0..self.runs {
                to_entry.push(entered.start(vmm)?.mark()?);
                let mut machine = whole.start(vmm)?;
                to_init.push(machine.mark()?);
                let memory = machine.memory()?;
                private.push(as_f64(memory.private));
                resident.push(as_f64(memory.guest));
            }
            let name = vmm.name();
            figures.add("spawn_to_entry_minstr", name, to_entry);
            figures.add("spawn_to_init_minstr", name, to_init);
            figures.add("vmm_private_kb", name, private);
            figures.add("guest_rss_booted_kb", name, resident);
            let whole = figures.get("spawn_to_init_minstr", name).unwrap_or_default();
            let own = figures.get("spawn_to_entry_minstr", name).unwrap_or_default();
            figures.add("kernel_minstr", name, vec![whole - own]);
        }
        self.jail(&entered, figures)
    }

    /// What the jail adds to a start.
    fn jail(&self, entered: &Guest<'_>, figures: &mut Figures) -> Result<()> {
        let name = Vmm::Caisson.name();
        eprintln!("==> the jail of {name}");
        let jailed = Guest { jailed: true, ..entered.clone() };
        jailed.start(Vmm::Caisson)?.mark().context("a start in the jail")?;
        let mut took = Vec::new();
        for _ in 0..self.runs {
            took.push(jailed.start(Vmm::Caisson)?.mark()?);
        }
        figures.add("spawn_to_entry_jailed_minstr", name, took);
        let with = figures.get("spawn_to_entry_jailed_minstr", name).unwrap_or_default();
        let without = figures.get("spawn_to_entry_minstr", name).unwrap_or_default();
        figures.add("jail_minstr", name, vec![with - without]);
        Ok(())
    }

    /// Block, network, shared directory and vsock: how much in how long.
    fn throughput(&self, figures: &mut Figures) -> Result<()> {
        let disk = self.file("disk", &[])?;
        for vmm in Vmm::ALL {
            let vsock = vsock::available(vmm);
            let script = format!("{SCRIPT}{}{SCRIPT_END}", if vsock { SCRIPT_VSOCK } else { "" });
            let initramfs = self.file("system.cpio", &guest::system_initramfs(&script)?)?;
            let steps = FIGURES.iter().filter(|(name, ..)| vsock || !name.starts_with("vsock"));
            let mut samples: Vec<(&str, Vec<f64>)> =
                steps.clone().map(|(name, ..)| (*name, Vec::new())).collect();
            eprintln!("==> throughput of {}", vmm.name());
            for _ in 0..self.throughput_runs {
                fill(&disk)?;
                let tap = tap::open("bench0")?;
                set_up_network("bench0")?;
                let server = Server::start()?;
                let mut guest = self.guest(self.directory.join("vmlinux"), initramfs.clone());
                guest.disk = Some(disk.clone());
                guest.share = Some(Share::make(self.directory, DISK)?);
                guest.tap = Some(tap.as_raw_fd());
                if vsock {
                    let socket = self.directory.join("vsock");
                    vsock::serve(vmm, &socket, STREAM as u64)?;
                    guest.vsock = Some(socket);
                }
                let mut machine = guest.start(vmm)?;
                let measured =
                    steps.clone().zip(&mut samples).try_for_each(|((_, step, amount), (_, values))| {
                        values.push(amount.per_time(step_of(&mut machine, step)?));
                        anyhow::Ok(())
                    });
                drop(machine);
                if let Err(error) = measured {
                    // What was measured so far stands, and the rest is missing from the table.
                    figures.failures.push(format!("{}: {error:#}", vmm.name()));
                    break;
                }
                server.stop();
            }
            for (name, values) in samples {
                figures.add(name, vmm.name(), values);
            }
        }
        Ok(())
    }
}

/// What a figure is made of.
enum Amount {
    /// Bytes in the time of the step: MiB/s.
    Mebibytes(u64),
    /// Requests in the time of the step, one after the other: µs each.
    Requests(u32),
}

impl Amount {
    fn per_time(&self, took: Duration) -> f64 {
        match self {
            Self::Mebibytes(bytes) => as_f64(*bytes) / f64::from(1 << 20) / took.as_secs_f64(),
            Self::Requests(count) => took.as_secs_f64() * 1e6 / f64::from(*count),
        }
    }
}

/// The figures in the order of the script's steps: name, step, amount.
const FIGURES: [(&str, &str, Amount); 14] = [
    ("block_read_mib_s", "block-read", Amount::Mebibytes(DISK)),
    ("block_write_mib_s", "block-write", Amount::Mebibytes(DISK / 2)),
    ("block_read_4k_us", "block-latency", Amount::Requests(REQUESTS)),
    ("net_receive_mib_s", "net-receive", Amount::Mebibytes(STREAM as u64)),
    ("net_send_mib_s", "net-send", Amount::Mebibytes(STREAM as u64)),
    ("net_round_trip_us", "net-latency", Amount::Requests(REQUESTS)),
    ("fs_read_mib_s", "fs-read", Amount::Mebibytes(DISK)),
    ("fs_write_mib_s", "fs-write", Amount::Mebibytes(DISK / 2)),
    ("fs_read_4k_us", "fs-read-latency", Amount::Requests(REQUESTS)),
    ("fs_write_4k_us", "fs-write-latency", Amount::Requests(REQUESTS)),
    ("fs_create_us", "fs-create", Amount::Requests(REQUESTS)),
    ("vsock_receive_mib_s", "vsock-receive", Amount::Mebibytes(STREAM as u64)),
    ("vsock_send_mib_s", "vsock-send", Amount::Mebibytes(STREAM as u64)),
    ("vsock_latency_us", "vsock-latency", Amount::Requests(REQUESTS)),
];

/// Each step says `NAME+` before and `NAME-` after. The sizes are those above.
const SCRIPT: &str = "\
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
ip link set lo up; ip addr add 10.91.0.2/24 dev eth0; ip link set eth0 up
ping -c 1 -W 5 10.91.0.1 >/dev/null || echo no-network
step() { echo $1+; shift; \"$@\" >/dev/null 2>&1 || echo failed: $*; }
send() { dd if=/dev/zero bs=64k count=128 2>/dev/null | nc 10.91.0.1 7002; }
step block-read dd if=/dev/vda of=/dev/null bs=1M count=32 iflag=direct; echo block-read-
step block-write dd if=/dev/zero of=/dev/vda bs=1M count=16 oflag=direct conv=fsync; echo block-write-
step block-latency dd if=/dev/vda of=/dev/null bs=4k count=100 iflag=direct; echo block-latency-
step net-receive nc 10.91.0.1 7001; echo net-receive-
step net-send send; echo net-send-
step net-latency ping -A -q -c 100 10.91.0.1; echo net-latency-
mkdir /share; mount -t virtiofs share /share 2>/dev/null || mount -t ext4 /dev/vdb /share || echo failed: share
create() { for i in $(seq 100); do : > /share/file$i || return; done; }
step fs-read dd if=/share/data of=/dev/null bs=1M count=32 iflag=direct; echo fs-read-
step fs-write dd if=/dev/zero of=/share/new bs=1M count=16 oflag=direct conv=fsync; echo fs-write-
step fs-read-latency dd if=/share/data of=/dev/null bs=4k count=100 iflag=direct; echo fs-read-latency-
step fs-write-latency dd if=/dev/zero of=/share/new bs=4k count=100 oflag=direct conv=notrunc; echo fs-write-latency-
step fs-create create; echo fs-create-
";

/// Follows when there is a vsock device.
const SCRIPT_VSOCK: &str = "\
step vsock-receive xtask bench client receive; echo vsock-receive-
step vsock-send xtask bench client send 8388608; echo vsock-send-
step vsock-latency xtask bench client echo 100; echo vsock-latency-
";

/// Init never ends.
const SCRIPT_END: &str = "while :; do sleep 1000; done\n";

fn step_of(machine: &mut Running, step: &str) -> Result<Duration> {
    // So that whoever waits sees which step it is that takes long.
    eprintln!("==> {step}");
    let begin = machine.word(&format!("{step}+"))?;
    let end = machine.word(&format!("{step}-"))?;
    let heard = machine.heard();
    ensure!(!heard.contains("failed:") && !heard.contains("no-network"), "{step}:\n{heard}");
    Ok(end.duration_since(begin))
}

/// Fills the disk, so that there is something to read and nothing to allocate.
fn fill(disk: &Path) -> Result<()> {
    let mut file = File::create(disk).context("making the disk")?;
    let block = [0x5a; 1 << 20];
    for _ in 0..DISK >> 20 {
        file.write_all(&block).context("filling the disk")?;
    }
    file.sync_all().context("filling the disk")
}

fn set_up_network(tap: &str) -> Result<()> {
    let address = format!("{HOST_ADDRESS}/24");
    for words in [vec!["addr", "add", &address, "dev", tap], vec!["link", "set", tap, "up"]] {
        let status = Command::new("ip").args(&words).status().context("running ip")?;
        ensure!(status.success(), "ip {} failed", words.join(" "));
    }
    Ok(())
}

/// The host's end of both streams.
struct Server {
    workers: Vec<thread::JoinHandle<io::Result<()>>>,
}

impl Server {
    fn start() -> Result<Self> {
        let source = TcpListener::bind((HOST_ADDRESS, 7001)).context("listening")?;
        let sink = TcpListener::bind((HOST_ADDRESS, 7002)).context("listening")?;
        let send = thread::spawn(move || {
            let (mut stream, _) = source.accept()?;
            let block = [0x5a; 64 << 10];
            (0..STREAM / block.len()).try_for_each(|_| stream.write_all(&block))
        });
        let receive = thread::spawn(move || {
            let (mut stream, _) = sink.accept()?;
            io::copy(&mut stream, &mut io::sink()).map(|_| ())
        });
        Ok(Self { workers: vec![send, receive] })
    }

    fn stop(self) {
        for worker in self.workers {
            // A stream that broke shows as a step that failed.
            let _ = worker.join();
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures are shown with two digits")]
pub(super) fn as_f64(value: u64) -> f64 {
    value as f64
}

/// A tap device, as both VMMs take it.
mod tap {
    use super::{Context, File, OwnedFd, Result};

    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        nix::libc::ifreq
    );

    /// Makes a tap device, which is gone with the descriptor. Children inherit it.
    pub(super) fn open(name: &str) -> Result<OwnedFd> {
        let file =
            File::options().read(true).write(true).open("/dev/net/tun").context("opening /dev/net/tun")?;
        // SAFETY: an ifreq is plain data.
        let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = nix::libc::c_char::from_ne_bytes([from]);
        }
        let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = nix::libc::c_short::try_from(flags).context("flags")?;
        // SAFETY: the kernel reads one ifreq.
        unsafe { set_interface(std::os::fd::AsRawFd::as_raw_fd(&file), &request) }
            .context("making a tap device")?;
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
            .context("passing the tap device on")?;
        Ok(file.into())
    }
}
