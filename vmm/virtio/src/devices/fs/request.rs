//! What a descriptor chain asks for: one FUSE message (VIRTIO 1.3, section 5.11.6; fuse(4)).

mod extensions;

use std::{io, sync::Arc};

use fuse_backend_rs::{
    abi::fuse_abi::{InHeader, Opcode, OutHeader},
    api::server::Server,
    transport::{Reader, VirtioFsWriter, Writer},
};
use virtio_queue::DescriptorChain;
use vm_memory::ByteValued;

use super::{metrics::FsMetrics, passthrough::Passthrough};
use crate::{buffers::GuestBuffers, memory::GuestMem, queue::Descriptors};

/// `struct fuse_in_header`
const IN_HEADER: usize = 40;
/// `struct fuse_out_header`
const OUT_HEADER: usize = 16;
/// The longest request and the longest reply: 1 MiB of data, and headers.
const MAX_BYTES: usize = (1 << 20) + (64 << 10);

/// What is served, beside the [`extensions`]. All else does not exist: reading and setting locks among it, as
/// then the guest's kernel keeps locks itself, with all their waiting, and no worker ever waits for one.
const SERVED: &[Opcode] = &[
    Opcode::Lookup,
    Opcode::Forget,
    Opcode::Getattr,
    Opcode::Setattr,
    Opcode::Readlink,
    Opcode::Symlink,
    Opcode::Mknod,
    Opcode::Mkdir,
    Opcode::Unlink,
    Opcode::Rmdir,
    Opcode::Rename,
    Opcode::Link,
    Opcode::Open,
    Opcode::Read,
    Opcode::Write,
    Opcode::Statfs,
    Opcode::Release,
    Opcode::Fsync,
    Opcode::Setxattr,
    Opcode::Getxattr,
    Opcode::Listxattr,
    Opcode::Removexattr,
    Opcode::Flush,
    Opcode::Init,
    Opcode::Opendir,
    Opcode::Readdir,
    Opcode::Releasedir,
    Opcode::Fsyncdir,
    Opcode::Access,
    Opcode::Create,
    Opcode::Destroy,
    Opcode::BatchForget,
    Opcode::Fallocate,
    Opcode::Readdirplus,
    Opcode::Rename2,
    Opcode::Lseek,
];

/// The part of a message's header that decides what becomes of it.
struct Header {
    opcode: u32,
    unique: u64,
    node: u64,
    uid: u32,
    gid: u32,
}

impl Header {
    fn read(message: &GuestBuffers) -> Option<Self> {
        let mut header = InHeader::default();
        if message.copy_to(0, header.as_mut_slice()) != IN_HEADER {
            return None;
        }
        let InHeader { opcode, unique, nodeid: node, uid, gid, .. } = header;
        Some(Self { opcode, unique, node, uid, gid })
    }

    fn is(&self, opcode: Opcode) -> bool {
        self.opcode == opcode as u32
    }

    fn has_reply(&self) -> bool {
        ![Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt].iter().any(|opcode| self.is(*opcode))
    }
}

/// Serves one message; how many bytes of reply there are in the chain. Whatever the message says, the worst
/// that comes of it is an error for the guest.
pub(super) fn serve(
    (share, server): (&Passthrough, &Server<Arc<Passthrough>>),
    mem: &GuestMem,
    chain: Descriptors,
    metrics: &FsMetrics,
) -> u32 {
    let (mut message, mut reply) = (GuestBuffers::new(mem.clone()), GuestBuffers::new(mem.clone()));
    metrics.requests.inc();
    let again = chain.walk_again();
    if GuestBuffers::append_chain(chain, &mut message, &mut reply).is_err() {
        metrics.refused.inc();
        return 0;
    }
    let Some(header) = Header::read(&message) else {
        metrics.refused.inc();
        return 0;
    };
    metrics.operations.count(header.opcode);
    metrics.request_bytes.add(message.len() as u64);
    let len = if message.len() > MAX_BYTES || reply.len() > MAX_BYTES {
        refuse(&header, &reply, libc::EINVAL, metrics)
    } else if let Some(result) = extensions::serve(share, &header, &message) {
        put(&header, &reply, &result)
    } else if SERVED.iter().any(|opcode| header.is(*opcode)) {
        answer(server, mem, again, &header, &reply)
            .unwrap_or_else(|| refuse(&header, &reply, libc::EINVAL, metrics))
    } else {
        refuse(&header, &reply, libc::ENOSYS, metrics)
    };
    metrics.reply_bytes.add(u64::from(len));
    len
}

fn answer(
    server: &Server<Arc<Passthrough>>,
    mem: &GuestMem,
    chain: DescriptorChain<GuestMem>,
    header: &Header,
    reply: &GuestBuffers,
) -> Option<u32> {
    let reader = Reader::from_descriptor_chain(&**mem, chain.clone()).ok()?;
    let writer = Writer::VirtioFs(VirtioFsWriter::new(&**mem, chain).ok()?);
    let len = server.handle_message(reader, writer, None, None).ok()?;
    if header.is(Opcode::Destroy) {
        // The server says nothing, but the driver waits.
        return Some(put(header, reply, &Ok(Vec::new())));
    }
    u32::try_from(len).ok().filter(|_| len <= reply.len())
}

fn refuse(header: &Header, reply: &GuestBuffers, errno: i32, metrics: &FsMetrics) -> u32 {
    metrics.refused.inc();
    put(header, reply, &Err(io::Error::from_raw_os_error(errno)))
}

/// Writes a reply, if there is to be one and it fits; how long it is.
fn put(header: &Header, reply: &GuestBuffers, result: &io::Result<Vec<u8>>) -> u32 {
    if !header.has_reply() {
        return 0;
    }
    let fits = |body: &&[u8]| OUT_HEADER.saturating_add(body.len()) <= reply.len();
    let (error, body) = match result.as_deref() {
        Ok(body) if fits(&body) => (0, body),
        Ok(_) => (libc::EINVAL, &[][..]),
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), &[][..]),
    };
    if !fits(&body) {
        return 0;
    }
    let len = u32::try_from(OUT_HEADER + body.len()).unwrap_or(0);
    let out = OutHeader { len, error: -error, unique: header.unique };
    u32::try_from(reply.copy_from(0, &[out.as_slice(), body].concat())).unwrap_or(0)
}
