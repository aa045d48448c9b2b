//! The vsock device on real KVM, with Linux's own driver on the other side.

use std::{
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use caisson_e2e::{
    vmm::{Vmm, Workshop},
    vsock::{
        DIAL, ECHO, RELEASE, SINK, SOURCE, VsockGuest, connect, connect_patiently, pattern, program_initramfs,
    },
};
use caisson_vmm_api::{
    config::{DeviceConfig, FileSource, VsockDevice},
    control::protocol::{RestoreCommand, RestoredDevice},
    devices::VsockConfig,
};

const ECONNRESET: i32 = 104;

fn boot() -> Result<VsockGuest> {
    VsockGuest::boot(&program())
}

/// What runs in the guest.
fn program() -> PathBuf {
    // An archive of tests is run elsewhere than where it was built; its runner says where the binary is.
    std::env::var_os("NEXTEST_BIN_EXE_vsock-guest")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_vsock-guest")), PathBuf::from)
}

/// Sends `data`, receives as much, and compares.
fn echo(stream: &UnixStream, data: &[u8]) -> Result<()> {
    let mut back = vec![0; data.len()];
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut to = stream;
            to.write_all(data)
        });
        let mut from = stream;
        from.read_exact(&mut back)?;
        writer.join().map_err(|_| std::io::Error::other("the writer panicked"))?
    })?;
    ensure!(back == data, "what came back differs");
    Ok(())
}

/// One stream carries so many MiB both ways.
fn one_stream(mib: usize) -> Result<()> {
    let guest = boot()?;
    let stream = guest.connect(ECHO)?;
    let data = pattern(mib << 20);
    let start = Instant::now();
    echo(&stream, &data)?;
    println!("{mib} MiB each way in {:.2?}", start.elapsed());
    Ok(())
}

/// 200 streams carry so many KiB each, both ways.
fn many_streams(kib: usize) -> Result<()> {
    let guest = boot()?;
    let data = pattern(kib << 10);
    thread::scope(|scope| -> Result<()> {
        let streams: Vec<_> =
            (0..200).map(|_| scope.spawn(|| -> Result<()> { echo(&guest.connect(ECHO)?, &data) })).collect();
        for stream in streams {
            stream.join().map_err(|_| anyhow!("a stream panicked"))??;
        }
        Ok(())
    })
}

#[test]
fn a_stream_goes_both_ways_intact() -> Result<()> {
    one_stream(8)
}

#[test]
fn two_hundred_streams_go_side_by_side() -> Result<()> {
    many_streams(32)
}

#[test]
#[ignore = "minutes on an emulated machine"]
fn a_hundred_megabytes_go_both_ways_intact() -> Result<()> {
    one_stream(100)
}

#[test]
#[ignore = "minutes on an emulated machine"]
fn two_hundred_long_streams_go_side_by_side() -> Result<()> {
    many_streams(256)
}

#[test]
fn connections_open_and_end_as_sockets_do() -> Result<()> {
    let guest = boot()?;

    // The end of one direction leaves the other open.
    let mut stream = guest.connect(ECHO)?;
    let data = pattern(1 << 20);
    let mut writer = stream.try_clone()?;
    let mut back = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let sent = scope.spawn(|| {
            writer.write_all(&data)?;
            writer.shutdown(Shutdown::Write)
        });
        stream.read_to_end(&mut back)?;
        Ok(sent.join().expect("the writer's thread")?)
    })?;
    ensure!(back == data, "{} bytes came back before the end", back.len());

    // Nobody listens: refused at once, not after a timeout.
    let start = Instant::now();
    ensure!(guest.connect(9).is_err(), "port 9 answered");
    ensure!(start.elapsed() < Duration::from_secs(3), "it took {:?}", start.elapsed());

    // From the guest to the host.
    let service = guest.serve(7000)?;
    let mut control = guest.connect(DIAL)?;
    control.write_all(&7000u32.to_le_bytes())?;
    let mut answer = [0; 4];
    control.read_exact(&mut answer)?;
    ensure!(i32::from_le_bytes(answer) == 0, "the guest's connect failed: {answer:?}");
    echo(&service.accept()?.0, &data)?;
    let mut control = guest.connect(DIAL)?;
    control.write_all(&7001u32.to_le_bytes())?;
    control.read_exact(&mut answer)?;
    ensure!(i32::from_le_bytes(answer) == ECONNRESET, "port 7001 of the host: {answer:?}");

    // The same again and again leaves nothing behind.
    for round in 0..300u32 {
        let stream = guest.connect(ECHO)?;
        echo(&stream, &round.to_le_bytes())?;
    }
    Ok(())
}

