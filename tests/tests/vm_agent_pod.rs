//! A pod in a machine of our own, with everything that a sandbox can be given, on a network that the host is on.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containers::{self, Pod, pod_spec, process},
    net::{ip, tap},
    pod_vm::PodVm,
    vmm::PATIENCE,
    vsock::pattern,
};
use caisson_protocol::v1::{self, copy_target::Within, event::Kind, log_line::Source};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

/// What an idle agent may have of anonymous memory.
const IDLE: u64 = 2 << 20;

const MAC: &str = "02:ca:15:00:00:93";

fn sandbox() -> v1::CreateSandboxRequest {
    let interface = v1::Interface {
        mac: MAC.into(),
        name: "eth0".into(),
        mtu: 1400,
        addresses: vec!["10.93.0.2/24".into(), "fd93::2/64".into()],
        ..Default::default()
    };
    let network = v1::NetworkConfig {
        interfaces: vec![interface],
        routes: vec![
            v1::Route { gateway: "10.93.0.1".into(), ..Default::default() },
            v1::Route { gateway: "fd93::1".into(), device: "eth0".into(), ..Default::default() },
        ],
        neighbours: vec![v1::Neighbour {
            address: "10.93.0.77".into(),
            device: "eth0".into(),
            mac: "02:ca:15:00:00:77".into(),
        }],
    };
    let dns = v1::Dns {
        servers: vec!["10.93.0.53".into()],
        searches: vec!["example.org".into()],
        options: vec!["ndots:5".into()],
    };
    v1::CreateSandboxRequest {
        id: "pod".into(),
        hostname: "web-0".into(),
        dns: Some(dns),
        network: Some(network),
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned())].into(),
        share_pid_namespace: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_pod_has_all_that_it_was_promised() -> Result<()> {
    let tap = tap("e2e-pod0")?;
    ip("addr add 10.93.0.1/24 dev e2e-pod0")?;
    ip("-6 addr add fd93::1/64 dev e2e-pod0 nodad")?;
    ip("link set e2e-pod0 up")?;
    let mut vm = PodVm::boot("").await?;
    let idle = metric(&vm, "agent_anonymous_bytes").await?;
    println!("the idle agent has {} KiB of anonymous memory", idle / 1024);
    ensure!(idle <= IDLE, "the idle agent has {idle} bytes of anonymous memory");

    vm.plug_card(tap.as_fd(), MAC).await?;
    let pod = vm.pod_of(sandbox()).await?;
    let server = "echo served > /tmp/file; exec httpd -f -p '[::]:8080' -h /tmp";
    pod.launch("server", &pod_spec(&process(server, false), &vm.sandbox)?).await?;
    namespaces_are_shared(&vm, &pod).await.context("namespaces")?;
    the_pods_init_is_harmless(&vm, &pod).await.context("init")?;
    limits_are_those_of_a_node(&pod).await.context("limits")?;
    the_network_works(&vm).await.context("network")?;
    names_are_looked_up_where_it_says(&vm, &pod).await.context("DNS")?;
    ports_are_forwarded(&vm).await.context("port-forward")?;
    files_go_in_and_out(&vm, &pod).await.context("copies")?;
    use_is_accounted(&vm, &pod).await.context("statistics")?;
    ended_containers_are_not_signalled(&vm, &pod).await.context("signals")?;
    the_kernels_log_arrives(&vm, &pod).await.context("kernel log")?;

    vm.client.sandbox().destroy_sandbox(v1::DestroySandboxRequest::default()).await?;
    println!("after the pod it has {} KiB", metric(&vm, "agent_anonymous_bytes").await? / 1024);
    let health = vm.client.agent().health(v1::HealthRequest {}).await?.into_inner();
    ensure!(health.faults.is_empty(), "{health:?}");
    Ok(())
}

async fn metric(vm: &PodVm, name: &str) -> Result<u64> {
    let metrics = vm.client.agent().metrics(v1::MetricsRequest {}).await?.into_inner().metrics;
    let metric = metrics.into_iter().find(|metric| metric.name == name);
    // Bytes, far below 2^53.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(metric.with_context(|| format!("no {name}"))?.value as u64)
}

