//! The agent's verbs over a unix socket, without a VM.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use caisson_e2e::{agent::Agent, node::Product};
use caisson_protocol::{
    client::call,
    limits,
    v1::{self, copy_target::Within, storage::Source, tree_entry::Kind},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

fn tmpfs(id: &str, size: u64) -> v1::Storage {
    let source = Source::Tmpfs(v1::Tmpfs { size, ..Default::default() });
    v1::Storage { id: id.into(), source: Some(source), ..Default::default() }
}

fn within(storage: &str, path: &str) -> Option<v1::CopyTarget> {
    Some(v1::CopyTarget { within: Some(Within::StorageId(storage.into())), path: path.into() })
}

/// Every guest has the program in memory, and so has the page cache of its host.
#[test]
#[ignore = "about the size of what is shipped, which only soaks build"]
fn the_program_is_small() -> Result<()> {
    let size = fs::metadata(Product::Agent.path()?)?.len();
    ensure!(size <= 3_000_000, "it has {size} bytes");
    Ok(())
}

#[tokio::test]
async fn the_agent_tells_what_it_is() -> Result<()> {
    let agent = Agent::start().await?;
    assert_eq!(agent.client.version().protocol, 1);
    assert_eq!(agent.client.version().epoch.len(), 16);
    let too_new = v1::VersionRequest { min_protocol: 1000, max_protocol: 1001 };
    let refused = agent.client.agent().version(too_new).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let details = agent.client.agent().guest_details(v1::GuestDetailsRequest {}).await?.into_inner();
    assert!(details.memory_total > 0 && details.cpus_online > 0 && !details.is_init);
    let metrics = agent.client.agent().metrics(v1::MetricsRequest {}).await?.into_inner().metrics;
    assert!(metrics.iter().any(|metric| metric.name == "agent_anonymous_bytes" && metric.value > 0.0));
    let health = agent.client.agent().health(v1::HealthRequest {}).await?.into_inner();
    assert_eq!(health.state(), v1::health_response::State::Serving);
    Ok(())
}

#[tokio::test]
async fn a_sandbox_is_made_whole_and_unmade_without_a_rest() -> Result<()> {
    let agent = Agent::start().await?;
    let mounts = || agent.run_inside(&["cat", "/proc/mounts"]);
    // Once, so that what the first use allocates is not taken for a leak.
    agent.sandbox().await?;
    agent.client.sandbox().destroy_sandbox(v1::DestroySandboxRequest::default()).await?;
    let (mounts_before, descriptors_before) = (mounts()?, agent.descriptors()?);

    let request = v1::CreateSandboxRequest {
        id: "pod".into(),
        hostname: "web-0".into(),
        domainname: "example".into(),
        dns: Some(v1::Dns { servers: vec!["10.0.0.10".into()], ..Default::default() }),
        sysctls: HashMap::from([
            ("net.ipv4.ip_unprivileged_port_start".into(), "80".into()),
            ("kernel.shmmax".into(), "12345678".into()),
        ]),
        share_pid_namespace: true,
        storages: vec![tmpfs("shm", 1 << 20)],
        ..Default::default()
    };
    let pod = agent.client.sandbox().create_sandbox(call(request.clone())).await?.into_inner();
    let again = agent.client.sandbox().create_sandbox(call(request)).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let enter = |command: &[&str]| {
        let uts = format!("--uts={}", pod.uts_namespace);
        let net = format!("--net={}", pod.network_namespace);
        let ipc = format!("--ipc={}", pod.ipc_namespace);
        agent.run_inside(&[&["nsenter", &uts, &net, &ipc, "--"], command].concat())
    };
    assert_eq!(enter(&["uname", "-n"])?.trim(), "web-0");
    assert_eq!(enter(&["cat", "/proc/sys/kernel/domainname"])?.trim(), "example");
    assert_eq!(enter(&["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"])?.trim(), "80");
    assert_eq!(enter(&["cat", "/proc/sys/kernel/shmmax"])?.trim(), "12345678");
    assert_eq!(fs::read_to_string(agent.inside(&pod.resolv_conf))?, "nameserver 10.0.0.10\n");
    let inits = agent.run_inside(&[
        "nsenter",
        &format!("--pid={}", pod.pid_namespace),
        "--",
        "sh",
        "-c",
        "echo $$",
    ])?;
    assert_ne!(inits.trim(), "1", "the pod's init is there already");
    the_pods_init_has_nothing(&agent)?;

    agent.client.sandbox().destroy_sandbox(call(v1::DestroySandboxRequest::default())).await?;
    assert_eq!(mounts()?, mounts_before);
    assert_eq!(agent.descriptors()?, descriptors_before);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()))?;
    assert_eq!(children.trim(), "", "the pod's init is gone and reaped");
    Ok(())
}

