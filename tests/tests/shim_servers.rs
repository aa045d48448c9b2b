//! Servers as Debian ships them, in one pod, used from this machine by their own clients; under runc too.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::SERVERS_IMAGE,
    cri::{
        self, ContainerConfig, ContainerState, Cri, LinuxContainerResources, LinuxContainerSecurityContext,
        Mount, NamespaceMode, NamespaceOption, Pod, PortMapping,
    },
    ctr::{self, Ctr},
    node::{Node, Product},
};

/// Ours, and the one that it is held against.
const HANDLERS: [&str; 2] = ["caisson", "runc"];
/// How long a server may take to answer, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(600);
/// The servers' ports, and the ports of this machine that lead to them.
const PORTS: [(i32, i32); 3] = [(80, 18081), (5432, 15432), (6379, 16379)];
const MIB: i64 = 1 << 20;

/// Each server's name and what its container runs. What it is to keep is in its volume, at `/data`.
const SERVERS: [(&str, &str); 3] = [("nginx", NGINX), ("redis", REDIS), ("postgres", POSTGRES)];
const NGINX: &str = "
    [ -e /data/sum ] || { echo served by nginx > /data/index.html; head -c 12000000 /dev/urandom > /data/large; \
    sha256sum < /data/large > /data/sum; }
    rm -r /var/www/html; ln -s /data /var/www/html; exec nginx -g 'daemon off;'";
const REDIS: &str = "exec redis-server --bind 0.0.0.0 --protected-mode no --dir /data \
                     --appendonly yes --appendfsync always";
/// The cluster in its volume, with the package's configuration, open to whoever reaches the pod. After a crash it
/// brings its file system to the disk, not each of its files.
const POSTGRES: &str = "
    cd /tmp; mkdir -p /run/postgresql; chown postgres /run/postgresql; echo 'host all all all trust' > /tmp/hba
    exec setpriv --reuid postgres --regid postgres --init-groups /usr/lib/postgresql/*/bin/postgres \
        -D /data/main -c data_directory=/data/main -c hba_file=/tmp/hba -c listen_addresses='*' \
        -c config_file=$(echo /etc/postgresql/*/main/postgresql.conf) -c shared_buffers=16MB -c ssl=off \
        -c recovery_init_sync_method=syncfs";

/// What a command line on this machine prints.
fn said(line: &str) -> Result<String> {
    let output = ctr::run(Command::new("timeout").args(["120", "sh", "-c", line]))?;
    ensure!(output.code == 0, "{line}: {output:?}");
    Ok(output.stdout)
}

/// The same, and it must be this.
fn expect(line: &str, expected: &str) -> Result<()> {
    let said = said(line)?;
    ensure!(said == expected, "{line}: {said:?} instead of {expected:?}");
    Ok(())
}