/// A second container has the first one's names, network, memory and processes, and nothing of the agent's signals.
async fn namespaces_are_shared(vm: &PodVm, pod: &Pod) -> Result<()> {
    const IGNORED: &str = "grep SigIgn /proc/self/status";
    /// Signal 13, in a mask that begins with 1.
    const SIGPIPE: u64 = 1 << 12;
    let script = "hostname; for kind in ipc uts net pid; do readlink /proc/self/ns/$kind; done; \
                  wget -q -O - http://127.0.0.1:8080/file; ps | grep -c '[h]ttpd -f'";
    let out = pod.output_of("second", &pod_spec(&process(script, false), &vm.sandbox)?).await?;
    let links =
        pod.exec("server", "for kind in ipc uts net pid; do readlink /proc/self/ns/$kind; done").await?;
    ensure!(out == format!("web-0\n{links}served\n1\n"), "{out:?}, and the first has {links:?}");
    for said in [pod.exec("server", IGNORED).await?, pod.output("signals", IGNORED).await?] {
        let ignored = u64::from_str_radix(said.trim().trim_start_matches("SigIgn:\t"), 16)?;
        ensure!(ignored & SIGPIPE == 0, "the agent's ignored signals are passed on: {said}");
    }
    // One that shares nothing has none of it.
    let own = pod.output("own", "for kind in pid; do readlink /proc/self/ns/$kind; done").await?;
    ensure!(!links.contains(own.trim()), "{own} is the pod's");
    Ok(())
}

/// A container that may trace the pod's init finds nothing of the machine behind it.
async fn the_pods_init_is_harmless(vm: &PodVm, pod: &Pod) -> Result<()> {
    let script = "ls -A /proc/1/root /proc/1/fd /proc/1/cwd
        for kind in ipc uts net pid; do
            [ $(readlink /proc/1/ns/$kind) = $(readlink /proc/self/ns/$kind) ] || echo $kind
        done
        (echo x > /proc/1/exe) 2> /dev/null && echo written
        grep -E '^(CapPrm|CapEff|NoNewPrivs)' /proc/1/status";
    let mut spec = pod_spec(&process(script, false), &vm.sandbox)?;
    let all = serde_json::json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL"]);
    spec["process"]["capabilities"] =
        serde_json::json!({"bounding": all, "effective": all, "permitted": all});
    let said = pod.output_of("tracer", &spec).await?;
    let nothing = "/proc/1/cwd:\n\n/proc/1/fd:\n\n/proc/1/root:\n";
    let none = "0".repeat(16);
    ensure!(said == format!("{nothing}CapPrm:\t{none}\nCapEff:\t{none}\nNoNewPrivs:\t1\n"), "{said:?}");
    Ok(())
}

/// Limits that the specification does not name are not those of a bare kernel on a small machine.
async fn limits_are_those_of_a_node(pod: &Pod) -> Result<()> {
    let limits = "cat /proc/self/limits";
    for said in [pod.output("limits", limits).await?, pod.exec("server", limits).await?] {
        for (name, soft, hard) in [
            ("Max open files", "1024", "1048576"),
            ("Max processes", "unlimited", "unlimited"),
            ("Max pending signals", "unlimited", "unlimited"),
            ("Max core file size", "0", "unlimited"),
        ] {
            let line = said.lines().find_map(|line| line.strip_prefix(name)).context(name)?;
            let values: Vec<_> = line.split_whitespace().take(2).collect();
            ensure!(values == [soft, hard], "{name}: {values:?}");
        }
    }
    Ok(())
}