/// Whoever takes the init over has nothing that a container has not.
fn the_pods_init_has_nothing(agent: &Agent) -> Result<()> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()))?;
    let init = format!("/proc/{}", children.trim());
    for empty in ["root", "fd"] {
        let found: Vec<_> = fs::read_dir(format!("{init}/{empty}"))?.flatten().collect();
        ensure!(found.is_empty(), "{empty} has {found:?}");
    }
    let status = fs::read_to_string(format!("{init}/status"))?;
    let nobody = [65_535; 4].map(|id: u32| id.to_string()).join("\t");
    for line in [
        format!("Uid:\t{nobody}"),
        format!("Gid:\t{nobody}"),
        "Groups:\t ".to_owned(),
        format!("CapPrm:\t{:016x}", 0),
        format!("CapEff:\t{:016x}", 0),
        "NoNewPrivs:\t1".to_owned(),
        "Seccomp:\t2".to_owned(),
    ] {
        ensure!(status.lines().any(|had| had == line), "no {line:?} in {status}");
    }
    for kind in ["mnt", "pid", "cgroup", "net", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("{process}/ns/{kind}"));
        ensure!(
            of(&init)? != of(&format!("/proc/{}", agent.pid()))?,
            "it is in the agent's {kind} namespace"
        );
    }
    // An undumpable process's files are root's.
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(format!("{init}/environ"))?);
    ensure!(owner == 0, "it can be traced by its user, {owner}");
    Ok(())
}

#[tokio::test]
async fn a_sandbox_that_fails_leaves_nothing() -> Result<()> {
    let agent = Agent::start().await?;
    let mounts = agent.run_inside(&["cat", "/proc/mounts"])?;
    let bad = v1::VirtioFs { tag: "no-such-share".into(), dax: false };
    let bad = v1::Storage { id: "bad".into(), source: Some(Source::VirtioFs(bad)), ..Default::default() };
    let requests = [
        v1::CreateSandboxRequest { storages: vec![tmpfs("good", 0), bad], ..Default::default() },
        v1::CreateSandboxRequest {
            sysctls: HashMap::from([("vm.swappiness".into(), "1".into())]),
            ..Default::default()
        },
        v1::CreateSandboxRequest { hostname: "not a name".into(), ..Default::default() },
    ];
    for mut request in requests {
        request.id = "pod".into();
        agent.client.sandbox().create_sandbox(request.clone()).await.expect_err(&format!("{request:?}"));
        assert_eq!(agent.run_inside(&["cat", "/proc/mounts"])?, mounts, "{request:?}");
    }
    agent.sandbox().await?;
    Ok(())
}

