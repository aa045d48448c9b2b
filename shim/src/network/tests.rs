//! Network namespaces with real interfaces, made for each test. These tests need root, iproute2 and /dev/net/tun.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::thread::UnshareFlags;

use super::*;

/// Bytes of a virtio-net header in front of a tap device's frames, until TUNSETVNETHDRSZ says something else.
const HEADER: usize = 10;

type Work = Box<dyn FnOnce() + Send>;

/// A network namespace, which exists as long as its thread.
struct Netns {
    path: PathBuf,
    thread: Option<(Sender<Work>, thread::JoinHandle<()>)>,
}

impl Netns {
    fn new() -> Netns {
        let (work, todo) = mpsc::channel::<Work>();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            // SAFETY: the table of descriptors stays shared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            let (process, thread) = (std::process::id(), rustix::thread::gettid().as_raw_nonzero());
            ready.send(format!("/proc/{process}/task/{thread}/ns/net").into()).unwrap();
            for work in todo {
                work();
            }
        });
        let netns = Netns { path: is_ready.recv().unwrap(), thread: Some((work, thread)) };
        netns.ip("link set lo up");
        netns
    }

    /// Does something in the namespace.
    fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let work = move || answer.send(work()).unwrap();
        self.thread.as_ref().unwrap().0.send(Box::new(work)).unwrap();
        answered.recv().unwrap()
    }

    /// Runs a command in the namespace; returns what it prints.
    fn run(&self, program: &str, words: &str) -> String {
        let mut command = Command::new(program);
        command.args(words.split(' '));
        let output = self.work(move || command.output()).unwrap();
        assert!(output.status.success(), "{program} {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn ip(&self, words: &str) -> String {
        self.run("ip", words)
    }

    /// Ends it, as CNI does.
    fn end(&mut self) {
        if let Some((work, thread)) = self.thread.take() {
            drop(work);
            thread.join().unwrap();
        }
    }

    fn inode(&self) -> u64 {
        Namespace::open(&self.path).unwrap().id.inode
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.end();
    }
}

/// A pod's namespace as a CNI plugin leaves it, and what is at the other end of its cable.
struct Pod {
    inside: Netns,
    outside: Netns,
    directory: tempfile::TempDir,
    journal: Journal,
}

impl Pod {
    fn new() -> Pod {
        let (inside, outside) = (Netns::new(), Netns::new());
        // One cable, with both ends made in one namespace.
        let pid = inside.path.to_str().unwrap().split('/').nth(4).unwrap().to_owned();
        outside.ip(&format!("link add cable type veth peer name eth0 netns {pid}"));
        for command in [
            "addr add 10.88.0.1/24 dev cable",
            "addr add fd88::1/64 dev cable nodad",
            "link set cable mtu 1400 up",
        ] {
            outside.ip(command);
        }
        for command in [
            "link set eth0 address 02:00:00:00:88:05",
            "link set eth0 mtu 1400 up",
            "addr add 10.88.0.5/24 dev eth0",
            "addr add fd88::5/64 dev eth0 nodad",
        ] {
            inside.ip(command);
        }
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        Pod { inside, outside, directory, journal }
    }

    fn attach(&mut self) -> Result<Attached, NetworkError> {
        attach(&mut self.journal, &self.inside.path)
    }

    /// Somebody else undoes the pod, who has nothing but its record.
    fn undo(&self) {
        Journal::open(self.directory.path()).unwrap().undo().unwrap();
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 0);
    }
}

/// Sends `frame` until one comes back that `wanted` describes, and returns that without its header. The first may be
/// lost: an interface that has just come up takes a moment until it sends.
fn ask(tap: &OwnedFd, frame: &[u8], wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut file = File::from(tap.try_clone().unwrap());
    let timeout = Timespec::try_from(Duration::from_millis(100)).unwrap();
    for _ in 0..100 {
        file.write_all(frame).unwrap();
        let mut ready = [PollFd::new(tap, PollFlags::IN)];
        while rustix::event::poll(&mut ready, Some(&timeout)).unwrap() != 0 {
            let mut frame = vec![0; 2048];
            let length = file.read(&mut frame).unwrap();
            // Namespaces talk on their own, too.
            if wanted(&frame[HEADER..length]) {
                return frame[HEADER..length].to_vec();
            }
            ready = [PollFd::new(tap, PollFlags::IN)];
        }
    }
    panic!("no answer comes");
}

const GUEST: [u8; 6] = [2, 0, 0, 0, 0x88, 5];

