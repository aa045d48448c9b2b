//! A pod's network, as CNI's bridge and portmap plugins make it: the guest is in it as a process would be.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, Cri, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PortMapping},
    ctr::{self, Ctr},
    leaks::Holdings,
    node::Node,
    streaming::Streams,
};

const HANDLER: &str = "caisson";
const PATIENCE: Duration = Duration::from_secs(60);
/// The port of the host that leads to the pod's.
const PUBLISHED: u16 = 18080;

/// What an HTTP server says, once it listens.
async fn get(address: &str) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error).context(address.to_owned()),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test]
async fn a_published_port_and_both_families_lead_into_the_machine() -> Result<()> {
    let (node, mut cri, before) = cri::ready().await?;
    let mut config = cri::pod_config("shim-ports");
    config.port_mappings =
        vec![PortMapping { container_port: 80, host_port: PUBLISHED.into(), ..PortMapping::default() }];
    let pod = cri.run_pod(config, HANDLER).await.with_context(|| node.containerd_log())?;
    let script = "mkdir /www; echo from the pod > /www/index.html; httpd -f -p [::]:80 -h /www";
    let server = cri::container_config("server", BUSYBOX_IMAGE, &["sh", "-c", script]);
    let server = cri.run_container(&pod, server).await?;

    let network = cri.pod_status(&pod).await?.network.context("the pod has no network")?;
    let six = network.additional_ips.first().map(|additional| additional.ip.clone()).unwrap_or_default();
    ensure!(network.ip.starts_with("10.244.77.") && six.starts_with("fd77:"), "{network:?}");
    let published = [format!("10.244.77.1:{PUBLISHED}"), format!("127.0.0.1:{PUBLISHED}")];
    for address in [format!("{}:80", network.ip), format!("[{six}]:80")].iter().chain(&published) {
        let answer = get(address).await?;
        ensure!(answer.ends_with("from the pod\n"), "{address}: {answer:?}");
    }
    let seen =
        cri.said(&server, "ip addr show eth0; ip route; ip -6 route; cat /sys/class/net/eth0/mtu").await?;
    for expected in
        [&*network.ip, &*six, "default via 10.244.77.1 dev eth0", "default via fd77::1 dev eth0", "1500"]
    {
        ensure!(seen.contains(expected), "no {expected:?} in\n{seen}");
    }
    // To the host, by both.
    cri.said(&server, "ping -c 1 -W 10 10.244.77.1 && ping -6 -c 1 -W 10 fd77::1").await?;

    let forwarded = forward(&mut cri, &pod).await;
    forwarded.with_context(|| node.containerd_log())?;
    cri.remove_pod(&pod).await?;
    ensure!(TcpStream::connect(&published[1]).is_err(), "the port is still published");
    before.assert_nothing_added()
}

/// `kubectl port-forward`: a client of containerd's reaches a port of the pod's loopback.
async fn forward(cri: &mut Cri, pod: &cri::Pod) -> Result<()> {
    let mut streams: Streams = cri.port_forward(pod, 80).await?;
    // Both channels begin with the port.
    streams.expect_bytes(0, 2).await?;
    streams.send(0, b"GET / HTTP/1.0\r\n\r\n").await?;
    let got = streams.expect(0, "from the pod\n").await;
    got.with_context(|| format!("the other channel said {:?}", streams.text(1)))
}

#[tokio::test]
async fn a_pod_that_wants_the_hosts_network_is_told_why_not() -> Result<()> {
    let (_, mut cri, before) = cri::ready().await?;
    let mut config = cri::pod_config("shim-hostnetwork");
    let options = NamespaceOption { network: NamespaceMode::Node.into(), ..NamespaceOption::default() };
    config.linux.get_or_insert_default().security_context =
        Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
    let refused = cri.run_pod(config, HANDLER).await.err().context("it runs")?;
    let told = format!("{refused:#}");
    ensure!(told.contains("can't be in the host's network namespace"), "{told}");
    before.assert_nothing_added()
}

/// A network namespace that has more than CNI's usual plugins make; gone when it is dropped.
struct Namespace;

