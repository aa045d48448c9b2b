//! What a hostile container does about vsock: tries every way to a socket of that family, and with each socket that it
//! gets the addresses that it is given (`CID:PORT`). A line for each way, `socket: refused (errno 97)` or
//! `socket: made`, and one for each connection, `socket to 2:1024: connected` or `socket to 2:1024: refused (errno 104)`.

use std::{
    arch::asm,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use io_uring::{IoUring, opcode};
use nix::{
    libc,
    sys::socket::{VsockAddr, connect},
};

/// A way to a socket.
type Way = fn() -> io::Result<OwnedFd>;

const STREAM: i32 = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;

fn main() {
    let addresses: Vec<(u32, u32)> = std::env::args().skip(1).filter_map(|text| address(&text)).collect();
    let ways: [(&str, Way); 6] = [
        ("socket", by_socket),
        ("socketpair", by_socketpair),
        ("x32", by_x32),
        ("i386", by_i386),
        ("socketcall", by_socketcall),
        ("io_uring", by_io_uring),
    ];
    for (way, make) in ways {
        let socket = match make() {
            Ok(socket) => socket,
            Err(error) => {
                println!("{way}: refused (errno {})", error.raw_os_error().unwrap_or(0));
                continue;
            }
        };
        println!("{way}: made");
        for (cid, port) in &addresses {
            match reach(&socket, *cid, *port) {
                Ok(()) => println!("{way} to {cid}:{port}: connected"),
                Err(error) => {
                    println!("{way} to {cid}:{port}: refused (errno {})", error.raw_os_error().unwrap_or(0))
                }
            }
        }
    }
    println!("done");
}

fn address(text: &str) -> Option<(u32, u32)> {
    let (cid, port) = text.split_once(':')?;
    Some((cid.parse().ok()?, port.parse().ok()?))
}

/// Connects, and sees whether the other side keeps the connection open: a peer that is not let in is hung up on.
fn reach(socket: &OwnedFd, cid: u32, port: u32) -> io::Result<()> {
    connect(socket.as_raw_fd(), &VsockAddr::new(cid, port))?;
    let patience = libc::timeval { tv_sec: 1, tv_usec: 0 };
    let size = u32::try_from(size_of_val(&patience)).unwrap_or(0);
    let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
    // SAFETY: the structure outlives the call, and its size is given.
    unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const patience).cast(), size) };
    let mut byte = [0_u8];
    match nix::unistd::read(socket, &mut byte) {
        Ok(0) => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
        Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The kernel's answer as libc's `syscall` gives it.
fn made(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn by_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    made(unsafe { libc::syscall(libc::SYS_socket, libc::AF_VSOCK, STREAM, 0) })
}

fn by_socketpair() -> io::Result<OwnedFd> {
    let mut pair = [-1; 2];
    // SAFETY: there is room for two descriptors.
    let result = unsafe { libc::syscall(libc::SYS_socketpair, libc::AF_VSOCK, STREAM, 0, pair.as_mut_ptr()) };
    made(if result < 0 { result } else { pair[0].into() })
}

fn by_x32() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    made(unsafe { libc::syscall(libc::SYS_socket | 0x4000_0000, libc::AF_VSOCK, STREAM, 0) })
}

fn by_i386() -> io::Result<OwnedFd> {
    const SOCKET: u32 = 359;
    // SAFETY: no pointers.
    of_i386(unsafe { i386(SOCKET, libc::AF_VSOCK.cast_unsigned(), STREAM.cast_unsigned(), 0) })
}

/// The family is behind a pointer, where a filter does not see it.
fn by_socketcall() -> io::Result<OwnedFd> {
    const SOCKETCALL: u32 = 102;
    const SOCKET: u32 = 1;
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT);
    // SAFETY: new memory, at an address that i386 can name.
    let page = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) };
    let Ok(at) = u32::try_from(page.addr()) else { return Err(io::Error::last_os_error()) };
    let arguments = [libc::AF_VSOCK, STREAM, 0];
    // SAFETY: the page is ours, big enough and aligned.
    unsafe { page.cast::<[i32; 3]>().write(arguments) };
    // SAFETY: the arguments are in memory that stays.
    of_i386(unsafe { i386(SOCKETCALL, SOCKET, at, 0) })
}

fn of_i386(result: i32) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    made(result.into())
}

/// A system call of i386, which a program of x86-64 may make as well.
///
/// # Safety
/// What the call does with its arguments must be sound.
unsafe fn i386(number: u32, first: u32, second: u32, third: u32) -> i32 {
    let result: u32;
    // SAFETY: the gate keeps all registers but rax and r8 to r11; rbx, which LLVM keeps for itself, is put back.
    unsafe {
        asm!(
            "xchg rbx, {first:r}",
            "int 0x80",
            "xchg rbx, {first:r}",
            first = inout(reg) u64::from(first) => _,
            inlateout("eax") number => result,
            in("ecx") second,
            in("edx") third,
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
    result.cast_signed()
}

/// The kernel makes the socket on behalf of the ring: no system call of ours names it.
fn by_io_uring() -> io::Result<OwnedFd> {
    let mut ring = IoUring::new(1)?;
    let entry = opcode::Socket::new(libc::AF_VSOCK, libc::SOCK_STREAM, 0).build();
    // SAFETY: the entry has no pointers.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let completion = ring.completion().next().ok_or(io::ErrorKind::UnexpectedEof)?;
    of_i386(completion.result())
}
