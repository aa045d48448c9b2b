//! Saving a machine and going on from what was saved.

use std::{fs::File, os::fd::AsFd, path::Path};

use anyhow::{Result, ensure};
use caisson_e2e::vmm::{Vmm, Workshop, run_to_end};
use caisson_vmm_api::{
    config::{BlockDevice, DeviceConfig, FileSource},
    control::protocol::{Resize, RestoreCommand, RestoredDevice},
};

/// Counts, and says how many of its processors have nested virtualization or performance counters.
const COUNTING: &str = "
    secret=$(cat /proc/sys/kernel/random/uuid)
    n=0
    while true; do
        flags=$(grep -c -w -E 'svm|npt|vmx|ept|arch_perfmon|perfctr_core' /proc/cpuinfo)
        echo \"tick $n of $secret with $flags\"; n=$((n + 1)); usleep 100000
    done";

fn save(vmm: &mut Vmm, state: &Path, memory: &Path) -> Result<()> {
    vmm.client.pause()?;
    let (state, memory) = (File::create(state)?, File::create(memory)?);
    vmm.client.snapshot(state.as_fd(), memory.as_fd())?;
    Ok(())
}

fn command(state: &Path, memory: &Path, devices: Vec<RestoredDevice>) -> RestoreCommand {
    RestoreCommand {
        state: FileSource::Path(state.into()),
        memory: FileSource::Path(memory.into()),
        console: Default::default(),
        devices,
    }
}

/// "tick N of SECRET" as (N, SECRET).
fn tick(line: &str) -> Result<(u32, String)> {
    let mut words = line.split_whitespace().skip(1);
    let count = words.next().unwrap_or_default().parse()?;
    Ok((count, words.nth(1).unwrap_or_default().to_owned()))
}

#[test]
fn any_number_of_machines_go_on_where_one_was_saved() -> Result<()> {
    let workshop = Workshop::new(COUNTING)?;
    let mut vmm = Vmm::boot(workshop.config("cpus.boot = 2\ncpus.max = 2\n[[devices]]\nrng = {}\n")?)?;
    vmm.expect("tick 3 of")?;
    let (state, memory) = (workshop.path("state"), workshop.path("memory"));
    save(&mut vmm, &state, &memory)?;
    vmm.client.resume()?;
    let line = vmm.expect("tick")?;
    ensure!(line.trim_end().ends_with(" with 0"), "nested virtualization or counters: {line}");
    let (saved_at, secret) = tick(&line)?;
    // The saved machine itself goes on as well.
    vmm.expect(&format!("tick {}", saved_at + 3))?;

    for _ in 0..3 {
        let mut copy = Vmm::restore(command(&state, &memory, Vec::new()))?;
        copy.client.resume()?;
        let line = copy.expect("tick")?;
        ensure!(line.trim_end().ends_with(" with 0"), "nested virtualization or counters: {line}");
        let (count, same) = tick(&line)?;
        ensure!(
            same == secret && count <= saved_at + 1,
            "{count} of {same}, saved at {saved_at} of {secret}"
        );
        copy.expect(&format!("tick {}", count + 5))?;
    }
    Ok(())
}

#[test]
fn a_disk_is_found_again_and_a_template_takes_a_new_one() -> Result<()> {
    let script = "
        echo ready
        while ! echo virtio-mmio.1 > /sys/bus/platform/drivers/virtio-mmio/bind 2>/dev/null; do usleep 20000; done
        echo first: $(head -n 1 /dev/vda) second: $(head -n 1 /dev/vdb)
        dd if=/dev/vda of=/dev/null bs=64k iflag=direct && echo all read
        sleep 1000";
    let workshop = Workshop::new(script)?;
    let first = workshop.disk("first", "one\n", 4 << 20)?;
    let second = workshop.disk("second", "two\n", 1 << 20)?;
    let block = |path: &Path| {
        DeviceConfig::Block(BlockDevice {
            files: vec![FileSource::Path(path.into())],
            options: Default::default(),
        })
    };
    let mut config = workshop.config("slots = 3\n")?;
    config.devices.push(block(&first));
    let mut vmm = Vmm::boot(config)?;
    vmm.expect("ready")?;
    let (state, memory) = (workshop.path("state"), workshop.path("memory"));
    save(&mut vmm, &state, &memory)?;
    drop(vmm);

    let devices = vec![RestoredDevice { slot: 0, device: block(&first) }];
    let mut copy = Vmm::restore(command(&state, &memory, devices))?;
    copy.client.resume()?;
    copy.client.plug(Some(1), block(&second), &[])?;
    copy.expect("first: one second: two")?;
    copy.expect("all read")?;
    Ok(())
}