impl Namespace {
    const PATH: &str = "/run/caisson-many";
    const MAKE: &str = "
        touch /run/caisson-many; unshare --net=/run/caisson-many true
        ip link add cmany0 mtu 1400 type veth peer name eth0 mtu 1400 address 02:00:00:00:00:02
        ip link add cmany1 mtu 9000 type veth peer name data0 mtu 9000 address 02:00:00:00:01:02
        ip link set eth0 netns /run/caisson-many; ip link set data0 netns /run/caisson-many
        ip address add 10.99.0.1/24 dev cmany0; ip address add 10.99.1.1/24 dev cmany1
        ip address add fd99::1/64 dev cmany0 nodad; ip link set cmany0 up; ip link set cmany1 up
        nsenter --net=/run/caisson-many ip -batch - <<END
            link set lo up
            link set eth0 up
            link set data0 up
            address add 10.99.0.2/24 dev eth0
            address add 10.99.0.3/24 dev eth0
            address add fd99::2/64 dev eth0 nodad
            address add 10.99.1.2/24 dev data0
            route add default via 10.99.0.1
            route add 10.50.0.0/16 via 10.99.1.1 dev data0 metric 7
            route add 10.60.0.0/16 dev data0 src 10.99.1.2 mtu 1300
            route add 10.70.0.0/16 via 10.99.0.1 table 100
            route add ::/0 via fd99::1 dev eth0
            route add fd50::/48 via fd99::5 dev eth0 metric 9
            neighbour add 10.99.1.77 lladdr 02:00:00:00:00:77 dev data0 nud permanent
            neighbour add fd99::77 lladdr 02:00:00:00:00:78 dev eth0 nud permanent
END";

    fn make() -> Result<Self> {
        let made = Self;
        sh(Self::MAKE)?;
        Ok(made)
    }

    /// What a runtime could leave in it.
    fn holdings(&self) -> Result<String> {
        sh(&format!("nsenter --net={} sh -c 'ip -brief link; tc qdisc; tc filter'", Self::PATH))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The links go with their ends inside.
        let _ = sh(&format!("umount {0}; rm {0}", Self::PATH));
    }
}

fn sh(script: &str) -> Result<String> {
    let output = ctr::run(Command::new("sh").args(["-ec", script]))?;
    ensure!(output.code == 0, "{script}: {output:?}");
    Ok(output.stdout)
}

/// What a container with this network sees and reaches. busybox has no word for neighbours' states.
const SEEN: &str = r"
    for card in eth0 data0; do
        cat /sys/class/net/$card/address /sys/class/net/$card/mtu
        ip -o address show dev $card | grep -v fe80 | awk '{ print $2, $3, $4 }'
    done
    ip route; ip route show table 100; ip -6 route | grep -v -E 'fe80|ff00' | sed 's/ *$//'
    ip neigh | grep PERMANENT
    for target in '1372 10.99.0.1' '8972 10.99.1.1' '1352 fd99::1'; do
        ping -c 1 -W 20 -s $target | grep -c '1 packets received'
    done";

#[test]
fn every_interface_comes_with_all_that_it_has() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let before = Holdings::now()?;
    let namespace = Namespace::make()?;
    let network = format!("network:{}", Namespace::PATH);
    let untouched = namespace.holdings()?;
    let ask = |runtime: &str| {
        let options = ["run", "--rm", "--runtime", runtime, "--with-ns", &network];
        ctr.try_run(&[&options[..], &[BUSYBOX_IMAGE, "shim-many", "sh", "-c", SEEN]].concat())
    };
    let theirs = ask("io.containerd.runc.v2")?;
    let lines = theirs.stdout.lines().count();
    ensure!(theirs.code == 0 && lines > 20 && theirs.stdout.ends_with("1\n1\n1\n"), "{theirs:?}");
    let ours = ask("io.containerd.caisson.v2")?;
    ensure!(ours == theirs, "{}\nand with runc\n{}\n{}", ours.stdout, theirs.stdout, node.containerd_log());
    ensure!(namespace.holdings()? == untouched, "left: {}", namespace.holdings()?);
    drop(namespace);
    before.assert_nothing_added()
}