/// The interface is as it was asked for, and the host reaches the pod by both families.
async fn the_network_works(vm: &PodVm) -> Result<()> {
    let listed = vm.client.network().get_network(v1::GetNetworkRequest {}).await?.into_inner();
    let network = listed.network.context("a network")?;
    let eth0 = network.interfaces.iter().find(|interface| interface.mac == MAC).context("the interface")?;
    ensure!((eth0.name.as_str(), eth0.mtu, eth0.up) == ("eth0", 1400, true), "{eth0:?}");
    for address in ["10.93.0.2/24", "fd93::2/64"] {
        ensure!(eth0.addresses.iter().any(|had| had == address), "{address} is not in {eth0:?}");
    }
    for gateway in ["10.93.0.1", "fd93::1"] {
        let default = |route: &v1::Route| route.gateway == gateway && route.destination.is_empty();
        ensure!(network.routes.iter().any(default), "no route by {gateway} in {:?}", network.routes);
    }
    ensure!(network.neighbours.iter().any(|neighbour| neighbour.address == "10.93.0.77"), "{network:?}");
    for address in ["10.93.0.2:8080", "[fd93::2]:8080"] {
        let said = tokio::task::spawn_blocking(move || fetch(address)).await??;
        ensure!(said.ends_with("served\n"), "{address}: {said}");
    }
    Ok(())
}

