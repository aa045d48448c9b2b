//! A program for the kernel (bpf-helpers(7), Documentation/bpf/prog_sk_lookup.rst) that leads all TCP connections which a
//! network namespace's own IP stack takes in to one listening socket, whatever their port.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// bpf(2)'s commands.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
/// Kinds of maps, programs and places.
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
/// Helpers that the program calls.
const HELPER_MAP_LOOKUP: i32 = 1;
const HELPER_SK_RELEASE: i32 = 86;
const HELPER_SK_ASSIGN: i32 = 124;
/// Where `struct bpf_sk_lookup` has the protocol.
const PROTOCOL: i16 = 12;

/// Leads connections for as long as it is open.
#[derive(Debug)]
pub(super) struct Steering(#[allow(dead_code, reason = "held open")] OwnedFd);

impl Steering {
    /// Leads all connections in the namespace `network` to `listener`, a TCP socket that listens there.
    ///
    /// # Errors
    /// When the kernel does not have it (before 5.9), or refuses.
    pub(super) fn start(network: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<Steering> {
        #[repr(C)]
        #[derive(Default)]
        struct Map {
            kind: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
        }
        #[repr(C)]
        struct Update<'a> {
            map: u64,
            key: &'a u32,
            value: &'a u64,
            flags: u64,
        }
        #[repr(C)]
        struct Link {
            program: u32,
            target: u32,
            kind: u32,
            flags: u32,
        }
        let map =
            opened(MAP_CREATE, &Map { kind: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 })?;
        let socket = u64::from(number(listener.as_raw_fd())?);
        let update = Update { map: number(map.as_raw_fd())?.into(), key: &0, value: &socket, flags: 0 };
        bpf(MAP_UPDATE_ELEM, &update)?;
        let program = load(map.as_raw_fd())?;
        let link = Link {
            program: number(program.as_raw_fd())?,
            target: number(network.as_raw_fd())?,
            kind: ATTACH_SK_LOOKUP,
            flags: 0,
        };
        // It holds the program, which holds the map, which holds the socket.
        opened(LINK_CREATE, &link).map(Steering)
    }
}

fn number(descriptor: i32) -> io::Result<u32> {
    u32::try_from(descriptor).map_err(io::Error::other)
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// The program: a TCP connection is given to the map's only socket, if that is still there; all else goes its way.
fn program(map: i32) -> [Instruction; 18] {
    [
        instruction(0xbf, 6, 1, 0, 0),                  // r6 = the context
        instruction(0x61, 2, 1, PROTOCOL, 0),           // r2 = its protocol
        instruction(0x55, 2, 0, 14, libc::IPPROTO_TCP), // unless r2 is TCP: to the end
        instruction(0x62, 10, 0, -4, 0),                // on the stack: 0, the key
        instruction(0x18, 1, 1, 0, map),                // r1 = the map, by its descriptor
        instruction(0, 0, 0, 0, 0),                     // (its second half)
        instruction(0xbf, 2, 10, 0, 0),                 // r2 = the key's address
        instruction(0x07, 2, 0, 0, -4),
        instruction(0x85, 0, 0, 0, HELPER_MAP_LOOKUP),
        instruction(0x15, 0, 0, 7, 0), // no socket: to the end
        instruction(0xbf, 7, 0, 0, 0), // r7 = the socket
        instruction(0xbf, 1, 6, 0, 0), // assign(context, socket, 0)
        instruction(0xbf, 2, 7, 0, 0),
        instruction(0xb7, 3, 0, 0, 0),
        instruction(0x85, 0, 0, 0, HELPER_SK_ASSIGN),
        instruction(0xbf, 1, 7, 0, 0), // release(socket)
        instruction(0x85, 0, 0, 0, HELPER_SK_RELEASE),
        instruction(0xb7, 0, 0, 0, 1), // r0 = SK_PASS
    ]
}

fn load(map: i32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load<'a> {
        kind: u32,
        instruction_count: u32,
        instructions: &'a Instruction,
        license: &'a u8,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_place: u32,
    }
    let mut code = program(map).to_vec();
    code.push(instruction(0x95, 0, 0, 0, 0)); // exit
    let first = code.first().ok_or(io::ErrorKind::InvalidInput)?;
    let license = b"Apache-2.0\0";
    opened(
        PROG_LOAD,
        &Load {
            kind: PROG_TYPE_SK_LOOKUP,
            instruction_count: u32::try_from(code.len()).map_err(io::Error::other)?,
            instructions: first,
            license: &license[0],
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: *b"caisson_forward\0",
            interface: 0,
            expected_place: ATTACH_SK_LOOKUP,
        },
    )
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: each of the structures above is the beginning of `union bpf_attr` for its command, and what it points to
    // lives as long as the call: a map's key and value of the sizes that the map was made with, as many instructions as
    // it says, a license that ends with a zero.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A command that makes a descriptor.
fn opened<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