#[test]
fn what_is_not_a_whole_snapshot_is_refused() -> Result<()> {
    let workshop = Workshop::new(COUNTING)?;
    let mut vmm = Vmm::boot(workshop.config("")?)?;
    vmm.expect("tick")?;
    let (state, memory) = (workshop.path("state"), workshop.path("memory"));
    let running = vmm.client.snapshot(File::create(&state)?.as_fd(), File::create(&memory)?.as_fd());
    ensure!(running.is_err());
    save(&mut vmm, &state, &memory)?;
    let good = std::fs::read(&state)?;
    let mut flipped = good.clone();
    flipped[100] ^= 1;
    let mut newer = good.clone();
    newer[8] = 9;
    for (bytes, says) in [
        (&good[..good.len() - 1], "truncated"),
        (&good[..10], "not a snapshot"),
        (b"something else entirely".as_slice(), "not a snapshot"),
        (&flipped, "damaged"),
        (&newer, "version 9"),
    ] {
        std::fs::write(&state, bytes)?;
        let error = Vmm::restore(command(&state, &memory, Vec::new())).err().map(|error| error.to_string());
        ensure!(error.as_deref().is_some_and(|error| error.contains(says)), "{says}: {error:?}");
    }
    std::fs::write(&state, &good)?;
    File::options().write(true).open(&memory)?.set_len(1 << 20)?;
    let error = Vmm::restore(command(&state, &memory, Vec::new())).err().map(|error| error.to_string());
    ensure!(error.as_deref().is_some_and(|error| error.contains("memory file")), "{error:?}");
    Ok(())
}

/// By a person, without a controller: the machine file that the machine was made from says what its devices
/// are on.
#[test]
fn a_saved_machine_goes_on_by_the_command_line() -> Result<()> {
    let script = "
        echo ready
        while [ \"$(dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | head -n 1)\" != go ]; do usleep 10000; done
        echo gone on";
    let workshop = Workshop::new(script)?;
    let disk = workshop.disk("disk", "wait\n", 1 << 20)?;
    let (console, socket, machine) =
        (workshop.path("console"), workshop.path("socket"), workshop.path("machine.toml"));
    let devices = format!("[[devices]]\nrng = {{}}\n[[devices]]\nblock.files = [{disk:?}]\n");
    let mut vmm = Vmm::boot(workshop.config(&devices)?)?;
    vmm.expect("ready")?;
    save(&mut vmm, &workshop.path("state"), &workshop.path("memory"))?;
    drop(vmm);

    workshop.disk("disk", "go\n", 1 << 20)?;
    let directory = workshop.path("");
    std::fs::write(
        &machine,
        format!(
            "kernel.image = '/nonexistent'\nmemory.size_mib = 128\nconsole.output = {console:?}\n\
             control.socket = {socket:?}\n{devices}"
        ),
    )?;
    let arguments = ["--restore".as_ref(), directory.as_os_str(), "--config".as_ref(), machine.as_os_str()];
    for jailed in [false, true] {
        let (code, stderr) = run_to_end(arguments, jailed)?;
        let said = std::fs::read_to_string(&console)?;
        ensure!(
            code == 12 && said.contains("gone on"),
            "jailed {jailed}: exit code {code}: {stderr}\n{said}"
        );
        ensure!(!socket.exists(), "jailed {jailed}: the control socket is still there");
        std::fs::remove_file(&console)?;
    }
    // Without the machine file, the disk is missed.
    let (code, stderr) = run_to_end(["--restore".as_ref(), directory.as_os_str()], false)?;
    ensure!(code == 1 && stderr.lines().count() == 1, "exit code {code}: {stderr}");
    for (content, says) in [(&b"something else"[..], "not a snapshot"), (b"", "not a snapshot")] {
        std::fs::write(workshop.path("state"), content)?;
        for jailed in [false, true] {
            let (code, stderr) = run_to_end(arguments, jailed)?;
            ensure!(code == 1 && stderr.lines().count() == 1 && stderr.contains(says), "{code}: {stderr}");
            ensure!(!socket.exists(), "jailed {jailed}: the control socket is still there");
        }
    }
    Ok(())
}

/// Everything that a controller can ask for, with every thread's system call filter in place.
#[test]
fn a_jailed_machine_is_resized_plugged_and_saved() -> Result<()> {
    let workshop = Workshop::new(COUNTING)?;
    let mut config = workshop.config("slots = 6\ncpus.max = 2\nmemory.hotplug_mib = 256\n")?;
    config.devices.push(DeviceConfig::Rng(Default::default()));
    config.devices.push(DeviceConfig::Balloon(Default::default()));
    let mut vmm = Vmm::boot_jailed(config, &workshop)?;
    vmm.expect("tick 1 of")?;
    vmm.client.resize(Resize { cpus: Some(2), plugged_mib: Some(128), balloon_mib: Some(8) })?;
    let path = workshop.disk("disk", "content", 1 << 20)?;
    let disk = File::options().read(true).write(true).open(path)?;
    let device = BlockDevice { files: vec![FileSource::Descriptor(0)], options: Default::default() };
    vmm.client.plug(Some(5), DeviceConfig::Block(device), &[disk.as_fd()])?;
    vmm.client.unplug(5, false)?;
    vmm.client.metrics()?;
    vmm.expect("tick 9 of")?;
    let (state, memory) = (workshop.path("state"), workshop.path("memory"));
    save(&mut vmm, &state, &memory)?;
    vmm.client.resume()?;
    let (count, _) = tick(&vmm.expect("tick")?)?;
    vmm.expect(&format!("tick {}", count + 3))?;
    vmm.client.shutdown()?;
    ensure!(vmm.wait()?.success());

    let mut copy = Vmm::restore(command(&state, &memory, Vec::new()))?;
    copy.client.resume()?;
    copy.expect(&format!("tick {}", count + 3))?;
    Ok(())
}
