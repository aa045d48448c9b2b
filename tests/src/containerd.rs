//! A private containerd: its configuration, start, images and stop.
//!
//! It shares nothing with a containerd that the machine may already run: root, state, sockets, CNI configuration
//! and cgroup are its own.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{cgroups, cri::Cri, ctr::Ctr, leaks, node::Product};

/// The sandbox image of every pod. Our runtime answers for it and never runs it; runc does.
pub const PAUSE_IMAGE: &str = "caisson.test/pause:1";
/// A busybox.
pub const BUSYBOX_IMAGE: &str = "caisson.test/busybox:1";
/// A Debian with redis, nginx and PostgreSQL.
pub const SERVERS_IMAGE: &str = "caisson.test/servers:1";

/// The handler of pods that containerd 2 makes by the sandbox API. containerd 1.7 has none.
pub const SANDBOX_HANDLER: &str = "caisson-sandbox";

/// The namespace in which containerd's CRI plugin looks for images and containers.
const CRI_NAMESPACE: &str = "k8s.io";

/// The cgroup in which CRI's containers are made, as a kubelet makes one for each pod.
pub const POD_CGROUP: &str = "/caisson-e2e";
/// Cgroups that no runtime makes a habit of removing, as they are not its containers': the pods' parent, and what runc
/// makes of containerd's namespace for a container that `ctr` runs. They are there from the start.
const CGROUPS: [&str; 2] = [POD_CGROUP, "/default"];

/// In containerd's directory: after how many lines of its record a shim is to kill itself, or the process that is named.
pub const FAILPOINT: &str = "failpoint";

/// In containerd's directory: an empty file system.
const SCRATCH: &str = "scratch.ext4";
/// Its size in bytes: enough for busybox.
const SCRATCH_SIZE: u64 = 16 << 20;

/// How long containerd may take to answer, on an emulated machine.
const START: Duration = Duration::from_secs(90);
/// How long it may take to end after SIGTERM before it is killed.
const STOP: Duration = Duration::from_secs(20);

/// Our handlers, as `deploy/` has them for containerd 1.7 and for 2.x.
const CONFIG_V2: &str = include_str!("../../deploy/containerd/config-v2.toml");
const CONFIG_V3: &str = include_str!("../../deploy/containerd/config-v3.toml");

/// The pods' bridge.
pub const BRIDGE: &str = "caisson-e2e0";

/// The pods' network: a bridge with both families, and published ports.
const CNI_CONFIG: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "caisson-e2e",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "caisson-e2e0",
      "isGateway": true,
      "ipMasq": true,
      "hairpinMode": true,
      "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.244.77.0/24" }],
                                                   [{ "subnet": "fd77::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] }
    },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
"#;

/// A running containerd. Dropping it kills it; [`Containerd::stop`] is the orderly way.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    dir: PathBuf,
}

impl Containerd {
    /// Starts containerd with everything of its own below `dir`, and waits until it answers.
    ///
    /// `path` is put in front of `PATH`, so that containerd finds a shim there.
    ///
    /// # Errors
    /// When it is not installed, ends at once, or does not answer in time.
    pub fn start(dir: &Path, path: Option<&Path>) -> Result<Self> {
        for part in ["root", "state", "cni", "ipam"] {
            fs::create_dir_all(dir.join(part)).context("making containerd's directories")?;
        }
        for cgroup in CGROUPS {
            cgroups::Group::make(cgroup)?;
        }
        fs::write(dir.join("cni/10-caisson-e2e.conflist"), CNI_CONFIG)?;
        write_config(dir, version()?)?;
        scratch(&dir.join(SCRATCH))?;
        let mut containerd = Self { child: spawn(dir, path)?, dir: dir.to_owned() };
        containerd.wait_until_up()?;
        Ok(containerd)
    }

