//! The jail around a machine that runs: what the host sees of it, and that its filters let pass what it does.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::MetadataExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    node::Product,
    vmm::{PATIENCE, Vmm, Workshop},
};
use caisson_vmm_api::{
    config::{BlockDevice, DeviceConfig, FileSource, MachineConfig},
    control::protocol::{Resize, RestoreCommand},
    devices::{BlockConfig, IoEngine},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Everything that a guest can have its devices do.
const BUSY_GUEST: &str = "
    driver=/sys/bus/platform/drivers/virtio-mmio
    use_disk() {
        dd if=/dev/$1 of=/dev/null bs=64k count=16 2>/dev/null || echo FAILED to read
        dd if=/dev/zero of=/dev/$1 bs=64k count=16 conv=fsync 2>/dev/null || echo FAILED to write
        blkdiscard -f /dev/$1 2>/dev/null
    }
    dd if=/dev/hwrng of=/dev/null bs=512 count=64 2>/dev/null || echo FAILED to draw entropy
    use_disk vda; use_disk vdb
    dd if=/dev/zero of=/balloon bs=1M count=40 2>/dev/null; rm /balloon
    echo ready
    echo 1 > /sys/devices/system/cpu/cpu1/online
    echo online $(cat /sys/devices/system/cpu/online)
    for slot in 5 6; do
        while ! echo virtio-mmio.$slot > $driver/bind 2>/dev/null; do usleep 20000; done
        use_disk vdc
        echo virtio-mmio.$slot > $driver/unbind
        echo released $slot
    done
    wait_for() { while ! [ $(awk '/MemTotal/ {print $2}' /proc/meminfo) $1 $2 ]; do usleep 50000; done; }
    wait_for -gt 200000; echo grown
    wait_for -lt 150000; echo shrunk
    n=0; while true; do echo tick $n; n=$((n + 1)); usleep 100000; done";

/// A machine whose files are all handed over, as by a launcher that leaves nothing to open.
struct Handed {
    config: MachineConfig,
    files: Vec<OwnedFd>,
}

impl Handed {
    fn new(mut config: MachineConfig, console: OwnedFd) -> Result<Self> {
        let mut files = vec![console];
        config.console.output = Some(FileSource::Descriptor(0));
        hand_over(&mut config.kernel.image, &mut files, false)?;
        for source in config.kernel.initramfs.iter_mut() {
            hand_over(source, &mut files, false)?;
        }
        for device in &mut config.devices {
            if let DeviceConfig::Block(disk) = device {
                for source in &mut disk.files {
                    hand_over(source, &mut files, true)?;
                }
            }
        }
        Ok(Self { config, files })
    }
}

fn hand_over(source: &mut FileSource, files: &mut Vec<OwnedFd>, write: bool) -> Result<()> {
    if let FileSource::Path(path) = source {
        let file = File::options().read(true).write(write).open(path)?;
        *source = FileSource::Descriptor(u32::try_from(files.len())?);
        files.push(file.into());
    }
    Ok(())
}

fn boot_jailed(workshop: &Workshop, more: &str) -> Result<Vmm> {
    let mut vmm = Vmm::start_jailed()?;
    let Handed { config, files } = Handed::new(workshop.config(more)?, vmm.console()?)?;
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    vmm.client.create(config, &files)?;
    vmm.client.boot()?;
    Ok(vmm)
}

fn machine_with_devices(workshop: &Workshop) -> Result<String> {
    let sync = workshop.disk("sync", "", 4 << 20)?;
    let uring = workshop.disk("uring", "", 4 << 20)?;
    Ok(format!(
        "cpus.max = 2\nmemory.hotplug_mib = 256\nslots = 8\n\
         [[devices]]\nrng = {{}}\n\
         [[devices]]\nballoon = {{}}\n\
         [[devices]]\nblock.files = [{sync:?}]\n\
         [[devices]]\nblock.files = [{uring:?}]\nblock.options.engine = 'io_uring'\n"
    ))
}

/// The process in the jail, the only child of the one that was started.
fn inner(vmm: &Vmm) -> Result<Pid> {
    let pid = vmm.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(Pid::from_raw(children.trim().parse().with_context(|| format!("children: {children:?}"))?))
}

fn status_fields(path: &Path, name: &str) -> Result<Vec<String>> {
    let status = fs::read_to_string(path)?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).context(name.to_owned())?;
    Ok(line.trim_start_matches(':').split_whitespace().map(str::to_owned).collect())
}