/// Asks until it answers so.
async fn wait_for(line: &str, expected: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = expect(line, expected) {
        ensure!(Instant::now() < deadline, "{error:#}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

/// A soak: to unpack the image takes an emulated machine minutes.
#[tokio::test]
#[ignore = "a soak"]
async fn debians_servers_are_used_from_the_host() -> Result<()> {
    let node = Node::ready()?;
    let archive = Product::Images.path()?.join("servers.tar");
    let images = Ctr::at(node.socket(), "k8s.io");
    let clock = Instant::now();
    images.run(&["images".as_ref(), "import".as_ref(), archive.as_os_str()])?;
    eprintln!("importing the image: {:.1?}", clock.elapsed());
    let (node, mut cri, before) = cri::ready().await?;
    let cluster = tempfile::tempdir_in("/var/tmp")?;
    copy_cluster(&images, cluster.path())?;
    for handler in HANDLERS {
        let kubelet = tempfile::tempdir_in("/var/tmp")?;
        volumes(kubelet.path(), cluster.path())?;
        let pod = cri.run_pod(pod_config(kubelet.path()), handler).await;
        let pod = pod.with_context(|| node.containerd_log())?;
        let mut servers = Servers { cri: cri.clone(), pod: pod.clone(), kubelet, clock: Instant::now() };
        let used = servers.live_and_die(handler).await;
        used.with_context(|| format!("with {handler}\n{}\n{}", node.containerd_log(), servers.logs()))?;
        cri.remove_pod(&pod).await?;
        drop(servers);
        ensure!(said("curl -sS http://127.0.0.1:18081/").is_err(), "the port is still published");
        before.assert_nothing_added().with_context(|| format!("after {handler}"))?;
    }
    images.run(&["images", "remove", "--sync", SERVERS_IMAGE])?;
    before.assert_nothing_added()
}

fn pod_config(logs: &Path) -> cri::PodSandboxConfig {
    let mut config = cri::pod_config("shim-servers");
    config.log_directory = logs.to_string_lossy().into_owned();
    let mapping =
        |&(container_port, host_port)| PortMapping { container_port, host_port, ..PortMapping::default() };
    config.port_mappings = PORTS.iter().map(mapping).collect();
    let resources =
        LinuxContainerResources { memory_limit_in_bytes: 512 * MIB, ..LinuxContainerResources::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    config
}

/// The cluster that PostgreSQL's package made when it was installed. To make another takes an emulated machine a
/// quarter of an hour.
fn copy_cluster(images: &Ctr, to: &Path) -> Result<()> {
    let mount = tempfile::tempdir()?;
    let at = mount.path();
    images.run(&["images".as_ref(), "mount".as_ref(), SERVERS_IMAGE.as_ref(), at.as_os_str()])?;
    let copied = said(&format!("cp -a {}/var/lib/postgresql/*/main {}", at.display(), to.display()));
    images.run(&["images".as_ref(), "unmount".as_ref(), "--rm".as_ref(), at.as_os_str()])?;
    copied.map(drop)
}

/// The directories that a kubelet makes of `emptyDir` volumes.
fn volume(kubelet: &Path, server: &str) -> PathBuf {
    kubelet.join("volumes/kubernetes.io~empty-dir").join(server)
}

/// Each server's volume: empty, but for the database's.
fn volumes(kubelet: &Path, cluster: &Path) -> Result<()> {
    for (name, _) in SERVERS {
        std::fs::create_dir_all(volume(kubelet, name))?;
    }
    said(&format!("cp -a {}/main {}", cluster.display(), volume(kubelet, "postgres").display())).map(drop)
}

/// A pod with the servers.
struct Servers {
    cri: Cri,
    pod: Pod,
    /// What a kubelet has of it: logs, and `emptyDir` volumes.
    kubelet: tempfile::TempDir,
    /// Since the pod runs.
    clock: Instant,
}

impl Servers {
    /// They serve, are killed, and serve what they had when they come again.
    async fn live_and_die(&mut self, handler: &str) -> Result<()> {
        let first = self.start(0).await?;
        let address = self.cri.address(&self.pod).await?;
        self.ready(&address).await?;
        eprintln!("{handler}: all of them answer after {:.1?}", self.clock.elapsed());
        let sum = said(&format!("curl -sS http://{address}/sum"))?;
        ensure!(sum.len() == 68, "{sum:?}");
        nginx(&address, &sum)?;
        redis(&address)?;
        postgres(&address)?;
        eprintln!("{handler}: used after {:.1?}", self.clock.elapsed());

        for server in &first {
            self.cri.stop_container(server, 0).await?;
            let status = self.cri.container_status(server).await?;
            ensure!(status.exit_code == 137, "{status:?}");
            self.cri.remove_container(server).await?;
        }
        let second = self.start(1).await?;
        self.ready(&address).await?;
        nginx(&address, &sum)?;
        expect(
            &format!("redis-cli -h {address} DBSIZE; redis-cli -p 16379 GET number:9999"),
            "10002\n9999\n",
        )?;
        expect(
            &psql("-h 127.0.0.1 -p 15432", "SELECT count(*), sum(number) FROM numbers"),
            "14000|50009000\n",
        )?;
        for server in &second {
            let status = self.cri.container_status(server).await?;
            ensure!(status.state() == ContainerState::ContainerRunning, "{status:?}");
        }
        eprintln!("{handler}: killed, and back after {:.1?}", self.clock.elapsed());
        Ok(())
    }

    /// Every server answers its own client.
    async fn ready(&self, address: &str) -> Result<()> {
        wait_for(&format!("curl -sS http://{address}/"), "served by nginx\n").await?;
        wait_for(&format!("redis-cli -h {address} PING"), "PONG\n").await?;
        wait_for(&format!("pg_isready -q -h {address} && echo ready"), "ready\n").await
    }

    /// What they said.
    fn logs(&self) -> String {
        let files = std::fs::read_dir(self.kubelet.path()).into_iter().flatten().flatten();
        let text = |file: std::fs::DirEntry| std::fs::read_to_string(file.path()).ok();
        files.filter_map(text).collect()
    }

    /// Starts all of them, for the first or another time.
    async fn start(&mut self, attempt: u32) -> Result<Vec<String>> {
        let mut started = Vec::new();
        for (name, script) in SERVERS {
            let config = self.container(name, script, attempt)?;
            started.push(self.cri.run_container(&self.pod, config).await?);
        }
        Ok(started)
    }

    fn container(&self, name: &str, script: &str, attempt: u32) -> Result<ContainerConfig> {
        let host_path = volume(self.kubelet.path(), name).to_string_lossy().into_owned();
        let mut config = cri::container_config(name, SERVERS_IMAGE, &["sh", "-c", script]);
        config.metadata.get_or_insert_default().attempt = attempt;
        config.log_path = format!("{name}-{attempt}.log");
        config.mounts = vec![Mount { container_path: "/data".into(), host_path, ..Mount::default() }];
        let options = NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() };
        config.linux.get_or_insert_default().security_context =
            Some(LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() });
        Ok(config)
    }
}

fn psql(options: &str, query: &str) -> String {
    format!("psql -X -q -A -t {options} -U postgres -v ON_ERROR_STOP=1 -c \"{query}\"")
}

/// A large file, whole, by the pod's own address and by the published port; and many requests at once.
fn nginx(address: &str, sum: &str) -> Result<()> {
    for place in [&format!("{address}:80"), "127.0.0.1:18081"] {
        expect(&format!("curl -sS http://{place}/large | sha256sum"), sum)?;
    }
    let many = "curl -sS --parallel --parallel-max 10 'http://127.0.0.1:18081/?[1-100]' | sort | uniq -c";
    expect(&format!("{many} | tr -s ' '"), " 100 served by nginx\n")
}

/// A value of some MB, many small ones at once, and many clients at once.
fn redis(address: &str) -> Result<()> {
    expect(&format!("redis-cli -h {address} SET key value; redis-cli -p 16379 GET key"), "OK\nvalue\n")?;
    let large = format!(
        "value=$(mktemp); head -c 4000000 /dev/urandom > $value; redis-cli -h {address} -x SET large < $value; \
         redis-cli -p 16379 --raw GET large | head -c 4000000 | cmp - $value && echo same; rm $value"
    );
    expect(&large, "OK\nsame\n")?;
    let many = format!(
        "seq 1 10000 | sed 's/.*/SET number:& &/' | redis-cli -h {address} --pipe | tail -1; \
         redis-cli -h {address} DBSIZE; redis-cli -h {address} GET number:9999"
    );
    expect(&many, "errors: 0, replies: 10000\n10002\n9999\n")?;
    said(&format!("redis-benchmark -h {address} -c 20 -n 2000 -q -t ping,get"))?;
    Ok(())
}

/// Rows come and go whole, by several clients at once; what was rolled back is not there.
fn postgres(address: &str) -> Result<()> {
    let (direct, published) = (&format!("-h {address}"), "-h 127.0.0.1 -p 15432");
    said(&psql(direct, "CREATE TABLE numbers (number bigint)"))?;
    said(&format!("seq 1 10000 | {}", psql(published, "COPY numbers FROM STDIN")))?;
    let insert = psql(direct, "INSERT INTO numbers SELECT 1 FROM generate_series(1, 1000)");
    said(&format!("for client in 1 2 3 4; do {insert} & done; wait"))?;
    // 4,000 ones on top of the sum of 1 to 10,000.
    expect(&psql(published, "SELECT count(*), sum(number) FROM numbers"), "14000|50009000\n")?;
    let undone = r#"BEGIN; DELETE FROM numbers; ROLLBACK" -c CHECKPOINT -c "SELECT count(*) FROM numbers"#;
    expect(&psql(direct, undone), "14000\n")?;
    let large = psql(published, "COPY (SELECT generate_series(1, 300000)) TO STDOUT");
    expect(&format!("{large} | sha256sum"), &said("seq 1 300000 | sha256sum")?)
}
