//! What runs as `/init` in the guests of the vsock tests: a few services on vsock ports.
//!
//! | port | service |
//! |---|---|
//! | [`ECHO`](caisson_e2e::vsock::ECHO) | sends back what it receives, and ends when the client has |
//! | [`SOURCE`](caisson_e2e::vsock::SOURCE) | receives a length (u64), sends that much of a pattern |
//! | [`SINK`](caisson_e2e::vsock::SINK) | reads nothing until released, then all, and answers with its length |
//! | [`RELEASE`](caisson_e2e::vsock::RELEASE) | a connection releases the sinks |
//! | [`DIAL`](caisson_e2e::vsock::DIAL) | receives a port (u32), dials it on the host, answers with the error (i32), echoes |

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use caisson_e2e::vsock::{DIAL, ECHO, RELEASE, SINK, SOURCE, pattern};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept4, bind, connect, listen,
    shutdown, socket,
};

/// VMADDR_CID_ANY and VMADDR_CID_HOST.
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;

static RELEASED: AtomicBool = AtomicBool::new(false);

fn main() -> io::Result<()> {
    serve(ECHO, echo)?;
    serve(SOURCE, source)?;
    serve(SINK, sink)?;
    serve(DIAL, dial)?;
    serve(RELEASE, |_| {
        RELEASED.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    loop {
        thread::park();
    }
}

fn serve(port: u32, service: fn(File) -> io::Result<()>) -> io::Result<()> {
    let socket = vsock()?;
    bind(socket.as_raw_fd(), &VsockAddr::new(ANY, port))?;
    listen(&socket, Backlog::MAXCONN)?;
    thread::spawn(move || {
        loop {
            if let Err(error) = accept(&socket, port, service) {
                println!("port {port}: accepting: {error}");
            }
        }
    });
    Ok(())
}

fn accept(socket: &OwnedFd, port: u32, service: fn(File) -> io::Result<()>) -> io::Result<()> {
    let accepted = accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made this descriptor, for us alone.
    let stream = File::from(unsafe { OwnedFd::from_raw_fd(accepted) });
    let run = move || {
        if let Err(error) = service(stream) {
            println!("port {port}: {error}");
        }
    };
    thread::Builder::new().stack_size(256 << 10).spawn(run)?;
    Ok(())
}

fn vsock() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

fn echo(mut stream: File) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            n => stream.write_all(buffer.get(..n).unwrap_or_default())?,
        }
    }
    // The client learns of the end before the connection is closed.
    Ok(shutdown(stream.as_raw_fd(), Shutdown::Write)?)
}

fn source(mut stream: File) -> io::Result<()> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    stream.write_all(&pattern(usize::try_from(u64::from_le_bytes(length)).unwrap_or(0)))
}

fn sink(mut stream: File) -> io::Result<()> {
    while !RELEASED.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(10));
    }
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let intact = all == pattern(all.len());
    stream.write_all(&(if intact { all.len() as u64 } else { u64::MAX }).to_le_bytes())
}

fn dial(mut control: File) -> io::Result<()> {
    let mut port = [0; 4];
    control.read_exact(&mut port)?;
    let socket = vsock()?;
    let connected = connect(socket.as_raw_fd(), &VsockAddr::new(HOST, u32::from_le_bytes(port)));
    let error = connected.err().map_or(0, |error| error as i32);
    control.write_all(&error.to_le_bytes())?;
    if error == 0 { echo(socket.into()) } else { Ok(()) }
}
