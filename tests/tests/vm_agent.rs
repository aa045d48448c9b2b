//! The agent as PID 1 of a guest in our own VMM: containers, devices, restores, the end.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containers::{self, Pod, Root, pod_spec, process},
    leaks::Holdings,
    pod_vm::PodVm,
    vmm::PATIENCE,
};
use caisson_protocol::v1;
use caisson_vmm_api::control::protocol::Resize;
use tonic::Code;

#[tokio::test]
async fn the_agent_is_pid_1_and_ends_the_machine_in_order() -> Result<()> {
    let mut vm = PodVm::boot("").await?;
    let details = vm.client.agent().guest_details(v1::GuestDetailsRequest {}).await?.into_inner();
    println!("{details:?}");
    let health = vm.client.agent().health(v1::HealthRequest {}).await?.into_inner();
    ensure!(health.faults.is_empty(), "{health:?}");
    vm.client.sandbox().shutdown(v1::ShutdownRequest::default()).await?;
    let status = vm.vmm.wait()?;
    ensure!(status.success(), "the VMM ended with {status}; {}", vm.vmm.tail());
    Ok(())
}

#[tokio::test]
async fn busybox_runs_in_a_machine() -> Result<()> {
    let mut vm = PodVm::boot("").await?;
    let pod = vm.pod().await?;
    containers::output_and_exit_code_arrive(&pod).await.context("output")?;
    containers::a_terminal_has_a_size_and_both_directions(&pod).await.context("terminal")?;
    containers::execs_and_signals_reach_a_running_container(&pod).await.context("exec")?;
    containers::too_much_memory_is_reported(&pod).await.context("memory")?;
    containers::a_hundred_megabytes_go_through_a_container_intact(&pod).await.context("100 MB")?;
    Ok(())
}

/// What a guest says that must differ between two: random bytes, identifiers, and the ports that the kernel chooses
/// for connections and for listeners.
async fn draws(vm: &PodVm, pod: &Pod) -> Result<Vec<String>> {
    let script = "head -c 32 /dev/urandom | hexdump -v -e '1/1 \"%02x\"'; echo; \
                  cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id";
    let mut drawn: Vec<_> = pod.output("draws", script).await?.lines().map(str::to_owned).collect();
    // The kernel's choice for a connection depends on its destination: two of them make a chance match impossible.
    let script = "for host in 127.0.0.1 127.0.0.2; do
            httpd -p $host:8080 -h /proc
            sleep 100 | nc $host 8080 >/dev/null &
        done
        for try in 1 2 3 4; do nc -l 127.0.0.1 >/dev/null & done
        sleep 2; cat /proc/net/tcp";
    let sockets = pod.output_of("ports", &pod_spec(&process(script, false), &vm.sandbox)?).await?;
    let (clients, listeners) = ports(&sockets);
    ensure!(clients.len() >= 2 && listeners.len() >= 4, "{sockets}");
    drawn.extend([clients.join(" "), listeners.join(" ")]);
    Ok(drawn)
}

/// Ports of /proc/net/tcp, in hexadecimal: those of clients of port 8080, and those that are listened on.
fn ports(table: &str) -> (Vec<String>, Vec<String>) {
    /// 8080.
    const SERVER: &str = "1F90";
    let (mut clients, mut listeners) = (Vec::new(), Vec::new());
    for line in table.lines().skip(1) {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, local, remote, state, ..] = fields[..] else { continue };
        let port = |address: &str| address.rsplit(':').next().unwrap_or_default().to_owned();
        match (port(local), port(remote)) {
            (local, _) if state == "0A" && local != SERVER => listeners.push(local),
            (local, remote) if local == SERVER && state != "0A" => clients.push(remote),
            (local, remote) if remote == SERVER => clients.push(local),
            _ => {}
        }
    }
    // Both ends of a connection are in the table.
    clients.sort();
    clients.dedup();
    listeners.sort();
    (clients, listeners)
}

