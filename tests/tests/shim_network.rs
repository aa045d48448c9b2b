//! A pod's network, as CNI's bridge and portmap plugins make it: the guest is in it as a process would be.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    cri::{self, Cri, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PortMapping},
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