    /// Kills containerd, so that it can do nothing for what it runs, and starts it again.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart(&mut self, path: Option<&Path>) -> Result<()> {
        self.child.kill().context("killing containerd")?;
        self.child.wait()?;
        self.child = spawn(&self.dir, path)?;
        self.wait_until_up()
    }

    /// What it and its shims have logged, for a test's message.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default()
    }

    /// Has the next shims kill this containerd after so many steps of their pod's record.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn die_after(&self, steps: usize) -> Result<()> {
        Ok(fs::write(self.dir.join(FAILPOINT), format!("{steps} {}", self.child.id()))?)
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When that can't be known.
    pub fn has_died(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Loads an OCI archive for `ctr` and for CRI.
    ///
    /// # Errors
    /// When containerd refuses it.
    pub fn import(&self, archive: &Path) -> Result<()> {
        for namespace in ["default", CRI_NAMESPACE] {
            let ctr = Ctr::at(self.socket(), namespace);
            ctr.run(&["images".as_ref(), "import".as_ref(), archive.as_os_str()])?;
        }
        Ok(())
    }

    /// Removes all pods and containers, running or not, as far as their runtimes can.
    ///
    /// # Errors
    /// When containerd does not answer. A container that can't be removed is no error: it is seen by what it leaves.
    pub fn remove_containers(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut cri = Cri::connect(self.socket()).await?;
            for pod in cri.pods().await? {
                let _ = cri.remove_pod(&pod).await;
            }
            anyhow::Ok(())
        })?;
        let ctr = Ctr::at(self.socket(), "default");
        for container in ctr.run(&["containers", "list", "--quiet"])?.split_whitespace() {
            ctr.try_run(&["tasks", "delete", "--force", container])?;
            ctr.try_run(&["containers", "delete", container])?;
        }
        Ok(())
    }

    /// Ends containerd in order, and undoes what it and its plugins leave on a machine by design: the pods' bridge
    /// and cgroup, and the mounts of its own state directory.
    ///
    /// # Errors
    /// When something can't be undone.
    pub fn stop(self) -> Result<()> {
        self.end()?;
        // Absent unless a pod ran.
        Command::new("ip").args(["link", "delete", BRIDGE]).stderr(Stdio::null()).status()?;
        for cgroup in CGROUPS {
            cgroups::directories(cgroup)?.iter().try_for_each(|directory| leaks::remove_cgroup(directory))?;
        }
        Ok(())
    }

    /// Ends containerd in order, one of several that share the pods' bridge and cgroup.
    ///
    /// # Errors
    /// When it or the mounts of its state directory stay.
    pub fn end(mut self) -> Result<()> {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().context("stopping containerd")?;
        let deadline = Instant::now() + STOP;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
            }
            thread::sleep(Duration::from_millis(50));
        }
        leaks::unmount_below(&self.dir)
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let ctr = Ctr::at(self.socket(), "default");
        let deadline = Instant::now() + START;
        loop {
            if self.socket().exists() && ctr.try_run(&["version"])?.code == 0 {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                let log = self.log();
                bail!("containerd ended with {status}:\n{log}");
            }
            if Instant::now() > deadline {
                bail!("containerd did not answer within {START:?}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Already gone after `stop`; and there is no one left to tell of an error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the empty file system that the snapshotter for images of file systems begins with.
fn scratch(path: &Path) -> Result<()> {
    File::create(path)?.set_len(SCRATCH_SIZE)?;
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-O", "^has_journal"]).arg(path);
    let made = crate::ctr::run(&mut command)?;
    ensure!(made.code == 0, "mkfs.ext4: {}", made.stderr);
    Ok(())
}

/// Starts containerd's process, which adds to its log.
fn spawn(dir: &Path, path: Option<&Path>) -> Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join("containerd.log"))?;
    let mut command = Command::new("containerd");
    command.arg("--config").arg(dir.join("config.toml"));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A group of its own: a Ctrl-C at the terminal ends the runner, which then ends containerd in order.
    command.process_group(0);
    if let Some(path) = path {
        let old = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{old}", path.display()));
    }
    // Shims inherit containerd's environment.
    command.env("CAISSON_CONFIG", runtime_config(dir, path)?);
    // With a number in it, the next shims die on purpose.
    command.env("CAISSON_FAILPOINT", dir.join(FAILPOINT));
    command.spawn().context("starting containerd")
}

/// Describes the products to our runtime, and returns the directory of its configuration. Machines are small: there are
/// many on one that is emulated.
fn runtime_config(dir: &Path, products: Option<&Path>) -> Result<PathBuf> {
    let config = dir.join("caisson");
    fs::create_dir_all(&config)?;
    if let Some(products) = products {
        let (kernel, initramfs) = (std::env::var("CAISSON_KERNEL"), std::env::var("CAISSON_INITRAMFS"));
        let text = format!(
            "[machine]\nvmm = {:?}\nkernel = {:?}\ninitramfs = {:?}\n\
             [sizing]\ndefault_memory_mib = 128\n\
             [template]\nmode = \"{}\"\ndirectory = {:?}\n",
            products.join("caisson-vmm"),
            kernel.unwrap_or_default(),
            initramfs.unwrap_or_default(),
            if from_templates()? { "prepared" } else { "off" },
            dir.join("templates"),
        );
        fs::write(config.join("config.toml"), text)?;
    }
    Ok(config)
}

/// Whether pods that ask for nothing start from a template, as they do where Caisson is installed, or are booted, as
/// everywhere else: both are tested.
fn from_templates() -> Result<bool> {
    Ok(version()? < (2, 0))
}

/// Makes the template of pods that ask for nothing, where they start from one.
///
/// # Errors
/// When it is not made.
pub fn prepare_template(dir: &Path) -> Result<()> {
    if !from_templates()? {
        return Ok(());
    }
    let mut command = Command::new(Product::Shim.path()?);
    let made = crate::ctr::run(command.arg("template").env("CAISSON_CONFIG", dir.join("caisson")))?;
    ensure!(made.code == 0, "making a template: {}", made.stderr);
    Ok(())
}

/// containerd's version: major and minor.
///
/// # Errors
/// When it is not installed.
pub fn version() -> Result<(u32, u32)> {
    let output =
        Command::new("containerd").arg("--version").output().context("containerd is not installed")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).with_context(|| format!("no version in {text:?}"))
}

