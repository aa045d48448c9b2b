//! The machine: boot, ends, bad input, hotplug, processors, memory.

use std::{
    fs::File,
    io::Write,
    os::{fd::AsFd, unix::fs::FileExt},
    time::Duration,
};

use anyhow::{Result, ensure};
use caisson_e2e::{
    node::Product,
    vmm::{Vmm, Workshop, run_machine_file},
};
use caisson_vmm_api::{
    config::{BlockDevice, DeviceConfig, FileSource},
    control::protocol::Resize,
    exit::ExitReason,
};

#[test]
fn boots_to_user_space_and_reports_the_guests_reset() -> Result<()> {
    // The host that this runs on has SVM; what the guest must not be offered of it is looked for by its flags.
    let workshop = Workshop::new(
        "echo up: $(nproc) processor, $(cat /proc/uptime)
         echo flags: $(grep -m1 -c '^flags.* fpu ' /proc/cpuinfo) kept, \
             $(grep -m1 -owE 'vmx|svm|npt|flushbyasid|arch_perfmon|monitor' /proc/cpuinfo | wc -l) forbidden",
    )?;
    let mut vmm = Vmm::boot(workshop.config("")?)?;
    vmm.expect("up: 1 processor")?;
    vmm.expect("flags: 1 kept, 0 forbidden")?;
    ensure!(vmm.client.wait()? == ExitReason::TripleFault);
    let status = vmm.wait()?;
    ensure!(status.code() == Some(12), "{status}");
    Ok(())
}

/// Anonymous memory of a process outside its largest mapping, which is the guest's memory, in KiB
/// (proc_pid_smaps(5)).
fn private_kib(pid: u32) -> Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            mappings.push((u64::from_str_radix(end, 16)? - u64::from_str_radix(start, 16)?, 0));
        } else if let (Some((_, kib)), "Anonymous:") = (mappings.last_mut(), first) {
            *kib = words.next().unwrap_or_default().parse()?;
        }
    }
    mappings.sort_unstable();
    mappings.pop();
    Ok(mappings.iter().map(|(_, kib)| kib).sum())
}

/// What each pod costs its node on top of its guest.
#[test]
fn a_machine_is_small() -> Result<()> {
    let workshop = Workshop::new("echo up; sleep 1000")?;
    let mut vmm = Vmm::boot(workshop.config("[[devices]]\nrng = {}\n[[devices]]\nballoon = {}\n")?)?;
    vmm.expect("up")?;
    let private = private_kib(vmm.pid())?;
    ensure!(private <= 512, "{private} KiB of private memory");
    println!("{private} KiB of private memory");
    Ok(())
}

#[test]
#[ignore = "about the size of what is shipped, which only soaks build"]
fn the_binary_is_small() -> Result<()> {
    let binary = std::fs::metadata(Product::Vmm.path()?)?.len();
    ensure!(binary <= 3_000_000, "the binary has {binary} bytes");
    Ok(())
}

#[test]
fn boots_by_pvh_too() -> Result<()> {
    let workshop = Workshop::new("echo up")?;
    let mut vmm = Vmm::boot(workshop.config("kernel.protocol = 'pvh'\n")?)?;
    vmm.expect("up")?;
    Ok(())
}

#[test]
fn ends_when_told_to() -> Result<()> {
    let workshop = Workshop::new("echo up; sleep 1000")?;
    let mut vmm = Vmm::boot(workshop.config("")?)?;
    vmm.expect("up")?;
    vmm.client.shutdown()?;
    ensure!(vmm.wait()?.success());
    Ok(())
}

