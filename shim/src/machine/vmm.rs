//! The VMM's process, and the description of the machine that it is given.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Duration;

use caisson_vmm_api::{
    config::{
        ConsoleConfig, CpuConfig, DeviceConfig, FileSource, FsDevice, KernelConfig, MachineConfig,
        MemoryConfig, NetDevice, VsockDevice,
    },
    control::{
        self,
        protocol::{RestoreCommand, RestoredDevice},
    },
    devices::{FsConfig, NetConfig, VsockConfig},
    jail::JailConfig,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags};
use tokio::process::Command;

use super::console::{Console, Speaker};
use super::{MachineError, Plan, Process, SHARE_TAG, host};
use crate::{
    journal::{Journal, ProcessId, Resource},
    network::Card,
    template::Template,
};

/// What every guest's kernel is told. With small units for its memory of each processor (`percpu_alloc`) a guest needs
/// 4 MB less: who pays for an object in a unit is noted for every four bytes of it. Free memory is told of from 512 KiB
/// on, rather than from 2 MiB: little of it is in one piece after a boot.
const COMMAND_LINE: &str = "console=ttyS0 quiet percpu_alloc=page page_reporting.page_reporting_order=7";
/// How long the VMM may take for one answer.
const ANSWER: Duration = Duration::from_secs(30);
/// The slot of the device that memory is plugged by, which the VMM adds by itself.
const MEMORY_SLOT: u8 = 1;
/// Slots that are empty at first, for what is plugged later.
const EMPTY_SLOTS: u8 = 8;
/// Slots of a template that are empty beside these: for the share and for network cards, each of which a machine that boots
/// has a slot for.
const TEMPLATE_SLOTS: u8 = 5;
/// The slot of the socket device.
pub(super) const VSOCK_SLOT: u8 = 2;
/// The size of the guest's huge pages.
const HUGE_PAGE_MIB: u64 = 2;
/// The guest's context id. Each machine has a socket device of its own, so all may have the same.
const GUEST_CID: u32 = 3;

/// A process in its jail, without a machine yet.
pub(super) struct Started {
    pub(super) process: Process,
    pub(super) client: control::Client,
    pub(super) listener: UnixListener,
}

/// Starts the process. It waits for orders on a socket whose other end is here: should this process die before the
/// other one is in the record, it ends by itself.
pub(super) fn start(
    plan: &Plan<'_>,
    journal: &mut Journal,
    console: &Console,
) -> Result<Started, MachineError> {
    journal.record(Resource::File(plan.socket_record.clone()))?;
    let listener = UnixListener::bind(&plan.socket).map_err(host("listen for the guest"))?;
    let jail = plan.directory.join("jail.toml");
    journal.record(Resource::File(jail.clone()))?;
    fs::write(&jail, jail_file(plan)?).map_err(host("describe the jail"))?;

    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| host("make a control socket")(errno.into()))?;
    sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(ANSWER))
        .map_err(|errno| host("bound the control socket")(errno.into()))?;
    let log = console.writer(Speaker::Vmm).map_err(host("make a pipe"))?;
    let mut command = Command::new(&plan.programs.vmm);
    command.args(["--control-fd", "0", "--log-level", "warn", "--jail"]).arg(&jail).env_clear();
    command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::from(log));
    // Signals to the shim's group are not for it.
    command.process_group(0).kill_on_drop(true);
    let child = command.spawn().map_err(host(format!("start {:?}", plan.programs.vmm)))?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.ok_or_else(|| host("start the VMM")(std::io::Error::other("it ended at once")))?;
    let process = ProcessId::of(pid).map_err(host("look at the VMM's process"))?;
    journal.record(Resource::Process(process))?;
    let pidfd = Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
        .map_err(|errno| host("watch the VMM's process")(errno.into()))?;
    let process = Process::watch(child, pid.unsigned_abs(), pidfd);
    Ok(Started { process, client: control::Client::new(ours), listener })
}

/// Makes room for another process in the place of one that has ended without a machine.
pub(super) fn forget(plan: &Plan<'_>) -> Result<(), MachineError> {
    fs::remove_file(&plan.socket).map_err(host("remove the guest's socket"))
}

/// The kernel's. Huge pages that a container maps are taken from free memory when it does: none are kept for it before.
fn command_line(memory_mib: u64, more: &str) -> String {
    let huge_pages = memory_mib / HUGE_PAGE_MIB;
    format!("{COMMAND_LINE} sysctl.vm.nr_overcommit_hugepages={huge_pages} {more}").trim_end().to_owned()
}

fn jail_file(plan: &Plan<'_>) -> Result<String, MachineError> {
    let share = plan.share.clone();
    let config = match plan.ids {
        Some(ids) => JailConfig {
            share,
            uid: Some(ids.first),
            gid: Some(ids.first),
            id_count: ids.count,
            ..JailConfig::default()
        },
        None => JailConfig { share, user_namespace: false, ..JailConfig::default() },
    };
    toml::to_string(&config).map_err(|error| host("describe the jail")(std::io::Error::other(error)))
}

