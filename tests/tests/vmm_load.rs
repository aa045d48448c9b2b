//! Machines that are saved while their devices are busy.

use std::{
    fs::File,
    io::Write,
    net::TcpListener,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use caisson_e2e::{
    net::NamedTap,
    vmm::{PATIENCE, Vmm, Workshop},
    vsock::{ECHO, connect, connect_patiently, pattern},
};
use caisson_vmm_api::{
    config::{DeviceConfig, FileSource, MachineConfig},
    control::protocol::RestoreCommand,
};

/// Keeps its disk, its card and its sockets busy, and says what it has received, and when anything is not as it
/// should be.
const BUSY: &str = "
ip addr add 10.92.3.2/24 dev eth0; ip link set eth0 up
/host/vsock-guest &
(nc 10.92.3.1 7001 | sha256sum > /part; mv /part /sum) &
n=0
while dd if=/dev/urandom of=/a bs=64k count=8 2>/dev/null; do
    dd if=/a of=/dev/vda bs=64k seek=$((n % 8 * 8)) oflag=direct 2>/dev/null
    dd if=/dev/vda of=/b bs=64k skip=$((n % 8 * 8)) count=8 iflag=direct 2>/dev/null
    cmp /a /b || echo FAILED: round $n of the disk
    echo disk $n $(cat /sum 2>/dev/null)
    n=$((n + 1))
done";

/// What goes through the card while the machine is saved once.
const PORTION: usize = 3 << 20;

/// How a machine is saved.
struct Saves {
    /// How often it goes on itself.
    resumed: usize,
    /// How often it goes on as another, afterwards.
    restored: usize,
}

/// Sends a portion of the stream to whoever connects, each time that it is told to.
fn portions(listener: TcpListener, stream: Vec<u8>, go: Receiver<()>) -> JoinHandle<Result<()>> {
    thread::spawn(move || {
        let (mut to, _) = listener.accept()?;
        to.set_write_timeout(Some(PATIENCE))?;
        for portion in stream.chunks(PORTION) {
            go.recv().context("told to go on")?;
            to.write_all(portion)?;
        }
        Ok(())
    })
}

/// Sends and receives until something fails; how often it went well.
fn echoes(mut stream: UnixStream) -> JoinHandle<usize> {
    thread::spawn(move || {
        let data = pattern(40_000);
        let mut round = || -> Result<bool> {
            stream.write_all(&data)?;
            let mut back = vec![0; data.len()];
            std::io::Read::read_exact(&mut stream, &mut back)?;
            Ok(back == data)
        };
        std::iter::from_fn(|| round().ok()?.then_some(())).count()
    })
}

fn save(vmm: &mut Vmm, directory: &Path) -> Result<()> {
    vmm.client.pause()?;
    let (state, memory) = (File::create(directory.join("state"))?, File::create(directory.join("memory"))?);
    vmm.client.snapshot(state.as_fd(), memory.as_fd())?;
    Ok(())
}

/// The machine with its host's end of the sockets at another path: the one before may not have taken its own
/// away.
fn with_socket(mut config: MachineConfig, path: &Path) -> MachineConfig {
    for device in &mut config.devices {
        if let DeviceConfig::Vsock(vsock) = device {
            vsock.socket = FileSource::Path(path.to_owned());
        }
    }
    config
}

fn guest_program() -> PathBuf {
    std::env::var_os("NEXTEST_BIN_EXE_vsock-guest")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_vsock-guest")), PathBuf::from)
}

fn saved_under_load(engine: &str, saves: &Saves) -> Result<()> {
    let _tap = NamedTap::new("e2e-load", "10.92.3.1/24")?;
    let listener = TcpListener::bind(("10.92.3.1", 7001))?;
    let stream = pattern(PORTION * (saves.resumed + saves.restored));
    let program = guest_program();
    let workshop = Workshop::with_programs(BUSY, &[(&program, "vsock-guest")])?;
    let disk = workshop.disk("disk", "", 4 << 20)?;
    let sum = workshop.path("sent");
    std::fs::write(&sum, &stream)?;
    let sum = std::process::Command::new("sha256sum").arg(&sum).output()?;
    let sum = String::from_utf8(sum.stdout)?.split_whitespace().next().unwrap_or_default().to_owned();
    let (go, told) = mpsc::channel();
    let sender = portions(listener, stream, told);

    let socket = workshop.path("vsock");
    let mut config = workshop.config(&format!(
        "cpus.boot = 2\ncpus.max = 2\n\
         [[devices]]\nblock.files = [{disk:?}]\nblock.options.engine = '{engine}'\n\
         [[devices]]\nnet.tap = 'e2e-load'\nnet.options.mac = '02:00:00:00:92:03'\n\
         [[devices]]\nvsock.socket = {socket:?}\nvsock.options.guest_cid = 3\n"
    ))?;
    // The initramfs is there twice while it is unpacked, and the program in it is no small one.
    config.memory.size_mib = 256;
    let mut vmm = Vmm::boot(config.clone())?;
    // Should it not come up, its console says more than a connection that is not made.
    vmm.expect("disk 0")?;
    let talk = echoes(connect_patiently(&socket, ECHO)?);
    vmm.expect("disk 2")?;
    for _ in 0..saves.resumed {
        go.send(())?;
        thread::sleep(Duration::from_millis(300));
        save(&mut vmm, &workshop.path(""))?;
        vmm.client.resume()?;
        vmm.expect("disk")?;
        ensure!(!talk.is_finished(), "a connection did not survive that the machine was saved");
    }
    for number in 0..saves.restored {
        go.send(())?;
        thread::sleep(Duration::from_millis(300));
        // Each in a place of its own: what a machine runs from must not change.
        let directory = workshop.path(&format!("save{number}"));
        std::fs::create_dir(&directory)?;
        save(&mut vmm, &directory)?;
        let failed = vmm.transcript.iter().any(|line| line.contains("FAILED"));
        ensure!(!failed, "before it was saved:\n{}", vmm.tail());
        drop(vmm);
        let socket = workshop.path(&format!("vsock{number}"));
        let command = RestoreCommand::from_directory(&directory, Some(&with_socket(config.clone(), &socket)));
        vmm = Vmm::restore(command)?;
        vmm.client.resume()?;
        vmm.expect("disk")?;
        // Connections end with the machine that had them; new ones go well at once.
        let rounds = echoes(connect(&socket, ECHO)?);
        vmm.expect("disk")?;
        vmm.expect("disk")?;
        ensure!(!rounds.is_finished(), "a connection to the restored machine failed");
    }
    vmm.expect(&sum).context("the stream has not arrived whole")?;
    sender.join().map_err(|_| anyhow!("the sender panicked"))??;
    let rounds = talk.join().map_err(|_| anyhow!("the talker panicked"))?;
    ensure!(rounds > 0, "nothing went over the sockets");
    vmm.expect("disk")?;
    ensure!(!vmm.transcript.iter().any(|line| line.contains("FAILED")), "{}", vmm.tail());
    Ok(())
}

#[test]
fn a_busy_machine_is_saved_and_goes_on_with_a_worker_threads_disk() -> Result<()> {
    saved_under_load("sync", &Saves { resumed: 1, restored: 1 })
}

#[test]
fn a_busy_machine_is_saved_and_goes_on_with_io_uring() -> Result<()> {
    saved_under_load("io_uring", &Saves { resumed: 2, restored: 1 })
}

#[test]
#[ignore = "minutes on an emulated machine"]
fn a_busy_machine_is_saved_again_and_again() -> Result<()> {
    saved_under_load("sync", &Saves { resumed: 20, restored: 5 })?;
    saved_under_load("io_uring", &Saves { resumed: 20, restored: 5 })
}