#[test]
fn bad_input_is_one_line_and_leaves_nothing() -> Result<()> {
    let workshop = Workshop::new("")?;
    let kernel = Product::Kernel.path()?;
    let directory = tempfile::tempdir()?;
    let text_file = workshop.disk("text", "this is no kernel", 4096)?;
    let used = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&used)?;
    let part = workshop.disk("part", "no whole number of sectors", 1000)?;
    let elsewhere = workshop.path("elsewhere");
    let good = format!("kernel.image = {kernel:?}\nmemory.size_mib = 64\n");
    for (machine, says) in [
        (
            "kernel.image = '/nonexistent'\nmemory.size_mib = 64\n".to_owned(),
            "kernel.image: opening /nonexistent",
        ),
        (format!("kernel.image = {text_file:?}\nmemory.size_mib = 64\n"), "neither"),
        (format!("kernel.image = {kernel:?}\nmemory.size_mib = 0\n"), "memory.size_mib"),
        (format!("{good}cpus.max = 255\n"), "cpus.max"),
        (format!("{good}cpus.boot = 9\ncpus.max = 4\n"), "cpus.boot"),
        (format!("{good}cpus.max = 0\n"), "cpus.max"),
        (format!("{good}cpus.max = 100000\n"), "cpus.max"),
        (format!("{good}[[devices]]\nblock.files = ['/nonexistent']\n"), "devices[0].block.files[0]"),
        (
            format!("{good}[[devices]]\nrng = {{}}\n[[devices]]\nblock.files = ['/etc']\n"),
            "devices[1].block.files[0]",
        ),
        (
            format!("{good}[[devices]]\nblock.files = ['/dev/null']\n"),
            "neither a regular file nor a block device",
        ),
        (format!("{good}[[devices]]\nblock.files = [{part:?}]\n"), "multiple of 512"),
        (
            format!("{good}[[devices]]\nnet.tap = 'none-such'\nnet.options.mac = '02:00:00:00:00:01'\n"),
            "net.tap",
        ),
        (format!("{good}[[devices]]\nnet.tap = 'lo'\nnet.options.mac = '02:00:00:00:00:01'\n"), "net.tap"),
        (format!("{good}control.socket = {used:?}\n"), "control.socket"),
        (
            format!(
                "{good}control.socket = {elsewhere:?}\n\
                 [[devices]]\nvsock.socket = {used:?}\nvsock.options.guest_cid = 3\n"
            ),
            "devices[0].vsock.socket",
        ),
        (
            format!(
                "{good}control.socket = {used:?}\n\
                 [[devices]]\nvsock.socket = {elsewhere:?}\nvsock.options.guest_cid = 3\n"
            ),
            "control.socket",
        ),
        (format!("{good}colour = 'blue'\n"), "colour"),
        (format!("kernel.image = {kernel:?}\nmemory.size_mib = 16\n"), "loading the kernel into 16 MiB"),
    ] {
        for jailed in [false, true] {
            let (code, stderr) = run_machine_file(&machine, directory.path(), jailed)?;
            ensure!(code == 1, "{says}, jailed {jailed}: exit code {code}: {stderr}");
            let one = stderr.lines().count() == 1 && stderr.starts_with("caisson-vmm: ");
            ensure!(one && stderr.contains(says), "{says}, jailed {jailed}: {stderr}");
            ensure!(!elsewhere.exists(), "{says}, jailed {jailed}: its socket is left");
        }
    }
    let left: Vec<_> =
        std::fs::read_dir(directory.path())?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.len() == 2, "left behind: {left:?}");
    Ok(())
}