#[tokio::test]
async fn the_network_is_applied_and_read_back() -> Result<()> {
    let agent = Agent::start().await?;
    agent.sandbox().await?;
    let mac = "02:ca:15:00:00:01";
    agent.run_inside(&[
        "ip", "link", "add", "eth0", "address", mac, "type", "veth", "peer", "name", "peer0",
    ])?;
    agent.run_inside(&["ip", "link", "set", "peer0", "up"])?;
    let config = v1::NetworkConfig {
        interfaces: vec![v1::Interface {
            mac: mac.into(),
            name: "eth0".into(),
            mtu: 1400,
            addresses: vec!["10.1.0.5/24".into(), "fd00:1::5/64".into()],
            ..Default::default()
        }],
        routes: vec![
            v1::Route { gateway: "10.1.0.1".into(), ..Default::default() },
            v1::Route { gateway: "fd00:1::1".into(), device: "eth0".into(), ..Default::default() },
            v1::Route {
                destination: "192.0.2.0/24".into(),
                gateway: "169.254.1.1".into(),
                device: "eth0".into(),
                onlink: true,
                mtu: 1300,
                metric: 77,
                table: 100,
                ..Default::default()
            },
        ],
        neighbours: vec![v1::Neighbour {
            address: "169.254.1.1".into(),
            device: "eth0".into(),
            mac: "ee:ee:ee:ee:ee:ee".into(),
        }],
    };
    for _ in 0..2 {
        let request = v1::ApplyNetworkRequest { network: Some(config.clone()) };
        agent.client.network().apply_network(call(request)).await?;
    }
    let listed = agent.client.network().get_network(v1::GetNetworkRequest {}).await?.into_inner();
    let listed = listed.network.unwrap_or_default();
    let eth0 = &listed.interfaces[0];
    assert_eq!((eth0.name.as_str(), eth0.mac.as_str(), eth0.mtu, eth0.up), ("eth0", mac, 1400, true));
    for address in &config.interfaces[0].addresses {
        assert!(eth0.addresses.contains(address), "{address} in {:?}", eth0.addresses);
    }
    for wanted in &config.routes {
        let like = |route: &v1::Route| {
            (&route.gateway, &route.destination, route.table, route.mtu, route.onlink)
                == (&wanted.gateway, &wanted.destination, wanted.table, wanted.mtu, wanted.onlink)
        };
        assert!(listed.routes.iter().any(like), "{wanted:?} in {:?}", listed.routes);
    }
    assert_eq!(listed.neighbours, config.neighbours);

    agent.client.network().remove_interface(v1::RemoveInterfaceRequest { mac: mac.into() }).await?;
    assert!(agent.run_inside(&["ip", "link"])?.contains(mac), "the interface is back");
    let gone = agent.client.network().remove_interface(v1::RemoveInterfaceRequest { mac: mac.into() }).await;
    assert_eq!(gone.unwrap_err().code(), Code::NotFound);
    Ok(())
}

/// The plugin `ptp` gives an address with a prefix, and takes away the route to it that the kernel made.
#[tokio::test]
async fn exactly_the_routes_that_are_named_are_made() -> Result<()> {
    let agent = Agent::start().await?;
    agent.sandbox().await?;
    let mac = "02:ca:15:00:00:02";
    agent.run_inside(&[
        "ip", "link", "add", "eth0", "address", mac, "type", "veth", "peer", "name", "peer0",
    ])?;
    agent.run_inside(&["ip", "link", "set", "peer0", "up"])?;
    let route = |destination: &str, gateway: &str, source: &str| v1::Route {
        destination: destination.into(),
        gateway: gateway.into(),
        device: "eth0".into(),
        source: source.into(),
        scope: (if gateway.is_empty() { v1::route::Scope::Link } else { v1::route::Scope::Universe }).into(),
        ..Default::default()
    };
    let interface = v1::Interface {
        mac: mac.into(),
        name: "eth0".into(),
        addresses: vec!["10.1.0.5/24".into(), "fd00:1::5/64".into()],
        no_prefix_routes: true,
        ..Default::default()
    };
    let config = v1::NetworkConfig {
        interfaces: vec![interface],
        routes: vec![
            route("10.1.0.1/32", "", "10.1.0.5"),
            route("fd00:1::1/128", "", ""),
            route("10.1.0.0/24", "10.1.0.1", ""),
            route("fd00:1::/64", "fd00:1::1", ""),
        ],
        ..Default::default()
    };
    let own = |routes: Vec<v1::Route>| -> Vec<(String, String)> {
        let own = routes.into_iter().filter(|route| {
            route.destination.starts_with("10.1.") || route.destination.starts_with("fd00:1:")
        });
        let mut own: Vec<_> = own.map(|route| (route.destination, route.gateway)).collect();
        own.sort();
        own
    };
    let apply = async |config: &v1::NetworkConfig| -> Result<Vec<(String, String)>> {
        let request = v1::ApplyNetworkRequest { network: Some(config.clone()) };
        agent.client.network().apply_network(call(request)).await?;
        let listed = agent.client.network().get_network(v1::GetNetworkRequest {}).await?.into_inner();
        Ok(own(listed.network.unwrap_or_default().routes))
    };
    let wanted = own(config.routes.clone());
    assert_eq!(apply(&config).await?, wanted);
    assert_eq!(apply(&config).await?, wanted, "once more");
    Ok(())
}

