//! The host's side of the network card: a tap device.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::header::{HEADER, Offloads};
use crate::buffers::GuestBuffers;

/// Where frames go to and come from. Each has a header of [`HEADER`] bytes in front. No call waits: what
/// cannot be done now is [`io::ErrorKind::WouldBlock`].
pub trait NetBackend: Send + 'static {
    /// Becomes readable when a frame has come, and writable when one can be sent again.
    fn fd(&self) -> RawFd;

    /// What the two sides may leave to each other.
    fn supported(&self) -> Offloads;

    /// Says what may be left to the guest.
    ///
    /// # Errors
    /// The host's.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Receives one frame; returns its length, header included. What does not fit is lost.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; otherwise the host's.
    fn receive(&mut self, buffers: &GuestBuffers) -> io::Result<usize>;

    /// Sends one frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room for it; otherwise the host's.
    fn send(&mut self, header: &[u8; HEADER], frame: &GuestBuffers) -> io::Result<()>;
}

/// Why a descriptor was refused as a tap device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is something else.
    #[error("the descriptor is not an attached tap device")]
    NotTap(#[source] io::Error),
    /// It is one, but of another kind: IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are needed.
    #[error("the tap device must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, its flags are {0:#x}")]
    Flags(i16),
    /// It could not be set up.
    #[error("setting the tap device's {0}")]
    SetUp(&'static str, #[source] io::Error),
}

/// TUNSETIFF, TUNGETIFF, TUNSETOFFLOAD and TUNSETVNETHDRSZ of linux/if_tun.h. The kernel's numbers name other
/// types than what it takes, as they date from before that mattered.
mod ioctl {
    use super::size_of;

    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
    nix::ioctl_read_bad!(get_interface, nix::request_code_read!(b'T', 210, size_of::<u32>()), libc::ifreq);
    nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<u32>()));
    nix::ioctl_write_ptr_bad!(
        set_header_size,
        nix::request_code_write!(b'T', 216, size_of::<libc::c_int>()),
        libc::c_int
    );
}

/// An attached tap device (tun/tap documentation, Documentation/networking/tuntap.rst).
#[derive(Debug)]
pub struct Tap {
    file: File,
    supported: Offloads,
}

impl Tap {
    /// Attaches to the tap device with this name, which must be there: one that the kernel made for us on the
    /// spot would lead nowhere.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none; otherwise the kernel's, such as that somebody else has
    /// it.
    pub fn attach(name: &OsStr) -> io::Result<OwnedFd> {
        nix::net::if_::if_nametoindex(name).map_err(|_| io::ErrorKind::NotFound)?;
        Self::open(name, 0)
    }

    /// Makes a tap device, which is gone with the last copy of its descriptor.
    ///
    /// # Errors
    /// The kernel's, such as that there is one of this name.
    pub fn make(name: &OsStr) -> io::Result<OwnedFd> {
        Self::open(name, libc::IFF_TUN_EXCL)
    }

    fn open(name: &OsStr, more: libc::c_int) -> io::Result<OwnedFd> {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: an ifreq is plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // An interface's name is shorter than the field: the last byte stays 0.
        let bytes = name.as_bytes().iter().take(request.ifr_name.len() - 1);
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        // The field is signed, and IFF_TUN_EXCL its highest bit.
        let [low, high, ..] = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more).to_le_bytes();
        request.ifr_ifru.ifru_flags = libc::c_short::from_le_bytes([low, high]);
        // SAFETY: the kernel reads one ifreq.
        unsafe { ioctl::set_interface(file.as_raw_fd(), &request) }?;
        Ok(file.into())
    }

    /// Takes a tap device over: checks what it is, and sets its header size, no offloads, and O_NONBLOCK.
    ///
    /// # Errors
    /// When it is not a tap device as needed here.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        // SAFETY: an ifreq is plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one ifreq.
        unsafe { ioctl::get_interface(file.as_raw_fd(), &mut request) }
            .map_err(|errno| TapError::NotTap(errno.into()))?;
        // SAFETY: TUNGETIFF sets the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if i32::from(flags) & needed != needed {
            return Err(TapError::Flags(flags));
        }
        let size = libc::c_int::try_from(HEADER).unwrap_or(libc::c_int::MAX);
        // SAFETY: the kernel reads one int.
        unsafe { ioctl::set_header_size(file.as_raw_fd(), &size) }
            .map_err(|errno| TapError::SetUp("header size", errno.into()))?;
        let flags = fcntl(&file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        flags
            .and_then(|flags| fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)))
            .map_err(|errno| TapError::SetUp("O_NONBLOCK flag", errno.into()))?;
        let mut tap = Self { file, supported: Offloads::empty() };
        // UDP segmentation is there from Linux 6.2 on; a kernel without refuses the lot.
        let all = Offloads::all();
        tap.supported = [all, all - Offloads::USO4 - Offloads::USO6]
            .into_iter()
            .find(|&offloads| tap.set_offloads(offloads).is_ok())
            .unwrap_or_default();
        tap.set_offloads(Offloads::empty()).map_err(|error| TapError::SetUp("offloads", error))?;
        Ok(tap)
    }
}

impl NetBackend for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn supported(&self) -> Offloads {
        self.supported
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let bits = libc::c_int::try_from(offloads.bits()).unwrap_or(0);
        // SAFETY: an open descriptor, no memory involved.
        unsafe { ioctl::set_offload(self.file.as_raw_fd(), bits) }?;
        Ok(())
    }

    fn receive(&mut self, buffers: &GuestBuffers) -> io::Result<usize> {
        read_frame(self.fd(), buffers)
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &GuestBuffers) -> io::Result<()> {
        write_frame(self.fd(), header, frame)
    }
}

/// One readv(2) into the guest's buffers.
pub(super) fn read_frame(fd: RawFd, buffers: &GuestBuffers) -> io::Result<usize> {
    let vecs = buffers.as_iovecs();
    let count = libc::c_int::try_from(vecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: as many valid buffers, which `buffers` keeps mapped.
    usize::try_from(unsafe { libc::readv(fd, vecs.as_ptr(), count) }).map_err(|_| io::Error::last_os_error())
}

/// One writev(2) of a header of ours and a frame in the guest's buffers.
pub(super) fn write_frame(fd: RawFd, header: &[u8; HEADER], frame: &GuestBuffers) -> io::Result<()> {
    let mut vecs = Vec::with_capacity(frame.as_iovecs().len() + 1);
    vecs.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: HEADER });
    vecs.extend_from_slice(frame.as_iovecs());
    let count = libc::c_int::try_from(vecs.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: as many valid buffers: the header, which is only read, and those that `frame` keeps mapped.
    let written = unsafe { libc::writev(fd, vecs.as_ptr(), count) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