/// The version in what `containerd --version` prints: `containerd github.com/… 1.7.24~ds1 …`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let word = text.split_whitespace().nth(2)?;
    let mut numbers = word.trim_start_matches('v').split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Writes containerd's configuration for this version, with our handlers as `deploy/` has them.
///
/// containerd 2 imports the file that we deliver. One before replaces all of a plugin's configuration by what it
/// imports, so there our tables stand in the main file.
fn write_config(dir: &Path, version: (u32, u32)) -> Result<()> {
    let (main, drop_in) = config(dir, version);
    fs::write(dir.join("config.toml"), main)?;
    if let Some(drop_in) = drop_in {
        fs::create_dir_all(dir.join("conf.d"))?;
        fs::write(dir.join("conf.d/caisson.toml"), drop_in)?;
    }
    Ok(())
}

/// The main file, and the one that it imports: `version = 2` before containerd 2, `version = 3` from there on.
fn config(dir: &Path, (major, minor): (u32, u32)) -> (String, Option<&'static str>) {
    let dir = dir.display();
    let common = format!(
        "root = '{dir}/root'\nstate = '{dir}/state'\n[grpc]\naddress = '{dir}/containerd.sock'\n\
         [ttrpc]\naddress = '{dir}/containerd.sock.ttrpc'\n\
         [plugins.'io.containerd.snapshotter.v1.blockfile']\n\
         scratch_file = '{dir}/{SCRATCH}'\nfs_type = 'ext4'\nmount_options = []\n"
    );
    if major < 2 {
        let tables = CONFIG_V2.replacen("version = 2\n", "", 1);
        let main = format!(
            "version = 2\n{common}\
             [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = '{PAUSE_IMAGE}'\n\
             disable_hugetlb_controller = false\n\
             [plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/usr/lib/cni'\nconf_dir = '{dir}/cni'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd]\ndefault_runtime_name = 'runc'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
             runtime_type = 'io.containerd.runc.v2'\n{tables}"
        );
        return (main, None);
    }
    let bin_dir =
        if (major, minor) < (2, 1) { "bin_dir = '/usr/lib/cni'" } else { "bin_dirs = ['/usr/lib/cni']" };
    let main = format!(
        "version = 3\nimports = ['{dir}/conf.d/*.toml']\n{common}\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{PAUSE_IMAGE}'\n\
         [plugins.'io.containerd.cri.v1.runtime']\ndisable_hugetlb_controller = false\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\n{bin_dir}\nconf_dir = '{dir}/cni'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'runc'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n\
         runtime_type = 'io.containerd.runc.v2'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{SANDBOX_HANDLER}]\n\
         runtime_type = 'io.containerd.caisson.v2'\nsandboxer = 'shim'\n"
    );
    (main, Some(CONFIG_V3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version() {
        assert_eq!(parse_version("containerd github.com/containerd/containerd 1.7.24~ds1 abc"), Some((1, 7)));
        assert_eq!(parse_version("containerd github.com/containerd/containerd/v2 v2.1.9 abc"), Some((2, 1)));
        assert_eq!(parse_version("containerd"), None);
    }

    #[test]
    fn each_version_gets_its_own_format() {
        let (old, import) = config(Path::new("/d"), (1, 7));
        assert!(old.starts_with("version = 2\nroot = '/d/root'") && import.is_none());
        assert!(old.contains("runtimes.caisson]") && old.matches("version =").count() == 1);
        let (new, import) = config(Path::new("/d"), (2, 0));
        assert!(new.starts_with("version = 3\n") && new.contains("bin_dir ="));
        assert!(import.is_some_and(|import| import.contains("runtimes.caisson]")));
        assert!(config(Path::new("/d"), (2, 1)).0.contains("bin_dirs ="));
    }
}