fn threads(pid: Pid) -> Result<Vec<PathBuf>> {
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?.flatten().map(|entry| entry.path()).collect())
}

#[test]
fn a_machine_that_runs_has_nothing() -> Result<()> {
    let workshop = Workshop::new("echo up; sleep 1000")?;
    let mut vmm = boot_jailed(&workshop, &machine_with_devices(&workshop)?)?;
    vmm.expect("up")?;
    let outer = Pid::from_raw(i32::try_from(vmm.pid())?);
    let inner = inner(&vmm)?;
    for thread in threads(inner)?.into_iter().chain(threads(outer)?) {
        let status = thread.join("status");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let value = status_fields(&status, set)?;
            ensure!(value == ["0000000000000000"], "{}: {set} {value:?}", status.display());
        }
        let uid = status_fields(&status, "Uid")?;
        ensure!(uid.iter().all(|id| *id == uid[0]) && uid[0] != "0", "{uid:?}");
        ensure!(status_fields(&status, "NoNewPrivs")? == ["1"]);
        ensure!(status_fields(&status, "Seccomp")? == ["2"], "{}", fs::read_to_string(thread.join("comm"))?);
        ensure!(status_fields(&status, "Groups")?.is_empty());
    }
    for namespace in ["user", "mnt", "pid", "ipc", "net", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        ensure!(of(&inner.to_string())? != of("self")?, "{namespace} is the host's");
    }
    ensure!(fs::read_dir(format!("/proc/{inner}/root"))?.count() == 0, "the root is not empty");
    ensure!(fs::metadata(format!("/proc/{inner}/mem"))?.uid() == 0, "it can be dumped");
    let maps = fs::read_to_string(format!("/proc/{inner}/maps"))?;
    ensure!(!maps.lines().any(|line| line.contains("rwx")), "memory that is writable and executable");
    let mounts = fs::read_to_string(format!("/proc/{inner}/mountinfo"))?;
    ensure!(mounts.lines().count() == 1 && mounts.contains(" ro,nosuid,nodev,noexec"), "{mounts}");
    Ok(())
}

