//! A driver that speaks FUSE by hand, so that neither side's structures are believed.

use std::{
    collections::BTreeSet,
    fs::File,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_vmm_api::devices::FsConfig;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::*;
use crate::{
    ThreadSetup,
    mock::{Buffer, CountingInterrupt, MockQueue},
};

pub(super) const REQUEST: u64 = 0x2_0000;
pub(super) const REPLY: u64 = 0x20_0000;
const MEMORY: usize = 4 << 20;
pub(super) const QUEUE: u16 = 64;
const WORKERS: usize = 2;
/// The root's node id.
pub(super) const ROOT: u64 = 1;

/// What a request is answered with: the bytes behind the header, or errno.
pub(super) type Answer = Result<Vec<u8>, i32>;

pub(super) struct Bench {
    pub(super) mem: GuestMem,
    pub(super) queues: [MockQueue; 2],
    pub(super) interrupt: Arc<CountingInterrupt>,
    pub(super) fs: Fs,
    pub(super) dir: TempDir,
    /// Who makes the requests.
    pub(super) caller: (u32, u32),
    unique: u64,
}

pub(super) fn directory(path: impl AsRef<Path>) -> OwnedFd {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    File::options().read(true).custom_flags(flags).open(path).unwrap().into()
}

pub(super) fn workers(count: usize, setup: ThreadSetup) -> Arc<Workers> {
    Workers::start(count, directory("/proc/self/fd"), setup).unwrap()
}

pub(super) fn config() -> FsConfig {
    FsConfig { tag: "share".into(), ..FsConfig::default() }
}

pub(super) fn own() -> (u32, u32) {
    (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw())
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(config())
    }

    /// A share that the driver has mounted.
    pub(super) fn with(config: FsConfig) -> Self {
        let mut bench = Self::unmounted(config);
        bench.init().unwrap();
        bench
    }

    pub(super) fn unmounted(config: FsConfig) -> Self {
        Self::on(config, workers(WORKERS, || {}))
    }

    /// A mounted share whose workers begin with `setup`.
    pub(super) fn confined(setup: ThreadSetup) -> Self {
        let mut bench = Self::on(config(), workers(WORKERS, setup));
        bench.init().unwrap();
        bench
    }

    fn on(config: FsConfig, workers: Arc<Workers>) -> Self {
        let dir = TempDir::new().unwrap();
        let fs = Fs::new(config, directory(dir.path()), workers).unwrap();
        let mem: GuestMem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let queues = [MockQueue::new(&mem, 0, QUEUE), MockQueue::new(&mem, 0x4000, QUEUE)];
        let interrupt = CountingInterrupt::new();
        let mut bench = Self { mem, queues, interrupt, fs, dir, caller: own(), unique: 0 };
        bench.activate().unwrap();
        bench
    }

    pub(super) fn activate(&mut self) -> Result<(), ActivateError> {
        let queues = self.queues.iter().map(MockQueue::device_side).collect();
        let (mem, interrupt) = (self.mem.clone(), self.interrupt.clone());
        self.fs.activate(Activation::new(mem, queues, 1 << VIRTIO_F_VERSION_1, interrupt))
    }

    pub(super) fn init(&mut self) -> Answer {
        // 7.31, read ahead 128 KiB, everything offered.
        self.call(26, 0, &words(&[7, 31, 128 << 10, u32::MAX, u32::MAX, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until all that was taken is answered.
    pub(super) fn settle(&mut self) {
        self.fs.active.as_ref().unwrap().wait();
    }

    pub(super) fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let (uid, gid) = self.caller;
        let mut message = words(&[u32::try_from(40 + body.len()).unwrap(), opcode]);
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend(words(&[uid, gid, 1, 0]));
        message.extend(body);
        message
    }

    /// Has raw bytes answered; the length that the device says it wrote.
    pub(super) fn raw(&mut self, queue: usize, message: &[u8], room: u32) -> u32 {
        self.mem.write_slice(message, GuestAddress(REQUEST)).unwrap();
        let mut buffers = vec![Buffer::readable(REQUEST, u32::try_from(message.len()).unwrap())];
        if room > 0 {
            buffers.push(Buffer::writable(REPLY, room));
        }
        let head = self.queues[queue].add(&buffers);
        self.fs.process(DeviceEvent::Queue(queue)).unwrap();
        self.settle();
        let used = self.queues[queue].used();
        assert_eq!((used.len(), used[0].0), (1, head));
        used[0].1
    }

    pub(super) fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let message = self.message(opcode, node, body);
        let used = self.raw(1, &message, 1 << 20);
        let [len, error, unique, _]: [u32; 4] = self.mem.read_obj(GuestAddress(REPLY)).unwrap();
        assert_eq!((len, u64::from(unique)), (used, self.unique), "opcode {opcode}");
        if error != 0 {
            return Err(-error.cast_signed());
        }
        let mut reply = vec![0; (len - 16) as usize];
        self.mem.read_slice(&mut reply, GuestAddress(REPLY + 16)).unwrap();
        Ok(reply)
    }

    /// LOOKUP; the node id.
    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(1, parent, &text(name)).map(|reply| long(&reply, 0))
    }

    /// FORGET goes through the urgent queue and has no answer.
    pub(super) fn forget(&mut self, node: u64, count: u64) {
        let message = self.message(2, node, &count.to_le_bytes());
        assert_eq!(self.raw(0, &message, 0), 0);
    }

    /// GETATTR; mode, uid, gid and size.
    pub(super) fn attributes(&mut self, node: u64) -> (u32, u32, u32, u64) {
        let reply = self.call(3, node, &[0; 16]).unwrap();
        (word(&reply, 16 + 60), word(&reply, 16 + 68), word(&reply, 16 + 72), long(&reply, 16 + 8))
    }

    /// CREATE with a mask; the node id and the handle.
    pub(super) fn create(&mut self, name: &str, mode: u32, umask: u32) -> Result<(u64, u64), i32> {
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let mut body = words(&[flags, mode, umask, 0]);
        body.extend(text(name));
        self.call(35, ROOT, &body).map(|reply| (long(&reply, 0), long(&reply, 128)))
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(14, node, &words(&[flags.cast_unsigned(), 0])).map(|reply| long(&reply, 0))
    }

    pub(super) fn write(&mut self, at: (u64, u64), offset: u64, flags: u32, data: &[u8]) -> Answer {
        let mut body = at.1.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(words(&[u32::try_from(data.len()).unwrap(), flags, 0, 0, 0, 0]));
        body.extend(data);
        self.call(16, at.0, &body)
    }

    pub(super) fn read(&mut self, at: (u64, u64), offset: u64, size: u32) -> Answer {
        self.call(15, at.0, &read_in(at.1, offset, size))
    }

    pub(super) fn release(&mut self, at: (u64, u64)) -> Answer {
        let mut body = at.1.to_le_bytes().to_vec();
        body.extend([0; 16]);
        self.call(18, at.0, &body)
    }

    pub(super) fn setattr(&mut self, node: u64, valid: u32, fields: &[(usize, u64)]) -> Answer {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        for &(at, value) in fields {
            // Only sizes and times are longer than a word.
            let len = if (16..56).contains(&at) { 8 } else { 4 };
            body[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        self.call(4, node, &body)
    }

    pub(super) fn mknod(&mut self, name: &str, mode: u32, device: u32) -> Answer {
        let mut body = words(&[mode, device, 0, 0]);
        body.extend(text(name));
        self.call(8, ROOT, &body)
    }

    pub(super) fn rename(&mut self, from: &str, to: &str, flags: u32) -> Answer {
        let mut body = ROOT.to_le_bytes().to_vec();
        body.extend(words(&[flags, 0]));
        body.extend([text(from), text(to)].concat());
        self.call(45, ROOT, &body)
    }

    pub(super) fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Answer {
        let mut body = words(&[u32::try_from(value.len()).unwrap(), 0]);
        body.extend(text(name));
        body.extend(value);
        self.call(21, node, &body)
    }

    pub(super) fn get_xattr(&mut self, node: u64, name: &str, size: u32) -> Answer {
        let mut body = words(&[size, 0]);
        body.extend(text(name));
        self.call(22, node, &body)
    }
}

pub(super) fn read_in(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(offset.to_le_bytes());
    body.extend(words(&[size, 0, 0, 0, 0, 0]));
    body
}

pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(super) fn copy_in(from: (u64, u64), to: (u64, u64), len: u64, flags: u64) -> Vec<u8> {
    [from.0, from.1, to.0, to.1, 0, len, flags].iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn two_files(bench: &mut Bench) -> ((u64, u64), (u64, u64)) {
    let (from, to) = (bench.create("from", 0o600, 0).unwrap(), bench.create("to", 0o600, 0).unwrap());
    bench.write(from, 0, 0, b"some bytes to copy").unwrap();
    (from, to)
}

pub(super) fn unnamed(bench: &mut Bench, node: u64, flags: i32) -> Result<(u64, u64), i32> {
    let mut body = words(&[(libc::O_RDWR | flags).cast_unsigned(), 0o100_666, 0o027, 0]);
    body.extend(text("/"));
    bench.call(51, node, &body).map(|reply| (long(&reply, 0), long(&reply, 128)))
}

pub(super) fn statx_in(mask: u32) -> Vec<u8> {
    words(&[0, 0, 0, 0, 0, mask])
}

/// All names that READDIR or READDIRPLUS tells, asked for `size` bytes at a time.
pub(super) fn names(bench: &mut Bench, node: u64, size: u32, plus: bool) -> BTreeSet<String> {
    let handle = long(&bench.call(27, node, &words(&[0, 0])).unwrap(), 0);
    let (mut names, mut offset) = (BTreeSet::new(), 0);
    loop {
        let opcode = if plus { 44 } else { 28 };
        let reply = bench.call(opcode, node, &read_in(handle, offset, size)).unwrap();
        if reply.is_empty() {
            break;
        }
        let mut rest = &reply[..];
        while !rest.is_empty() {
            let entry = if plus { &rest[128..] } else { rest };
            let (next, len) = (long(entry, 8), word(entry, 16) as usize);
            let name = String::from_utf8(entry[24..24 + len].to_vec()).unwrap();
            if plus && !name.starts_with('.') {
                assert_ne!(long(rest, 0), 0, "{name}");
            }
            assert!(names.insert(name), "told twice");
            offset = next;
            let taken = (if plus { 128 } else { 0 }) + (24 + len).next_multiple_of(8);
            rest = &rest[taken..];
        }
    }
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 16]);
    bench.call(29, node, &body).unwrap();
    names
}