#[tokio::test]
async fn clones_of_one_guest_never_draw_the_same() -> Result<()> {
    let template = PodVm::boot("").await?.into_template()?;
    let mut seen = BTreeSet::new();
    for number in 0..3 {
        let mut vm = template.clone_it(10 + number).await?;
        let entropy = std::fs::read("/proc/sys/kernel/random/uuid")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let request = v1::AfterRestoreRequest {
            entropy,
            realtime_ns: i64::try_from(now.as_nanos())?,
            hostname: format!("clone-{number}"),
            machine_id: String::new(),
            slots: Vec::new(),
        };
        let told = vm.client.machine().after_restore(request).await?.into_inner();
        let pod = vm.pod().await?;
        let drawn = draws(&vm, &pod).await?;
        ensure!(drawn.len() == 5, "{drawn:?}");
        for each in drawn.iter().chain([&told.machine_id]) {
            ensure!(seen.insert(each.clone()), "{each} was drawn twice");
        }
        ensure!(drawn[2] == told.boot_id, "the boot id is {} and was said to be {}", drawn[2], told.boot_id);
        let host = pod.output("host", "hostname; date +%s").await?;
        let (name, seconds) = host.split_once('\n').context("two lines")?;
        ensure!(name == format!("clone-{number}"), "{host}");
        let behind =
            SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() - seconds.trim().parse::<u64>()?;
        ensure!(behind < 20, "the guest's clock is {behind} s behind");
    }
    Ok(())
}

#[tokio::test]
async fn processors_and_memory_come_and_go() -> Result<()> {
    let mut vm = PodVm::boot("memory.hotplug_mib = 256\ncpus.max = 3\n").await?;
    let before = memory_kib(&vm).await?;
    vm.vmm.client.resize(Resize { cpus: Some(3), plugged_mib: Some(256), ..Resize::default() })?;
    let mut machine = vm.client.machine();
    let online = machine.online_cpus(v1::OnlineCpusRequest { count: 3 }).await?.into_inner().online;
    ensure!(online == 3, "{online} processors");
    let refused = machine.online_cpus(v1::OnlineCpusRequest { count: 4 }).await.err().map(|e| e.code());
    ensure!(refused == Some(Code::InvalidArgument), "{refused:?}");
    eventually("memory has grown", || async { Ok(memory_kib(&vm).await? > before + 200_000) }).await?;
    let fewer = machine.online_cpus(v1::OnlineCpusRequest { count: 1 }).await?.into_inner().online;
    ensure!(fewer == 1, "{fewer} processors");
    vm.vmm.client.resize(Resize { plugged_mib: Some(0), ..Resize::default() })?;
    eventually("memory has shrunk", || async { Ok(memory_kib(&vm).await? < before + 50_000) }).await
}

#[tokio::test]
async fn the_clock_and_the_entropy_are_the_hosts_to_set() -> Result<()> {
    const DAY: u64 = 86_400;
    let mut vm = PodVm::boot("").await?;
    let pod = vm.pod().await?;
    let mut machine = vm.client.machine();
    let tomorrow = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() + DAY;
    let realtime_ns = i64::try_from(tomorrow)? * 1_000_000_000;
    machine.set_time(v1::SetTimeRequest { realtime_ns }).await?;
    let seconds: u64 = pod.output("date", "date +%s").await?.trim().parse()?;
    ensure!((tomorrow..tomorrow + 60).contains(&seconds), "{seconds} after {tomorrow}");
    for realtime_ns in [0, -1] {
        let refused = machine.set_time(v1::SetTimeRequest { realtime_ns }).await.err().map(|e| e.code());
        ensure!(refused == Some(Code::InvalidArgument), "{refused:?}");
    }
    machine.reseed(v1::ReseedRequest { entropy: vec![7; 32] }).await?;
    let refused = machine.reseed(v1::ReseedRequest { entropy: vec![7; 31] }).await.err().map(|e| e.code());
    ensure!(refused == Some(Code::InvalidArgument), "{refused:?}");

    // The image's disk is plugged; other slots are empty, or not there.
    let devices = machine.list_devices(v1::ListDevicesRequest {}).await?.into_inner().devices;
    ensure!(devices.iter().any(|device| (device.virtio_id, &*device.interface) == (2, "vda")), "{devices:?}");
    let empty = devices.iter().find(|device| device.virtio_id == 0).context("an empty slot")?.slot;
    for (slot, code) in [(empty, Code::FailedPrecondition), (255, Code::NotFound), (1 << 20, Code::NotFound)]
    {
        let refused = machine.plug_device(v1::PlugDeviceRequest { slot }).await.err().map(|e| e.code());
        ensure!(refused == Some(code), "slot {slot}: {refused:?}");
    }
    let storages =
        vm.client.storages().list_storages(v1::ListStoragesRequest {}).await?.into_inner().storages;
    ensure!(storages.len() == 1 && storages[0].container_id.is_empty(), "{storages:?}");
    Ok(())
}