#[test]
fn the_filters_let_pass_what_a_guest_and_a_controller_can_cause() -> Result<()> {
    let workshop = Workshop::new(BUSY_GUEST)?;
    let mut vmm = boot_jailed(&workshop, &machine_with_devices(&workshop)?)?;
    // Before the guest asks for it: Linux gives up on a processor that did not answer the first time.
    vmm.client.resize(Resize { cpus: Some(2), ..Resize::default() })?;
    vmm.expect("ready")?;
    vmm.expect("online 0-1")?;
    for (slot, engine) in [(5, IoEngine::Sync), (6, IoEngine::IoUring)] {
        let path = workshop.disk("late", "", 4 << 20)?;
        let file = File::options().read(true).write(true).open(path)?;
        let options = BlockConfig { engine, ..BlockConfig::default() };
        let disk = BlockDevice { files: vec![FileSource::Descriptor(0)], options };
        vmm.client.plug(Some(slot), DeviceConfig::Block(disk), &[file.as_fd()])?;
        vmm.expect(&format!("released {slot}"))?;
        vmm.client.unplug(slot, false)?;
    }
    vmm.client.resize(Resize { plugged_mib: Some(128), balloon_mib: Some(8), ..Resize::default() })?;
    vmm.expect("grown")?;
    vmm.client.resize(Resize { plugged_mib: Some(0), balloon_mib: Some(0), ..Resize::default() })?;
    vmm.expect("shrunk")?;
    vmm.client.metrics()?;
    vmm.client.pause()?;
    vmm.client.resume()?;
    vmm.expect("tick")?;
    // What the jailed process cannot open it cannot be made to open.
    let disk =
        BlockDevice { files: vec![FileSource::Path("/etc/passwd".into())], options: Default::default() };
    ensure!(vmm.client.plug(Some(7), DeviceConfig::Block(disk), &[]).is_err());
    ensure!(!vmm.transcript.iter().any(|line| line.contains("FAILED")), "{:?}", vmm.transcript);
    vmm.client.shutdown()?;
    let status = vmm.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
fn a_jailed_machine_is_saved_and_goes_on_in_another_jail() -> Result<()> {
    let workshop = Workshop::new("n=0; while true; do echo tick $n; n=$((n + 1)); usleep 100000; done")?;
    let mut vmm = boot_jailed(&workshop, "cpus.boot = 2\ncpus.max = 2\n[[devices]]\nrng = {}\n")?;
    vmm.expect("tick 3")?;
    vmm.client.pause()?;
    let (state, memory) = (workshop.path("state"), workshop.path("memory"));
    vmm.client.snapshot(File::create(&state)?.as_fd(), File::create(&memory)?.as_fd())?;
    vmm.client.resume()?;
    vmm.expect("tick")?;

    let mut copy = Vmm::start_jailed()?;
    let (state, memory, console) = (File::open(&state)?, File::open(&memory)?, copy.console()?);
    let mut command = RestoreCommand {
        state: FileSource::Descriptor(0),
        memory: FileSource::Descriptor(1),
        console: Default::default(),
        devices: Vec::new(),
    };
    command.console.output = Some(FileSource::Descriptor(2));
    copy.client.restore(command, &[state.as_fd(), memory.as_fd(), console.as_fd()])?;
    copy.client.resume()?;
    copy.expect("tick 8")?;
    Ok(())
}

#[test]
fn the_death_of_either_process_is_the_death_of_both() -> Result<()> {
    let workshop = Workshop::new("echo up; sleep 1000")?;
    let mut vmm = boot_jailed(&workshop, "")?;
    vmm.expect("up")?;
    kill(inner(&vmm)?, Signal::SIGKILL)?;
    let status = vmm.wait()?;
    ensure!(status.signal() == Some(Signal::SIGKILL as i32), "{status}");

    let mut vmm = boot_jailed(&workshop, "")?;
    vmm.expect("up")?;
    let inner = inner(&vmm)?;
    kill(Pid::from_raw(i32::try_from(vmm.pid())?), Signal::SIGKILL)?;
    vmm.wait()?;
    let deadline = Instant::now() + PATIENCE;
    while fs::read_to_string(format!("/proc/{inner}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        ensure!(Instant::now() < deadline, "the inner process outlives its supervisor");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_machine_file_run_in_a_jail_leaves_no_socket_behind() -> Result<()> {
    let workshop = Workshop::new("echo up")?;
    let kernel = Product::Kernel.path()?;
    let (socket, vsock, jail) =
        (workshop.path("control"), workshop.path("vsock"), workshop.path("jail.toml"));
    let machine = workshop.path("machine.toml");
    fs::write(&jail, "")?;
    fs::write(
        &machine,
        format!(
            "kernel.image = {kernel:?}\nkernel.initramfs = {:?}\nkernel.command_line = 'quiet'\n\
             memory.size_mib = 128\ncontrol.socket = {socket:?}\n\
             [[devices]]\nvsock.socket = {vsock:?}\nvsock.options.guest_cid = 3\n",
            workshop.path("initramfs")
        ),
    )?;
    let status = std::process::Command::new(Product::Vmm.path()?)
        .args(["--config".as_ref(), machine.as_os_str(), "--jail".as_ref(), jail.as_os_str()])
        .status()?;
    ensure!(status.code() == Some(12), "{status}");
    ensure!(!socket.exists() && !vsock.exists(), "a socket is left");
    Ok(())
}