fn fetch(address: &str) -> Result<String> {
    let address: SocketAddr = address.parse()?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).with_context(|| format!("{address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// resolv.conf is what was asked for, and a change of it shows in a container that runs.
async fn names_are_looked_up_where_it_says(vm: &PodVm, pod: &Pod) -> Result<()> {
    let read = || pod.exec("server", "cat /etc/resolv.conf");
    let first = read().await?;
    ensure!(first == "nameserver 10.93.0.53\nsearch example.org\noptions ndots:5\n", "{first}");
    let dns = v1::Dns { servers: vec!["fd93::53".into()], ..Default::default() };
    vm.client.network().set_dns(v1::SetDnsRequest { dns: Some(dns) }).await?;
    let second = read().await?;
    ensure!(second == "nameserver fd93::53\n", "{second}");
    Ok(())
}

/// Bytes reach a server in the pod through the agent, and a port that nobody listens on is refused.
async fn ports_are_forwarded(vm: &PodVm) -> Result<()> {
    let mut transfers = vm.client.transfers();
    let request = |port| v1::PortForwardRequest { port, address: String::new() };
    let refused = transfers.port_forward(request(9)).await.err().map(|error| error.code());
    ensure!(refused == Some(Code::FailedPrecondition), "{refused:?}");
    let id = transfers.port_forward(request(8080)).await?.into_inner().stream;
    let mut stream = vm.client.stream(id).await?;
    stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").await?;
    let mut said = String::new();
    stream.read_to_string(&mut said).await?;
    ensure!(said.ends_with("served\n"), "{said}");
    Ok(())
}

/// What goes into a container is there, and comes out the same.
async fn files_go_in_and_out(vm: &PodVm, pod: &Pod) -> Result<()> {
    let target = |path: &str| {
        Some(v1::CopyTarget { within: Some(Within::ContainerId("server".into())), path: path.into() })
    };
    let bytes = pattern(4 << 20);
    let mut transfers = vm.client.transfers();
    let request = v1::CopyInRequest {
        target: target("/tmp/in/file"),
        size: bytes.len() as u64,
        mode: 0o644,
        uid: 3,
        gid: 4,
        make_parents: true,
        ..Default::default()
    };
    let id = transfers.copy_in(request).await?.into_inner().stream;
    let mut stream = vm.client.stream(id).await?;
    stream.write_all(&bytes).await?;
    stream.shutdown().await?;
    let moved = transfers.wait_transfer(v1::WaitTransferRequest { stream: id }).await?.into_inner().bytes;
    ensure!(moved == bytes.len() as u64, "{moved} bytes went in");
    let seen = pod.exec("server", "stat -c '%a %u:%g %s' /tmp/in/file; cp /tmp/in/file /tmp/copy").await?;
    ensure!(seen == format!("644 3:4 {}\n", bytes.len()), "{seen}");
    let reply = transfers.copy_out(v1::CopyOutRequest { source: target("tmp/copy") }).await?.into_inner();
    ensure!(reply.size == bytes.len() as u64, "{reply:?}");
    let mut back = Vec::new();
    vm.client.stream(reply.stream).await?.read_to_end(&mut back).await?;
    ensure!(back == bytes, "what came out differs");
    let missing = transfers.copy_out(v1::CopyOutRequest { source: target("nothing") }).await.err();
    ensure!(missing.as_ref().map(tonic::Status::code) == Some(Code::NotFound), "{missing:?}");
    Ok(())
}

/// Statistics follow what a container does.
async fn use_is_accounted(vm: &PodVm, pod: &Pod) -> Result<()> {
    let limits = r#"{"memory":{"limit":33554432},"pids":{"limit":50},"cpu":{"quota":80000,"period":100000}}"#;
    pod.run("busy", &process("while :; do :; done", false), limits).await?;
    let request = || v1::StatsRequest { container_id: "busy".into() };
    let deadline = Instant::now() + PATIENCE;
    let stats = loop {
        let stats = vm.client.containers().stats(request()).await?.into_inner();
        if stats.cpu.is_some_and(|cpu| cpu.usage_usec > 300_000) {
            break stats;
        }
        ensure!(Instant::now() < deadline, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let (memory, pids) = (stats.memory.context("memory")?, stats.pids.context("pids")?);
    ensure!(memory.usage_limit == 32 << 20 && memory.usage > 0, "{memory:?}");
    ensure!(memory.stat.contains_key("anon") && stats.memory_events.is_some(), "{memory:?}");
    ensure!((pids.current, pids.limit) == (1, 50), "{pids:?}");
    pod.remove("busy").await
}

/// A signal to a process that has ended finds nobody, whoever of the container it is meant for.
async fn ended_containers_are_not_signalled(vm: &PodVm, pod: &Pod) -> Result<()> {
    pod.run("ended", &process("true", false), "{}").await?;
    ensure!(pod.wait("ended", "").await?.code == 0);
    for all in [false, true] {
        let signal =
            v1::SignalRequest { container_id: "ended".into(), signal: 15, all, ..Default::default() };
        let refused = vm.client.containers().signal(signal).await.err().map(|error| error.code());
        ensure!(refused == Some(Code::NotFound), "all: {all}: {refused:?}");
    }
    pod.remove("ended").await
}

/// What the kernel says at its start and later comes to the host.
async fn the_kernels_log_arrives(vm: &PodVm, pod: &Pod) -> Result<()> {
    let mut lines = vm.client.agent().logs(v1::LogsRequest::default()).await?.into_inner();
    containers::too_much_memory_is_reported(pod).await?;
    let (mut early, mut late) = (false, false);
    while !(early && late) {
        let line = tokio::time::timeout(PATIENCE, lines.message()).await??.context("a line")?;
        if line.source() == Source::Kernel {
            early |= line.text.contains("Linux version");
            late |= line.text.contains("Memory cgroup out of memory") && line.severity <= 3;
        }
    }
    Ok(())
}

/// A panic ends a task of the agent, which says so and goes on; it does not end the machine.
#[tokio::test]
async fn a_panic_is_told_and_survived() -> Result<()> {
    let mut vm = PodVm::boot_with_options("caisson.failpoint=panic", "").await?;
    let from = v1::EventsRequest { from_sequence: 1, epoch: Vec::new() };
    let mut events = vm.client.agent().events(from).await?.into_inner();
    let event = tokio::time::timeout(PATIENCE, events.message()).await??.context("an event")?;
    let Some(Kind::Fault(fault)) = event.kind else { anyhow::bail!("{event:?}") };
    ensure!(fault.component == "panic" && fault.message.contains("a failpoint panics"), "{fault:?}");
    let health = vm.client.agent().health(v1::HealthRequest {}).await?.into_inner();
    ensure!(health.state() == v1::health_response::State::Degraded && health.faults.len() == 1, "{health:?}");
    let pod = vm.pod().await?;
    ensure!(pod.output("after", "echo still here").await? == "still here\n");
    vm.client.sandbox().shutdown(v1::ShutdownRequest::default()).await?;
    let status = vm.vmm.wait()?;
    ensure!(status.success(), "the VMM ended with {status}; {}", vm.vmm.tail());
    Ok(())
}