/// Who has 10.88.0.1? (RFC 826)
fn arp_request() -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(GUEST);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(GUEST);
    frame.extend(Ipv4Addr::new(10, 88, 0, 5).octets());
    frame.extend([0; 6]);
    frame.extend(Ipv4Addr::new(10, 88, 0, 1).octets());
    frame
}

fn is_arp_reply(frame: &[u8]) -> bool {
    frame[12..14] == [8, 6] && frame[20..22] == [0, 2]
}

#[test]
fn frames_pass_both_ways_and_are_counted_where_cri_looks() {
    let mut pod = Pod::new();
    let attached = pod.attach().unwrap();
    let [card] = &attached.cards[..] else { panic!("{attached:?}") };
    assert_eq!((card.interface.name.as_str(), card.interface.mac), ("eth0", Mac(GUEST)));
    let reply = ask(&card.tap, &arp_request(), is_arp_reply);
    assert_eq!(reply[..6], GUEST);
    assert_eq!(reply[28..32], Ipv4Addr::new(10, 88, 0, 1).octets());
    let counters = pod.inside.run("cat", "/proc/thread-self/net/dev");
    let eth0 = counters.lines().find(|line| line.trim_start().starts_with("eth0:")).unwrap();
    let fields: Vec<u64> = eth0.split_whitespace().skip(1).map(|field| field.parse().unwrap()).collect();
    assert!(fields[1] > 0 && fields[9] > 0, "{eth0}");
    // Large enough for the largest frame, and mute itself.
    let tap = pod.inside.ip(&format!("-o addr show dev {TAP}{}", card.interface.index));
    assert!(!tap.contains("inet"), "{tap}");
    let tap = pod.inside.ip(&format!("-o link show dev {TAP}{}", card.interface.index));
    assert!(tap.contains("mtu 1400"), "{tap}");
}

#[test]
fn describes_what_a_plugin_has_made() {
    let mut pod = Pod::new();
    for command in [
        "route add default via 10.88.0.1",
        "-6 route add default via fd88::1 metric 7",
        "route add 192.0.2.0/24 dev eth0 scope link mtu 1300 src 10.88.0.5",
        "route add 198.51.100.0/24 via 192.0.2.77 dev eth0 onlink table 100 metric 9",
        "route add blackhole 203.0.113.0/24",
        "neigh add 10.88.0.1 lladdr 02:00:00:00:88:01 dev eth0 nud permanent",
        "neigh add fd88::1 lladdr 02:00:00:00:88:01 dev eth0 nud permanent",
        "link add idle type veth peer name idler",
    ] {
        pod.inside.ip(command);
    }
    let description = pod.attach().unwrap().description;
    let [eth0] = &description.interfaces[..] else { panic!("{description:?}") };
    assert_eq!(eth0.mtu, 1400);
    let addresses: Vec<_> = eth0.addresses.iter().map(Prefix::to_string).collect();
    assert_eq!(addresses[0], "10.88.0.5/24");
    assert!(addresses.contains(&"fd88::5/64".to_owned()), "{addresses:?}");

    let told = caisson_protocol::v1::NetworkConfig::from(&description);
    let route = |destination: &str, gateway: &str| {
        let found =
            told.routes.iter().find(|route| route.destination == destination && route.gateway == gateway);
        found.unwrap_or_else(|| panic!("{destination} via {gateway}: {:#?}", told.routes))
    };
    assert_eq!(route("", "10.88.0.1").device, "eth0");
    assert_eq!(route("", "fd88::1").metric, 7);
    let link = route("192.0.2.0/24", "");
    assert_eq!((link.mtu, link.source.as_str()), (1300, "10.88.0.5"));
    assert_eq!(link.scope(), caisson_protocol::v1::route::Scope::Link);
    let tabled = route("198.51.100.0/24", "192.0.2.77");
    assert_eq!((tabled.table, tabled.metric, tabled.onlink), (100, 9, true));
    let first_gateway = told.routes.iter().position(|route| !route.gateway.is_empty()).unwrap();
    assert!(told.routes[first_gateway..].iter().all(|route| !route.gateway.is_empty()));
    assert!(told.routes.iter().all(|route| route.destination != "203.0.113.0/24"));

    let mut neighbours: Vec<_> = told.neighbours.iter().map(|entry| entry.address.as_str()).collect();
    neighbours.sort_unstable();
    assert_eq!(neighbours, ["10.88.0.1", "fd88::1"]);
    let left_out = description.left_out.join("\n");
    assert!(left_out.contains("idle") && left_out.contains("203.0.113.0/24"), "{left_out}");
}

