//! Streams between guest and host over vsock: a unix socket is the host's end of Caisson's device, AF_VSOCK
//! of QEMU's.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, socket,
};

use super::machine::Vmm;

/// The guest's address.
pub(super) const GUEST_CID: u32 = 3;
/// The host's, for every guest (vsock(7)).
const HOST_CID: u32 = 2;
/// Sends all that is to be received.
const SOURCE: u32 = 7003;
/// Takes all that is sent, and answers the end of it with a byte.
const SINK: u32 = 7004;
/// Sends back each byte.
const ECHO: u32 = 7005;

/// What the guest does.
#[derive(Args, Debug)]
pub(crate) struct ClientArgs {
    #[command(subcommand)]
    what: Transfer,
}

/// One of the transfers.
#[derive(Clone, Copy, Debug, Subcommand)]
enum Transfer {
    /// Receive all that comes.
    Receive,
    /// Send so many bytes.
    Send { bytes: u64 },
    /// Send a byte and wait for it to come back, so many times.
    Echo { count: u32 },
}

/// The guest's half.
///
/// # Errors
/// When the host does not answer.
pub(crate) fn client(args: &ClientArgs) -> Result<ExitCode> {
    let block = vec![0x5a; 64 << 10];
    match args.what {
        Transfer::Receive => {
            let received = io::copy(&mut dial(SOURCE)?, &mut io::sink()).context("receiving")?;
            ensure!(received > 0, "nothing came");
        }
        Transfer::Send { bytes } => {
            let mut stream = dial(SINK)?;
            for _ in 0..bytes / block.len() as u64 {
                stream.write_all(&block).context("sending")?;
            }
            nix::sys::socket::shutdown(stream.as_raw_fd(), nix::sys::socket::Shutdown::Write)
                .context("ending the stream")?;
            stream.read_exact(&mut [0]).context("waiting until all has arrived")?;
        }
        Transfer::Echo { count } => {
            let mut stream = dial(ECHO)?;
            for _ in 0..count {
                stream.write_all(b"x").context("sending")?;
                stream.read_exact(&mut [0]).context("receiving")?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn stream_socket() -> Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("making a socket")
}

fn dial(port: u32) -> Result<File> {
    let socket = stream_socket()?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)).context("connecting")?;
    Ok(socket.into())
}

/// Where guests reach this host.
enum Listener {
    Unix(UnixListener),
    Vsock(OwnedFd),
}

impl Listener {
    fn new(vmm: Vmm, path: &Path, port: u32) -> Result<Self> {
        if vmm == Vmm::Caisson {
            let mut path = path.as_os_str().to_owned();
            path.push(format!("_{port}"));
            // Left over from the run before.
            let _ = std::fs::remove_file(&path);
            return Ok(Self::Unix(UnixListener::bind(PathBuf::from(path)).context("listening")?));
        }
        let socket = stream_socket()?;
        bind(socket.as_raw_fd(), &VsockAddr::new(nix::libc::VMADDR_CID_ANY, port)).context("binding")?;
        listen(&socket, Backlog::new(8)?).context("listening")?;
        Ok(Self::Vsock(socket))
    }

    fn accept(&self) -> io::Result<File> {
        match self {
            Self::Unix(listener) => Ok(OwnedFd::from(listener.accept()?.0).into()),
            Self::Vsock(socket) => {
                let fd = accept(socket.as_raw_fd())?;
                // SAFETY: accept(2) has just made it and nobody else owns it.
                Ok(unsafe { File::from_raw_fd(fd) })
            }
        }
    }
}

/// The host's ends. They serve one guest and end with it.
pub(super) fn serve(vmm: Vmm, path: &Path, bytes: u64) -> Result<()> {
    let source = Listener::new(vmm, path, SOURCE)?;
    let sink = Listener::new(vmm, path, SINK)?;
    let echo = Listener::new(vmm, path, ECHO)?;
    // Errors show as steps of the guest that fail.
    thread::spawn(move || -> io::Result<()> {
        let mut stream = source.accept()?;
        let block = vec![0x5a; 64 << 10];
        (0..bytes / block.len() as u64).try_for_each(|_| stream.write_all(&block))
    });
    thread::spawn(move || -> io::Result<()> {
        let mut stream = sink.accept()?;
        io::copy(&mut stream, &mut io::sink())?;
        stream.write_all(b"x")
    });
    thread::spawn(move || -> io::Result<()> {
        let mut stream = echo.accept()?;
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 {
            stream.write_all(&byte)?;
        }
        Ok(())
    });
    Ok(())
}

/// Whether `vmm` can have a vsock device here: QEMU's needs the host kernel's.
pub(super) fn available(vmm: Vmm) -> bool {
    if vmm == Vmm::Caisson {
        return true;
    }
    // Built in, loaded already, or not to be had: the device file tells.
    let _ = Command::new("modprobe").arg("vhost_vsock").status();
    Path::new("/dev/vhost-vsock").exists()
}
