//! Containers through the agent's library on a plain Linux machine, and the same specifications under runc.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper of tests, which fail by panics")]

use std::{
    fs::{self, File},
    io::Read,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio as Stream},
    time::Duration,
};

use caisson_agent::{
    container::{Config, CreateRequest, Error, Event, ExecRequest, Runtime, Stdio},
    oci::Document,
    reaper::Reaper,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::vmm::{Vmm, Workshop};

/// A runtime with a root file system made of busybox, and everything gone with it.
pub struct Bed {
    /// Its files: the root file system in `root`, and what a test adds.
    pub dir: tempfile::TempDir,
    /// The control group of its containers.
    pub cgroup: PathBuf,
    /// The runtime.
    pub runtime: Runtime,
    /// What happens to its containers by itself.
    pub events: mpsc::UnboundedReceiver<Event>,
}

impl Default for Bed {
    fn default() -> Self {
        Self::new()
    }
}

impl Bed {
    /// # Panics
    /// When something of the machine is missing.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for name in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let busybox =
            ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "sleep", "ls", "id", "head", "tail", "mount", "umount", "mkdir", "stat", "dd",
            "true", "kill", "hostname", "readlink", "touch", "grep", "pwd", "stty", "date", "env", "sort",
            "cut", "wc", "echo", "rm",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        let id = dir.path().file_name().unwrap().to_str().unwrap().replace('.', "");
        let cgroup = Path::new("/sys/fs/cgroup").join(format!("oci-{id}"));
        let bin = std::env::var_os("CAISSON_BIN").expect("CAISSON_BIN is set");
        let helper = Path::new(&bin).join("caisson-agent");
        let (sender, events) = mpsc::unbounded_channel();
        let config = Config { cgroup: cgroup.clone(), helper };
        let runtime = Runtime::new(config, Reaper::start().unwrap(), sender).unwrap();
        Self { dir, cgroup, runtime, events }
    }

    /// The root file system.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// The specification of a container that runs a script, much as Docker would have it.
    #[must_use]
    pub fn spec(&self, script: &str) -> Value {
        let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"]);
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": self.root()},
            "hostname": "box",
            "process": {
                "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
                "noNewPrivileges": true,
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                               {"type": "network"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/acpi", "/proc/not-there"],
                "readonlyPaths": ["/proc/sys", "/proc/bus"],
            },
        })
    }

    /// Creates, starts, and awaits a container; its exit code and output (of both streams).
    ///
    /// # Errors
    /// The runtime's.
    ///
    /// # Panics
    /// When it can not be removed.
    pub async fn run(&self, spec: &Value) -> Result<(i32, String), Error> {
        let (reader, stdio) = output();
        self.create("c", spec, stdio).await?;
        let started = self.runtime.start("c").await;
        if started.is_err() {
            self.runtime.remove("c", true).await.unwrap();
        }
        started?;
        let text = tokio::task::spawn_blocking(move || text(reader)).await.unwrap();
        let exit = self.runtime.wait("c", "").await?;
        self.runtime.remove("c", false).await?;
        Ok((exit.status.code(), text))
    }

    /// The output of a container that exits with 0.
    ///
    /// # Panics
    /// When it does not.
    pub async fn output(&self, spec: &Value) -> String {
        let (code, text) = self.run(spec).await.unwrap();
        assert_eq!(code, 0, "{text}");
        text
    }

    /// Creates a container; its terminal, if it has one.
    ///
    /// # Errors
    /// The runtime's.
    ///
    /// # Panics
    /// When the specification is not one.
    pub async fn create(&self, id: &str, spec: &Value, stdio: Stdio) -> Result<Option<OwnedFd>, Error> {
        let spec = Document::spec(spec.to_string().into_bytes()).unwrap();
        let request = CreateRequest { id: id.to_owned(), spec, rootfs: None, stdio };
        Ok(self.runtime.create(request).await?.terminal)
    }

    /// Runs a script in the container `c`, as a process with `extra` members; its exit code and output.
    ///
    /// # Errors
    /// The runtime's.
    ///
    /// # Panics
    /// When `extra` is not an object of the specification's.
    pub async fn exec(&self, script: &str, extra: Value) -> Result<(i32, String), Error> {
        let mut process = self.spec(script)["process"].clone();
        process.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (reader, stdio) = output();
        let process = Document::process(process.to_string().into_bytes()).unwrap();
        let request = ExecRequest { container: "c".into(), id: "e".into(), process, stdio };
        self.runtime.exec(request).await?;
        let text = tokio::task::spawn_blocking(move || text(reader)).await.unwrap();
        let exit = self.runtime.wait("c", "e").await?;
        self.runtime.delete_exec("c", "e")?;
        Ok((exit.status.code(), text))
    }

    /// Creates and starts the container `c`, without streams.
    ///
    /// # Panics
    /// When that fails.
    pub async fn start(&self, spec: &Value) {
        self.create("c", spec, Stdio::default()).await.unwrap();
        self.runtime.start("c").await.unwrap();
    }

    /// Runs the same specification under runc; its exit code and output.
    ///
    /// # Panics
    /// When runc can not be started.
    #[must_use]
    pub fn run_under_runc(&self, spec: &Value) -> (i32, String) {
        let bundle = self.dir.path().join("bundle");
        fs::create_dir_all(&bundle).unwrap();
        let mut spec = spec.clone();
        let group = self.cgroup.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        spec["linux"]["cgroupsPath"] = format!("/{group}/runc").into();
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new("runc");
        command
            .arg("--root")
            .arg(self.dir.path().join("runc"))
            .args(["run", "--bundle"])
            .arg(&bundle)
            .arg(group);
        command.stdin(Stream::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
        let mut child = command.spawn().expect("runc is there");
        // Its copies of the pipe would keep it open.
        drop(command);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        (child.wait().unwrap().code().unwrap_or(-1), text.trim().to_owned())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
            std::thread::sleep(Duration::from_millis(200));
            for entry in fs::read_dir(&self.cgroup).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(entry.path());
            }
            let _ = fs::remove_dir(&self.cgroup);
        } else {
            // Fails when anything is left in it.
            fs::remove_dir(&self.cgroup).unwrap();
        }
    }
}