#[test]
fn slow_readers_slow_nobody_else() -> Result<()> {
    let guest = boot()?;
    let length = 8 << 20;
    let data = pattern(length);

    let mut unread = guest.connect(SOURCE)?;
    unread.write_all(&(length as u64).to_le_bytes())?;
    let mut sink = guest.connect(SINK)?;
    thread::scope(|scope| -> Result<()> {
        let feeder = scope.spawn(|| {
            let mut sink = &sink;
            sink.write_all(&data)?;
            sink.shutdown(Shutdown::Write)
        });
        let other = guest.connect(ECHO)?;
        for _ in 0..50 {
            echo(&other, &data[..10_000])?;
        }
        ensure!(!feeder.is_finished(), "8 MiB fitted between the host and a guest that does not read");
        drop(guest.connect(RELEASE)?);
        Ok(feeder.join().expect("the feeder's thread")?)
    })?;
    let mut taken = [0; 8];
    sink.read_exact(&mut taken)?;
    ensure!(u64::from_le_bytes(taken) == length as u64, "the guest read {taken:?}");
    let mut back = Vec::new();
    unread.read_to_end(&mut back)?;
    ensure!(back == data, "{} bytes came, or others", back.len());
    Ok(())
}

#[test]
fn pauses_lose_nothing() -> Result<()> {
    let guest = boot()?;
    let stream = guest.connect(ECHO)?;
    let data = pattern(1 << 20);
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let traffic = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                echo(&stream, &data)?;
                rounds += 1;
            }
            Ok(rounds)
        });
        for _ in 0..100 {
            guest.pause_for(Duration::from_millis(5))?;
            thread::sleep(Duration::from_millis(20));
        }
        done.store(true, Ordering::Relaxed);
        let rounds = traffic.join().expect("the traffic's thread")?;
        println!("{rounds} MiB each way while the machine was paused 100 times");
        Ok(())
    })?;
    // And in rest: what comes while the machine is paused waits for it.
    for _ in 0..5 {
        guest.pause_for(Duration::from_millis(100))?;
        echo(&stream, b"still there")?;
        echo(&guest.connect(ECHO)?, b"and open to others")?;
    }
    Ok(())
}

fn device(socket: &Path, guest_cid: u32) -> DeviceConfig {
    DeviceConfig::Vsock(VsockDevice {
        socket: FileSource::Path(socket.into()),
        dialer: None,
        dialer_ports: Vec::new(),
        options: VsockConfig { guest_cid },
    })
}

#[test]
fn copies_of_a_saved_guest_take_connections_at_once() -> Result<()> {
    let workshop = Workshop::new("")?;
    program_initramfs(&program(), &workshop.path("initramfs"))?;
    let mut config = workshop.config("")?;
    let socket = workshop.path("vsock");
    config.devices.push(device(&socket, 3));
    let mut vmm = Vmm::boot(config)?;
    let before = connect_patiently(&socket, ECHO)?;
    let data = pattern(100_000);
    echo(&before, &data)?;

    let (state, memory) = (workshop.path("state"), workshop.path("memory"));
    vmm.client.pause()?;
    vmm.client.snapshot(File::create(&state)?.as_fd(), File::create(&memory)?.as_fd())?;
    vmm.client.resume()?;
    // The guest that was saved goes on, and so do its connections.
    echo(&before, &data)?;

    for cid in 4..8 {
        let socket = workshop.path(&format!("vsock{cid}"));
        let restore = RestoreCommand {
            state: FileSource::Path(state.clone()),
            memory: FileSource::Path(memory.clone()),
            console: Default::default(),
            devices: vec![RestoredDevice { slot: 0, device: device(&socket, cid) }],
        };
        let mut copy = Vmm::restore(restore)?;
        // Clients that were there before the guest ran, and others right after: each at the first attempt.
        let early = thread::spawn({
            let (socket, data) = (socket.clone(), data.clone());
            move || echo(&connect(&socket, ECHO)?, &data)
        });
        thread::sleep(Duration::from_millis(50));
        copy.client.resume()?;
        for _ in 0..3 {
            echo(&connect(&socket, ECHO)?, &data)?;
        }
        early.join().expect("the early client's thread")?;
    }
    echo(&before, &data)
}