#[test]
fn a_dead_shims_network_is_undone_from_its_record() {
    let mut pod = Pod::new();
    let before = pod.inside.ip("-o link");
    let attached = pod.attach().unwrap();
    assert!(pod.inside.run("tc", "qdisc show dev eth0").contains("ingress"));
    // The machine's process holds the tap device on.
    let held = attached.cards[0].tap.as_fd().try_clone_to_owned().unwrap();
    drop(attached);
    pod.undo();
    assert!(!pod.inside.run("tc", "qdisc show dev eth0").contains("ingress"));
    assert_eq!(pod.inside.ip("-o link"), before);
    drop(held);
    // The namespace's own stack answers again.
    let refused = pod.outside.work(|| TcpStream::connect(("10.88.0.5", 1)));
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    pod.attach().unwrap();
    pod.undo();
}

#[test]
fn a_tap_device_goes_with_its_descriptor() {
    let mut pod = Pod::new();
    let before = pod.inside.ip("-o link");
    drop(pod.attach().unwrap());
    assert_eq!(pod.inside.ip("-o link"), before);
    pod.undo();
}

#[test]
fn a_namespace_that_is_gone_needs_no_undoing() {
    let mut pod = Pod::new();
    let attached = pod.attach().unwrap();
    drop(attached);
    pod.inside.end();
    pod.undo();
}

#[test]
fn somebody_elses_namespace_at_the_same_path_is_left_alone() {
    let other = Netns::new();
    other.ip("link add eth0 type veth peer name peer");
    other.run("tc", "qdisc add dev eth0 ingress");
    let namespace = NamespaceId { inode: other.inode() + 1, ..Namespace::open(&other.path).unwrap().id };
    remove_redirect(&namespace, "eth0").unwrap();
    remove_interface(&namespace, "eth0").unwrap();
    assert!(other.run("tc", "qdisc show dev eth0").contains("ingress"));
    let namespace = Namespace::open(&other.path).unwrap().id;
    remove_redirect(&namespace, "eth0").unwrap();
    remove_redirect(&namespace, "eth0").unwrap();
    remove_interface(&namespace, "eth0").unwrap();
    remove_interface(&namespace, "eth0").unwrap();
    assert!(!other.ip("-o link").contains("eth0"));
}

#[test]
fn what_a_machine_cannot_have_is_refused_before_anything_is_made() {
    let mut pod = Pod::new();
    pod.inside.run("tc", "qdisc add dev eth0 ingress");
    assert!(matches!(pod.attach(), Err(NetworkError::Occupied(name)) if name == "eth0"));
    pod.inside.run("tc", "qdisc del dev eth0 ingress");
    pod.inside.ip("tuntap add wire mode tun");
    pod.attach().unwrap();
    pod.inside.ip("link set wire up");
    let again = Journal::open(pod.directory.path()).unwrap().resources().len();
    assert!(matches!(pod.attach(), Err(NetworkError::NotEthernet(name)) if name == "wire"));
    let hosts = attach(&mut pod.journal, Path::new("/proc/self/ns/net"));
    assert!(matches!(hosts, Err(NetworkError::HostNetwork)));
    let missing = attach(&mut pod.journal, Path::new("/nonexistent"));
    assert!(matches!(missing, Err(NetworkError::Open { .. })));
    let file = attach(&mut pod.journal, Path::new("/etc/passwd"));
    assert!(matches!(file, Err(NetworkError::Enter { .. })));
    assert_eq!(pod.journal.resources().len(), again);
    pod.undo();
}

#[test]
fn a_namespace_with_nothing_but_loopback_is_a_network() {
    let inside = Netns::new();
    let directory = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(directory.path()).unwrap();
    let attached = attach(&mut journal, &inside.path).unwrap();
    assert!(attached.cards.is_empty());
    assert_eq!(attached.description, Description::default());
}

#[test]
fn whoever_connects_to_any_port_of_the_loopback_is_heard() {
    let netns = Netns::new();
    let loopback = Loopback::listen(&Namespace::open(&netns.path).unwrap()).unwrap();
    for (address, port) in [("127.0.0.1", 80), ("::1", 4321)] {
        let client = netns.work(move || TcpStream::connect((address, port)).unwrap());
        loopback.listener().set_nonblocking(false).unwrap();
        let (connection, from) = loopback.listener().accept().unwrap();
        assert_eq!(connection.local_addr().unwrap().port(), port);
        assert_eq!(from.port(), client.local_addr().unwrap().port());
    }
    drop(loopback);
    assert!(
        netns.work(|| TcpStream::connect("127.0.0.1:80")).is_err(),
        "connections are still led somewhere"
    );
}