fn output() -> (File, Stdio) {
    let (reader, writer) = std::io::pipe().unwrap();
    let stdout = OwnedFd::from(writer.try_clone().unwrap());
    let stdio = Stdio { stdin: None, stdout: Some(stdout), stderr: Some(writer.into()) };
    (OwnedFd::from(reader).into(), stdio)
}

fn text(mut reader: File) -> String {
    let mut text = Vec::new();
    reader.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).trim().to_owned()
}

/// Runs all tests of the calling program but `skip` on the guest's kernel, in a machine of our own.
///
/// # Panics
/// When one fails there.
pub fn holds_in_a_machine(skip: &str) {
    let agent = Path::new(&std::env::var_os("CAISSON_BIN").unwrap()).join("caisson-agent");
    let init = format!(
        "mkdir -p /sys/fs/cgroup /tmp /dev/pts /dev/shm /etc /root
        mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t tmpfs tmp /tmp; mount -t devpts devpts /dev/pts
        mount --make-rshared /
        mkdir /sys/fs/cgroup/init; echo $$ > /sys/fs/cgroup/init/cgroup.procs
        for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
            echo +$controller > /sys/fs/cgroup/cgroup.subtree_control
        done
        ip link set lo up
        CAISSON_BIN=/host HOME=/root /host/program --test-threads=1 --skip {skip} && echo all of it holds
        sleep 1000"
    );
    let program = std::env::current_exe().unwrap();
    let workshop =
        Workshop::with_programs(&init, &[(&program, "program"), (&agent, "caisson-agent")]).unwrap();
    let disk = workshop.disk("disk", "", 16 << 20).unwrap();
    let disk = format!("[[devices]]\nblock.files = [{disk:?}]\nblock.options.id = 'disk'\n");
    let mut config = workshop.config(&disk).unwrap();
    config.memory.size_mib = 768;
    let mut vmm = Vmm::boot(config).unwrap();
    let said = vmm.expect("test result: ").unwrap();
    assert!(said.contains(" 0 failed"), "{}", vmm.transcript.join("\n"));
    vmm.expect("all of it holds").unwrap();
}