/// The guest does what a mailbox (its first disk, in slot 0) says: bind the driver of slot 2 and read the
/// disk there; then see that the slot is empty.
const HOTPLUG_GUEST: &str = "
driver=/sys/bus/platform/drivers/virtio-mmio
wait_for() {
    while [ \"$(dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | head -n 1)\" != \"$1\" ]; do
        usleep 1000
    done
}
n=0
echo ready
while [ $n -lt 100 ]; do
    wait_for \"plugged $n\"
    echo virtio-mmio.2 > $driver/bind
    echo \"round $n: $(head -n 1 /dev/vdb)\"
    echo virtio-mmio.2 > $driver/unbind
    echo \"released $n\"
    wait_for \"unplugged $n\"
    echo virtio-mmio.2 2>/dev/null > $driver/bind && echo virtio: still there
    echo \"empty $n\"
    n=$((n + 1))
done
echo finished
sleep 1000
";

#[test]
fn a_slot_is_filled_and_emptied_a_hundred_times() -> Result<()> {
    let workshop = Workshop::new(HOTPLUG_GUEST)?;
    let mailbox = workshop.disk("mailbox", "", 4096)?;
    let say = |text: String| -> Result<()> {
        File::options().write(true).open(&mailbox)?.write_all_at(format!("{text}\n").as_bytes(), 0)?;
        Ok(())
    };
    let config = workshop.config(&format!("slots = 4\n[[devices]]\nblock.files = [{mailbox:?}]\n"))?;
    let mut vmm = Vmm::boot(config)?;
    vmm.expect("ready")?;
    for round in 0..100 {
        let path = workshop.disk("disk", &format!("content {round}\n"), 1 << 20)?;
        let file = File::options().read(true).write(true).open(path)?;
        let disk = BlockDevice { files: vec![FileSource::Descriptor(0)], options: Default::default() };
        let (slot, name) = vmm.client.plug(Some(2), DeviceConfig::Block(disk), &[file.as_fd()])?;
        ensure!((slot, name.as_str()) == (2, "virtio-mmio.2"));
        say(format!("plugged {round}"))?;
        let line = vmm.expect(&format!("round {round}:"))?;
        ensure!(line.contains(&format!("content {round}")), "{}", vmm.tail());
        vmm.expect(&format!("released {round}"))?;
        vmm.client.unplug(2, false)?;
        say(format!("unplugged {round}"))?;
        vmm.expect(&format!("empty {round}"))?;
    }
    vmm.expect("finished")?;
    let noise: Vec<_> = vmm.transcript.iter().filter(|line| line.contains("virtio")).collect();
    ensure!(noise.is_empty(), "{noise:#?}");
    Ok(())
}

#[test]
fn a_bound_device_is_not_taken_away_unasked() -> Result<()> {
    let workshop = Workshop::new("head -n 1 /dev/vda; sleep 1000")?;
    let disk = workshop.disk("disk", "on the disk\n", 1 << 20)?;
    let mut vmm = Vmm::boot(workshop.config(&format!("[[devices]]\nblock.files = [{disk:?}]\n"))?)?;
    vmm.expect("on the disk")?;
    ensure!(vmm.client.unplug(0, false).is_err());
    ensure!(vmm.client.unplug(3, false).is_err());
    vmm.client.unplug(0, true)?;
    let disk = BlockDevice { files: vec![FileSource::Descriptor(0)], options: Default::default() };
    ensure!(vmm.client.plug(Some(200), DeviceConfig::Block(disk), &[]).is_err());
    vmm.client.metrics()?;
    Ok(())
}

#[test]
fn a_disk_grows_while_it_is_used() -> Result<()> {
    let workshop = Workshop::new(
        "echo size: $(cat /sys/block/vda/size)
        while [ $(cat /sys/block/vda/size) = 2048 ]; do usleep 10000; done
        echo size: $(cat /sys/block/vda/size)
        dd if=/dev/vda bs=512 skip=8191 count=1 2>/dev/null | head -n 1
        sleep 1000",
    )?;
    let disk = workshop.disk("disk", "", 1 << 20)?;
    let config = format!("[[devices]]\nrng = {{}}\n[[devices]]\nblock.files = [{disk:?}]\n");
    let mut vmm = Vmm::boot(workshop.config(&config)?)?;
    vmm.expect("size: 2048")?;
    ensure!(vmm.client.refresh_capacity(1)? == 1 << 20, "it has not changed yet");
    let file = File::options().write(true).open(&disk)?;
    file.set_len(4 << 20)?;
    file.write_all_at(b"at the new end\n", (4 << 20) - 512)?;
    ensure!(vmm.client.refresh_capacity(1)? == 4 << 20);
    vmm.expect("size: 8192")?;
    vmm.expect("at the new end")?;
    file.set_len((4 << 20) + 100)?;
    for (slot, says) in [(0, "no disk"), (1, "multiple of 512"), (2, "no disk"), (99, "no slot 99")] {
        let error = vmm.client.refresh_capacity(slot).map_err(|error| error.to_string());
        ensure!(error.as_ref().is_err_and(|error| error.contains(says)), "{says}: {error:?}");
    }
    Ok(())
}

#[test]
fn what_is_typed_reaches_the_guest() -> Result<()> {
    let workshop = Workshop::new("stty -echo; echo ready; while read line; do echo \"heard <$line>\"; done")?;
    let mut config = workshop.config("")?;
    config.console.input = Some(FileSource::Descriptor(1));
    let (reader, mut writer) = std::io::pipe()?;
    let mut vmm = Vmm::boot_with(config, &[reader.as_fd()])?;
    drop(reader);
    vmm.expect("ready")?;
    let long = "x".repeat(900);
    for number in 0..20 {
        writeln!(writer, "{number} {long}")?;
    }
    for number in 0..20 {
        vmm.expect(&format!("heard <{number} {long}>"))?;
    }
    drop(writer);
    vmm.client.metrics()?;
    Ok(())
}

#[test]
fn processors_are_added_when_asked_for() -> Result<()> {
    let script = "
        echo ready: $(cat /sys/devices/system/cpu/present) $(cat /sys/devices/system/cpu/online)
        for cpu in 1 2 3; do
            echo 1 > /sys/devices/system/cpu/cpu$cpu/online && echo online: $(cat /sys/devices/system/cpu/online)
        done
        for cpu in 0 1 2 3; do taskset -p $((1 << cpu)) $$ > /dev/null; echo on cpu $cpu; done
        echo 0 > /sys/devices/system/cpu/cpu2/online; echo then: $(cat /sys/devices/system/cpu/online)
        echo 1 > /sys/devices/system/cpu/cpu2/online; echo again: $(cat /sys/devices/system/cpu/online)
        sleep 1000";
    let workshop = Workshop::new(&format!("sleep 1\n{script}"))?;
    let mut vmm = Vmm::boot(workshop.config("cpus.max = 4\n")?)?;
    ensure!(vmm.client.resize(Resize { cpus: Some(5), ..Resize::default() }).is_err());
    vmm.client.resize(Resize { cpus: Some(4), ..Resize::default() })?;
    vmm.expect("ready: 0-3 0")?;
    vmm.expect("online: 0-3")?;
    vmm.expect("on cpu 3")?;
    vmm.expect("then: 0-1,3")?;
    vmm.expect("again: 0-3")?;
    Ok(())
}

#[test]
fn memory_is_plugged_and_unplugged() -> Result<()> {
    let script = "
        echo ready
        wait_for() { while ! [ $(awk '/MemTotal/ {print $2}' /proc/meminfo) $1 $2 ]; do usleep 50000; done; }
        wait_for -gt 300000; echo grown
        wait_for -lt 200000; echo shrunk
        sleep 1000";
    let workshop = Workshop::new(script)?;
    let config = workshop.config("memory.hotplug_mib = 512\n")?;
    let mut vmm = Vmm::boot(config)?;
    vmm.expect("ready")?;
    vmm.client.resize(Resize { plugged_mib: Some(256), ..Resize::default() })?;
    vmm.expect("grown")?;
    vmm.client.resize(Resize { plugged_mib: Some(0), ..Resize::default() })?;
    vmm.expect("shrunk")?;
    Ok(())
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() -> Result<()> {
    let workshop = Workshop::new("n=0; while true; do echo tick $n; n=$((n + 1)); usleep 100000; done")?;
    let mut vmm = Vmm::boot(workshop.config("")?)?;
    for _ in 0..5 {
        vmm.expect("tick")?;
        vmm.client.pause()?;
        vmm.client.pause()?;
        std::thread::sleep(Duration::from_millis(50));
        vmm.client.resume()?;
        vmm.client.resume()?;
    }
    vmm.expect("tick")?;
    Ok(())
}

#[test]
fn a_jailed_machine_does_all_that_a_free_one_does() -> Result<()> {
    let workshop = Workshop::new(
        "head -n 1 /dev/vda; dd if=/dev/zero of=/dev/vda bs=64k count=4 oflag=direct; head -c 64 /dev/hwrng | wc -c
         echo all done",
    )?;
    let (kernel, initramfs) = (Product::Kernel.path()?, workshop.path("initramfs"));
    let disk = workshop.disk("disk", "on the disk\n", 1 << 20)?;
    let (console, socket) = (workshop.path("console"), workshop.path("socket"));
    for jailed in [false, true] {
        let machine = format!(
            "kernel.image = {kernel:?}\nkernel.initramfs = {initramfs:?}\nkernel.command_line = 'console=ttyS0 quiet'\n\
             memory.size_mib = 128\nconsole.output = {console:?}\ncontrol.socket = {socket:?}\ncpus.boot = 2\ncpus.max = 2\n\
             [[devices]]\nblock.files = [{disk:?}]\n[[devices]]\nrng = {{}}\n[[devices]]\nballoon = {{}}\n"
        );
        let directory = tempfile::tempdir()?;
        let (code, stderr) = run_machine_file(&machine, directory.path(), jailed)?;
        let said = std::fs::read_to_string(&console)?;
        ensure!(code == 12, "jailed {jailed}: exit code {code}: {stderr}\n{said}");
        ensure!(said.contains("all done"), "jailed {jailed}: {said}");
        ensure!(!socket.exists(), "jailed {jailed}: the control socket is still there");
        std::fs::remove_file(&console)?;
        workshop.disk("disk", "on the disk\n", 1 << 20)?;
    }
    Ok(())
}