async fn memory_kib(vm: &PodVm) -> Result<u64> {
    let details = vm.client.agent().guest_details(v1::GuestDetailsRequest {}).await?.into_inner();
    Ok(details.memory_total / 1024)
}

async fn eventually<F: Future<Output = Result<bool>>>(
    what: &str,
    mut holds: impl FnMut() -> F,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await? {
        ensure!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_container_lives_in_a_directory_of_the_host() -> Result<()> {
    let mut vm = PodVm::boot("").await?;
    vm.pod().await?;
    let shared = tempfile::tempdir()?;
    containers::busybox_root(shared.path())?;
    let slot = vm.plug_share(shared.path(), "root").await?;
    let pod = Pod { client: vm.client.clone(), root: Root::Directory(vm.mount_share("root").await?) };
    containers::output_and_exit_code_arrive(&pod).await?;
    containers::a_terminal_has_a_size_and_both_directions(&pod).await?;
    pod.output("writer", "echo from inside > /tmp/file; cat /bin/busybox > /tmp/copy").await?;
    ensure!(std::fs::read_to_string(shared.path().join("tmp/file"))? == "from inside\n");
    ensure!(std::fs::read(shared.path().join("tmp/copy"))? == std::fs::read("/bin/busybox")?);

    let mut machine = vm.client.machine();
    let busy = machine.unplug_device(v1::UnplugDeviceRequest { slot }).await.err().map(|e| e.code());
    ensure!(busy == Some(Code::FailedPrecondition), "{busy:?}");
    vm.client.storages().unmount_storage(v1::UnmountStorageRequest { id: "root".into() }).await?;
    machine.unplug_device(v1::UnplugDeviceRequest { slot }).await?;
    vm.vmm.client.unplug(u8::try_from(slot)?, false)?;
    Ok(())
}

/// For hours, if asked to: guests come up, run a container from a disk and one from a directory, and go; nothing of
/// them stays.
#[tokio::test]
#[ignore = "a soak: `cargo xtask test --soak`"]
async fn a_hundred_guests_leave_nothing() -> Result<()> {
    let before = Holdings::now()?;
    for round in 0..100 {
        let mut vm = PodVm::boot("").await.with_context(|| format!("round {round}"))?;
        let pod = vm.pod().await?;
        ensure!(pod.output("one", "echo from a disk").await? == "from a disk\n");
        let shared = tempfile::tempdir()?;
        containers::busybox_root(shared.path())?;
        vm.plug_share(shared.path(), "root").await?;
        let pod = Pod { client: vm.client.clone(), root: Root::Directory(vm.mount_share("root").await?) };
        ensure!(pod.output("two", "echo from a directory").await? == "from a directory\n");
        vm.client.sandbox().shutdown(v1::ShutdownRequest::default()).await?;
        ensure!(vm.vmm.wait()?.success());
    }
    before.assert_nothing_added()
}