#[tokio::test]
async fn storages_are_stacked_filled_and_taken_away() -> Result<()> {
    let agent = Agent::start().await?;
    let mut storages = agent.client.storages();
    for storage in [tmpfs("lower", 1 << 20), tmpfs("upper", 1 << 20)] {
        storages.mount_storage(v1::MountStorageRequest { storage: Some(storage) }).await?;
    }
    let entry =
        |path: &str, kind| v1::TreeEntry { path: path.into(), kind: Some(kind), mode: 0o644, uid: 0, gid: 0 };
    let entries = vec![entry("a", Kind::File(b"one".to_vec())), entry("b", Kind::Symlink("a".into()))];
    storages.sync_tree(v1::SyncTreeRequest { storage_id: "lower".into(), entries }).await?;
    let overlay = v1::Overlay { lowers: vec!["lower".into()], upper: "upper".into() };
    let root =
        v1::Storage { id: "root".into(), source: Some(Source::Overlay(overlay)), ..Default::default() };
    let path =
        storages.mount_storage(v1::MountStorageRequest { storage: Some(root) }).await?.into_inner().path;
    assert_eq!(fs::read_to_string(agent.inside(&path).join("b"))?, "one");
    fs::write(agent.inside(&path).join("a"), "changed")?;
    assert_eq!(fs::read_to_string(agent.inside(agent.root().join("storage/lower/a")))?, "one");
    let busy = storages.unmount_storage(v1::UnmountStorageRequest { id: "lower".into() }).await.unwrap_err();
    assert_eq!(busy.code(), Code::FailedPrecondition);
    for id in ["root", "lower", "upper", "upper"] {
        storages.unmount_storage(v1::UnmountStorageRequest { id: id.into() }).await?;
    }
    assert!(!agent.run_inside(&["cat", "/proc/mounts"])?.contains("/storage/"));
    Ok(())
}

