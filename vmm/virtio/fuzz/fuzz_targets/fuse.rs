//! The shared directory, asked for files in messages whose headers and lengths are right.
#![no_main]

use std::fs;

use arbitrary::Arbitrary;
use caisson_vmm_api::devices::{CachePolicy, FsConfig};
use caisson_virtio_fuzz::{Session, Step, memory, play, share};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// Names that there are, and names that there had better not be.
const NAMES: [&[u8]; 12] = [
    b"file",
    b"dir",
    b"link",
    b"new",
    b"other",
    b".",
    b"..",
    b"",
    b"a/b",
    b"/etc/passwd",
    b"user.x",
    b"system.posix_acl_access",
];

/// A part of a request.
#[derive(Arbitrary, Debug)]
enum Part {
    Word(u32),
    Small(u8),
    /// A node, a handle, or a position.
    Long(u8),
    Huge(u64),
    Name(u8),
    Bytes(Vec<u8>),
}

impl Part {
    fn put(&self, body: &mut Vec<u8>) {
        match self {
            Self::Word(word) => body.extend(word.to_le_bytes()),
            Self::Small(word) => body.extend(u32::from(*word).to_le_bytes()),
            Self::Long(word) => body.extend(u64::from(*word).to_le_bytes()),
            Self::Huge(word) => body.extend(word.to_le_bytes()),
            Self::Name(index) => {
                body.extend(NAMES[usize::from(*index) % NAMES.len()]);
                body.push(0);
            }
            Self::Bytes(bytes) => body.extend(bytes.iter().take(4096)),
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Request {
    opcode: u8,
    node: u8,
    user: u8,
    parts: Vec<Part>,
    room: u16,
    urgent: bool,
}

impl Request {
    fn message(&self, unique: u64) -> Vec<u8> {
        let mut body = Vec::new();
        self.parts.iter().take(12).for_each(|part| part.put(&mut body));
        let mut message = Vec::new();
        message.extend((40 + body.len() as u32).to_le_bytes());
        message.extend((u32::from(self.opcode) % 56).to_le_bytes());
        message.extend(unique.to_le_bytes());
        message.extend(u64::from(self.node).to_le_bytes());
        message.extend(
            [u32::from(self.user), u32::from(self.user), 1, 0].into_iter().flat_map(u32::to_le_bytes),
        );
        message.extend(body);
        message
    }
}

/// INIT: 7.39, with everything on offer.
fn init() -> Step {
    let mut message = Vec::new();
    message.extend([104u32, 26, 0, 0, 0, 0, 0, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes));
    message.extend([7u32, 39, 1 << 17, u32::MAX, u32::MAX].into_iter().flat_map(u32::to_le_bytes));
    message.resize(104, 0);
    Step::Chain { queue: 1, readable: message, split: 40, room: 4096 }
}

fuzz_target!(|input: (bool, Vec<Request>)| {
    let (cached, requests) = input;
    // In memory: a guest may ask for everything to be brought to the disk.
    let outer = TempDir::new_in("/dev/shm").expect("a directory");
    let dir = outer.path().join("share");
    fs::create_dir_all(dir.join("dir/below")).expect("directories");
    fs::write(dir.join("file"), "contents").expect("a file");
    fs::write(outer.path().join("secret"), "secret").expect("a file");
    std::os::unix::fs::symlink("../secret", dir.join("link")).expect("a link");

    let cache = if cached { CachePolicy::Always } else { CachePolicy::Auto };
    let config = FsConfig { tag: "fuzzed".into(), max_descriptors: 32, cache, ..FsConfig::default() };
    let device = share(config, &dir);
    let mut steps = vec![init()];
    for (unique, request) in (1..).zip(requests.iter().take(60)) {
        let queue = u8::from(!request.urgent);
        let room = request.room % 16_384;
        steps.push(Step::Chain { queue, readable: request.message(unique), split: 40, room });
        // Which is refused, but waits until all is answered.
        steps.push(Step::Save);
    }
    play(&Session::of(steps), &memory(), Box::new(device), &mut |_, _| {});

    // Nothing came out, and nothing went in.
    assert_eq!(fs::read(outer.path().join("secret")).expect("a file"), b"secret");
    assert_eq!(fs::read_dir(outer.path()).expect("a directory").count(), 2);
});