/// What the VMM is told to make, and the files that this names by their number.
pub(super) fn machine(
    plan: &mut Plan<'_>,
    listener: UnixListener,
    console: &Console,
) -> Result<(MachineConfig, Vec<OwnedFd>), MachineError> {
    let open = |path: &std::path::Path| fs::File::open(path).map_err(host(format!("open {path:?}")));
    let output = console.writer(Speaker::Guest).map_err(host("make a pipe"))?;
    let mut files = vec![
        output,
        open(&plan.programs.kernel)?.into(),
        open(&plan.programs.initramfs)?.into(),
        listener.into(),
    ];
    let shape = plan.shape;
    let mut devices = vec![
        DeviceConfig::Rng(Default::default()),
        // Gives back what the guest has freed.
        DeviceConfig::Balloon(Default::default()),
        socket_device(3),
    ];
    let mut empty_slots = MEMORY_SLOT + EMPTY_SLOTS;
    if plan.share.is_none() {
        empty_slots += TEMPLATE_SLOTS;
    }
    for (device, file) in pods_devices(plan)? {
        let number = u32::try_from(files.len()).unwrap_or(u32::MAX);
        devices.push(device(FileSource::Descriptor(number)));
        files.extend(file);
    }
    let config = MachineConfig {
        kernel: KernelConfig {
            image: FileSource::Descriptor(1),
            initramfs: Some(FileSource::Descriptor(2)),
            command_line: command_line(
                shape.boot.memory_mib.saturating_add(shape.hotplug_mib),
                &plan.programs.kernel_parameters,
            ),
            protocol: Default::default(),
        },
        memory: MemoryConfig {
            size_mib: shape.boot.memory_mib,
            hotplug_mib: shape.hotplug_mib,
            backing: Default::default(),
            huge_pages: Default::default(),
        },
        cpus: CpuConfig { boot: shape.boot.vcpus, max: shape.max_vcpus },
        console: ConsoleConfig { output: Some(FileSource::Descriptor(0)), ..ConsoleConfig::default() },
        slots: u8::try_from(devices.len()).unwrap_or(u8::MAX).saturating_add(empty_slots),
        control: Default::default(),
        devices,
    };
    Ok((config, files))
}

/// The device that the agent is reached by, on the file with this number.
pub(super) fn socket_device(number: u32) -> DeviceConfig {
    DeviceConfig::Vsock(VsockDevice {
        socket: FileSource::Descriptor(number),
        dialer: None,
        dialer_ports: Vec::new(),
        options: VsockConfig { guest_cid: GUEST_CID },
    })
}

/// A device, once it is known where its file is.
pub(super) type PodsDevice = (Box<dyn FnOnce(FileSource) -> DeviceConfig + Send>, Option<OwnedFd>);

/// The devices that are a pod's own, each with the file that it needs: its share and its network cards. A tap device is
/// gone with its last descriptor, which is to be the VMM's: none stays in the plan.
pub(super) fn pods_devices(plan: &mut Plan<'_>) -> Result<Vec<PodsDevice>, MachineError> {
    let mut devices: Vec<PodsDevice> = Vec::new();
    if plan.share.is_some() {
        let options = FsConfig { tag: SHARE_TAG.into(), ..FsConfig::default() };
        devices.push((Box::new(|_| DeviceConfig::Fs(FsDevice { directory: None, options })), None));
    }
    for Card { interface, tap } in plan.cards.drain(..) {
        let mac = interface.mac.0.try_into().map_err(|_| MachineError::Address(interface.name.clone()))?;
        let options = NetConfig {
            mac,
            mtu: u16::try_from(interface.mtu).ok(),
            receive_limits: Default::default(),
            send_limits: Default::default(),
        };
        devices.push((Box::new(|tap| DeviceConfig::Net(NetDevice { tap, options })), Some(tap)));
    }
    Ok(devices)
}

/// What the VMM is told to restore, and the files that this names by their number.
pub(super) fn restored(
    template: &Template,
    listener: UnixListener,
    console: &Console,
) -> Result<(RestoreCommand, Vec<OwnedFd>), MachineError> {
    let output = console.writer(Speaker::Guest).map_err(host("make a pipe"))?;
    let again = |file: &fs::File| file.try_clone().map_err(host("hand a template over"));
    let files =
        vec![output, again(&template.state)?.into(), again(&template.memory)?.into(), listener.into()];
    let command = RestoreCommand {
        state: FileSource::Descriptor(1),
        memory: FileSource::Descriptor(2),
        console: ConsoleConfig { output: Some(FileSource::Descriptor(0)), ..ConsoleConfig::default() },
        devices: vec![RestoredDevice { slot: VSOCK_SLOT, device: socket_device(3) }],
    };
    Ok((command, files))
}