#[tokio::test]
async fn files_go_in_and_out_unless_the_policy_forbids() -> Result<()> {
    let agent = Agent::start().await?;
    let storage = Some(tmpfs("data", 64 << 20));
    agent.client.storages().mount_storage(v1::MountStorageRequest { storage }).await?;
    let bytes: Vec<u8> = (0..32u32 << 20).map(|at| (at ^ (at >> 9)).to_le_bytes()[0]).collect();
    let request = v1::CopyInRequest {
        target: within("data", "/dir/file"),
        size: bytes.len() as u64,
        mode: 0o600,
        make_parents: true,
        ..Default::default()
    };
    let mut transfers = agent.client.transfers();
    let id = transfers.copy_in(request.clone()).await?.into_inner().stream;
    let mut stream = agent.client.stream(id).await?;
    stream.write_all(&bytes).await?;
    stream.shutdown().await?;
    let moved = transfers.wait_transfer(v1::WaitTransferRequest { stream: id }).await?.into_inner().bytes;
    assert_eq!(moved, bytes.len() as u64);

    let out = v1::CopyOutRequest { source: within("data", "dir/file") };
    let reply = transfers.copy_out(out.clone()).await?.into_inner();
    let mut back = Vec::new();
    agent.client.stream(reply.stream).await?.read_to_end(&mut back).await?;
    assert!(back == bytes, "what came out is what went in");

    let policy = Some(v1::Policy { deny_copy: true, ..Default::default() });
    agent.client.agent().restrict_policy(v1::RestrictPolicyRequest { policy }).await?;
    let allow = v1::RestrictPolicyRequest { policy: Some(v1::Policy::default()) };
    let now = agent.client.agent().restrict_policy(allow).await?.into_inner().policy.unwrap_or_default();
    assert!(now.deny_copy, "what is off stays off");
    assert_eq!(transfers.copy_in(request).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(transfers.copy_out(out).await.unwrap_err().code(), Code::PermissionDenied);
    Ok(())
}

#[tokio::test]
async fn ports_inside_the_pod_are_reached() -> Result<()> {
    let agent = Agent::start().await?;
    let pod = agent.sandbox().await?;
    let mut transfers = agent.client.transfers();
    let request = v1::PortForwardRequest { port: 8080, address: String::new() };
    let refused = transfers.port_forward(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let net = format!("--net={}", pod.network_namespace);
    let pid = agent.pid().to_string();
    let program = "import socket\ns=socket.create_server(('127.0.0.1',8080))\nc,_=s.accept()\nd=b''\n\
                   while True:\n b=c.recv(65536)\n if not b: break\n d+=b\nc.sendall(d[::-1])\nc.close()";
    let mut server = tokio::process::Command::new("nsenter")
        .args(["--mount", "--target", &pid, "--", "nsenter", &net, "--", "python3", "-c", program])
        .kill_on_drop(true)
        .spawn()?;
    let stream = loop {
        match transfers.port_forward(request.clone()).await {
            Ok(reply) => break reply.into_inner().stream,
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    };
    let mut connection = agent.client.stream(stream).await?;
    connection.write_all(b"forward").await?;
    connection.shutdown().await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    assert_eq!(answer, "drawrof", "half-closes are passed on both ways");
    server.wait().await?;
    Ok(())
}

#[tokio::test]
async fn events_resume_and_gaps_are_told() -> Result<()> {
    let agent = Agent::start().await?;
    let mut client = agent.client.agent();
    let future = v1::EventsRequest { from_sequence: 2, epoch: Vec::new() };
    assert_eq!(client.events(future).await.unwrap_err().code(), Code::OutOfRange);
    let other = v1::EventsRequest { from_sequence: 1, epoch: vec![1; 16] };
    assert_eq!(client.events(other).await.unwrap_err().code(), Code::OutOfRange);
    let epoch = agent.client.version().epoch.clone();
    let mut events = client.events(v1::EventsRequest { from_sequence: 1, epoch }).await?.into_inner();
    agent.client.sandbox().shutdown(v1::ShutdownRequest { grace_ms: 0, reboot: false }).await?;
    let event = events.message().await?.expect("an event");
    assert_eq!(event.sequence, 1);
    assert!(matches!(event.kind, Some(v1::event::Kind::ShuttingDown(_))));
    assert!(events.message().await?.is_none(), "the stream ends in order");
    Ok(())
}

#[tokio::test]
async fn the_log_can_be_read_back() -> Result<()> {
    let agent = Agent::start().await?;
    let request = v1::LogsRequest { from_sequence: 0, no_follow: true };
    let mut lines = agent.client.agent().logs(request).await?.into_inner();
    let mut found = false;
    while let Some(line) = lines.message().await? {
        found |= line.text.contains("serving") && line.source() == v1::log_line::Source::Agent;
    }
    assert!(found, "the agent's first line was kept");
    Ok(())
}

#[tokio::test]
async fn control_connections_beyond_the_limit_are_closed() -> Result<()> {
    let agent = Agent::start().await?;
    let mut others = Vec::new();
    // The agent's own client holds one.
    for _ in 1..limits::MAX_CONTROL_CONNECTIONS {
        others.push(agent.connect().await?);
    }
    ensure!(agent.connect().await.is_err(), "one more was let in");
    agent.client.agent().health(v1::HealthRequest {}).await?;
    others.pop();
    let deadline = Instant::now() + Duration::from_secs(20);
    while agent.connect().await.is_err() {
        ensure!(Instant::now() < deadline, "the place of a closed connection stays taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
