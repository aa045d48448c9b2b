//! Network cards: what goes through the tap arrives whole in both directions, with offloads and large frames.

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::fd::AsFd,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    net::{NamedTap, ip, tap},
    vmm::{PATIENCE, Vmm, Workshop},
};
use caisson_vmm_api::config::{DeviceConfig, FileSource, NetDevice};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike},
};

const STREAM: usize = 24 << 20;

/// Bytes in which a lost, doubled or moved piece shows.
fn stream() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = (0..STREAM / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

fn sha256(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("sha256sum")?;
    child.stdin.take().context("no pipe")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Streams both ways through a card with this MTU, on a subnet of its own.
fn streams_arrive_whole(name: &str, subnet: u8, mtu: u16) -> Result<()> {
    let tap = tap(name)?;
    let host = format!("10.92.{subnet}.1");
    ip(&format!("addr add {host}/24 dev {name}"))?;
    ip(&format!("link set {name} mtu {mtu} up"))?;
    let down = TcpListener::bind((host.as_str(), 7001))?;
    let up = TcpListener::bind((host.as_str(), 7002))?;
    for listener in [&down, &up] {
        // For accept(2); a guest that never connects must not keep a thread.
        setsockopt(listener, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().try_into()?))?;
    }
    let sent = stream();
    let sum = sha256(&sent)?;
    thread::spawn(move || {
        let (mut stream, _) = down.accept()?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(&sent)
    });
    let received = thread::spawn(move || {
        let (mut stream, _) = up.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).map(|_| bytes)
    });

    let large = mtu - 100;
    let workshop = Workshop::new(&format!(
        "ip addr add 10.92.{subnet}.2/24 dev eth0; ip link set eth0 up
        echo mtu: $(cat /sys/class/net/eth0/mtu) $(cat /sys/class/net/eth0/address)
        ping -c 3 -W 10 {host} >/dev/null && echo pinged
        ping -c 2 -W 10 -s {large} {host} >/dev/null && echo pinged large
        echo down: $(nc {host} 7001 | sha256sum)
        dd if=/dev/urandom of=/up bs=1M count=24 2>/dev/null
        echo up: $(sha256sum < /up)
        nc {host} 7002 < /up
        echo errors: $(cat /sys/class/net/eth0/statistics/rx_errors /sys/class/net/eth0/statistics/tx_errors)"
    ))?;
    let net = format!(
        "[[devices]]\nnet.tap = 'fd:1'\nnet.options.mac = '02:00:00:00:92:02'\nnet.options.mtu = {mtu}\n"
    );
    let mut vmm = Vmm::boot_with(workshop.config(&net)?, &[tap.as_fd()])?;
    let told = vmm.expect("mtu:")?;
    ensure!(told.contains(&format!("mtu: {mtu} 02:00:00:00:92:02")), "{told}");
    vmm.expect("pinged")?;
    vmm.expect("pinged large")?;
    let down = vmm.expect("down:")?;
    ensure!(down.contains(&sum), "{down}, but the host sent {sum}");
    let up = vmm.expect("up:")?;
    let errors = vmm.expect("errors:")?;
    ensure!(errors.contains("errors: 0 0"), "{errors}");
    let received = received.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    let sum = sha256(&received)?;
    ensure!(up.contains(&sum), "{up}, but the host received {} bytes with {sum}", received.len());
    Ok(())
}

/// As a person does who has a machine's control socket and a tap device.
#[test]
fn a_card_is_plugged_by_the_name_of_its_tap() -> Result<()> {
    let _tap = NamedTap::new("e2e-named", "10.92.4.1/24")?;
    let workshop = Workshop::new(
        "echo ready
        while ! echo virtio-mmio.2 > /sys/bus/platform/drivers/virtio-mmio/bind 2>/dev/null; do usleep 20000; done
        ip addr add 10.92.4.2/24 dev eth0; ip link set eth0 up
        ping -c 3 -W 10 10.92.4.1 >/dev/null && echo pinged
        sleep 1000",
    )?;
    let mut vmm = Vmm::boot(workshop.config("slots = 3\n")?)?;
    vmm.expect("ready")?;
    let mut card = |name: &str| {
        let options = serde_json::from_str(r#"{"mac": "02:00:00:00:92:04"}"#)?;
        let device = NetDevice { tap: FileSource::Path(name.into()), options };
        anyhow::Ok(vmm.client.plug(Some(2), DeviceConfig::Net(device), &[])?)
    };
    ensure!(card("e2e-none").is_err(), "there is no such tap");
    ensure!(card("lo").is_err(), "that is none");
    card("e2e-named")?;
    vmm.expect("pinged")?;
    Ok(())
}

#[test]
fn streams_arrive_whole_with_the_usual_mtu() -> Result<()> {
    streams_arrive_whole("e2e-net0", 1, 1500)
}

#[test]
fn streams_arrive_whole_with_jumbo_frames() -> Result<()> {
    streams_arrive_whole("e2e-net1", 2, 9000)
}
