//! A hostile container and vsock: it reaches neither the agent's ports nor the host's.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containers::{self, Pod, Root},
    guest,
    node::Product,
    pod_vm::{self, PodVm},
    vmm::{Vmm, Workshop},
};
use caisson_protocol::v1;

/// Everybody who could listen: the agent by the guest's own address, the host, and the loopback.
const ADDRESSES: &str = "3:1024 3:1025 2:1024 2:1025 1:1024";

/// The ways to a socket that the guest's kernel has.
const WAYS: [&str; 4] = ["socket", "i386", "socketcall", "io_uring"];

fn intruder() -> PathBuf {
    std::env::var_os("NEXTEST_BIN_EXE_vsock-intruder")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_vsock-intruder")), PathBuf::from)
}

/// A process with every capability, and without no_new_privs.
fn privileged(script: &str) -> Result<String> {
    const ALL: [&str; 6] = [
        "CAP_SYS_ADMIN",
        "CAP_NET_ADMIN",
        "CAP_NET_RAW",
        "CAP_SYS_PTRACE",
        "CAP_SYS_RAWIO",
        "CAP_SYS_RESOURCE",
    ];
    let mut process: serde_json::Value = serde_json::from_str(&containers::process(script, false))?;
    process["capabilities"] = serde_json::json!({"bounding": ALL, "effective": ALL, "permitted": ALL});
    Ok(process.to_string())
}

#[tokio::test]
async fn a_container_gets_no_vsock_socket() -> Result<()> {
    let mut vm = PodVm::boot("").await?;
    vm.pod().await?;
    let shared = tempfile::tempdir()?;
    containers::busybox_root(shared.path())?;
    guest::copy_program(shared.path(), &intruder(), "bin/intruder")?;
    vm.plug_share(shared.path(), "root").await?;
    let pod = Pod { client: vm.client.clone(), root: Root::Directory(vm.mount_share("root").await?) };

    let script = format!("exec intruder {ADDRESSES}");
    for (id, process) in
        [("plain", containers::process(&script, false)), ("privileged", privileged(&script)?)]
    {
        let streams = pod.run(id, &process, "{}").await?;
        let (out, err) = tokio::try_join!(pod.text(streams.stdout), pod.text(streams.stderr))?;
        refused(&out).with_context(|| format!("{id}: {out}{err}"))?;
        pod.remove(id).await?;
    }

    pod.run("idle", &containers::process("exec sleep 1000", false), "{}").await?;
    let request = v1::ExecRequest {
        container_id: "idle".into(),
        exec_id: "x".into(),
        process: privileged(&script)?.into_bytes(),
        streams: Some(v1::StreamSelection { stdout: true, ..Default::default() }),
    };
    let streams = pod.client.containers().exec(request).await?.into_inner().streams.context("streams")?;
    let out = pod.text(streams.stdout).await?;
    refused(&out).with_context(|| format!("exec: {out}"))?;
    pod.remove("idle").await?;

    // Without the filter, the kernel's own parameter stands.
    let parameter = pod.output("parameter", "cat /proc/sys/kernel/io_uring_disabled").await?;
    ensure!(parameter.trim() == "2", "io_uring_disabled is {parameter}");
    Ok(())
}

/// Every way was tried and none made a socket.
fn refused(out: &str) -> Result<()> {
    ensure!(out.ends_with("done\n"), "the intruder did not come to its end");
    for way in WAYS {
        ensure!(out.contains(&format!("{way}: refused")), "{way} is not refused");
    }
    ensure!(!out.contains("made") && !out.contains("connected"), "a socket was made");
    Ok(())
}

/// The second wall, and the proof that the intruder knows how: outside of a container every way makes a socket, and
/// still nobody answers.
#[test]
fn sockets_of_the_guest_reach_nobody() -> Result<()> {
    let init = format!(
        "mkdir -p /sys/fs/cgroup /run
        mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t tmpfs run /run
        /host/caisson-agent --listen vsock &
        until [ -d /run/caisson ]; do sleep 0.1; done; sleep 1
        /host/intruder {ADDRESSES}"
    );
    let programs = [(&*intruder(), "intruder"), (&*Product::Agent.path()?, "caisson-agent")];
    let workshop = Workshop::with_programs(&init, &programs)?;
    let mut config = workshop.config("")?;
    config.devices.insert(0, pod_vm::vsock(&workshop.path("vsock"), 3));
    let mut vmm = Vmm::boot(config)?;
    vmm.expect("serving")?;
    vmm.expect("done")?;
    let transcript = vmm.transcript.join("\n");
    for way in WAYS {
        ensure!(transcript.contains(&format!("{way}: made")), "{way} makes no socket:\n{transcript}");
    }
    ensure!(!transcript.contains("connected"), "somebody answers:\n{transcript}");
    Ok(())
}
