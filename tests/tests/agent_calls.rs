//! The verbs for containers over a unix socket, without a VM: what each does, and its status codes.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    agent::Bed,
    containers::{process, spec},
};
use caisson_protocol::{
    client::with_deadline,
    v1::{self, container_info::State, event::Kind},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Response, Status};

/// The code that a call was refused with.
fn code<T>(result: Result<Response<T>, Status>) -> Option<Code> {
    result.err().map(|status| status.code())
}

fn exec(id: &str, script: &str) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: "c".into(),
        exec_id: id.into(),
        process: process(script, false).into_bytes(),
        streams: None,
    }
}

#[tokio::test]
async fn events_go_on_where_a_client_left_off() -> Result<()> {
    let bed = Bed::start().await?;
    bed.pod.run("c", &process("exec sleep 1000", false), "{}").await?;
    for number in 0..6 {
        let request = exec(&format!("x{number}"), &format!("exit {number}"));
        bed.pod.client.containers().exec(request).await?;
    }
    let (mut seen, mut next) = (BTreeSet::new(), 1);
    // Two events for each client, which then is gone.
    while seen.len() < 6 {
        let client = bed.agent.connect().await?;
        let request = v1::EventsRequest { from_sequence: next, epoch: client.version().epoch.clone() };
        let mut events = client.agent().events(request).await?.into_inner();
        for _ in 0..2 {
            let event = events.message().await?.context("an event")?;
            ensure!(event.sequence == next, "{} comes after {}", event.sequence, next - 1);
            next += 1;
            let Some(Kind::Exit(exit)) = event.kind else { anyhow::bail!("{event:?}") };
            let code = exit.status.context("a status")?.code;
            ensure!(exit.exec_id == format!("x{code}") && seen.insert(code), "{exit:?}");
        }
    }
    bed.pod.remove("c").await
}

#[tokio::test]
async fn a_running_container_is_paused_changed_and_looked_at() -> Result<()> {
    let bed = Bed::start().await?;
    let mut containers = bed.pod.client.containers();
    let mut specification = spec(&process("exec sleep 1000", false), r#"{"pids":{"limit":20}}"#)?;
    specification["annotations"] = serde_json::json!({"key": "value"});
    bed.pod.launch("c", &specification).await?;
    containers.exec(exec("x", "exec sleep 1000")).await?;

    let listed = containers.list_processes(v1::ListProcessesRequest { container_id: "c".into() }).await?;
    let processes = listed.into_inner().processes;
    let named: Vec<_> = processes.iter().map(|process| process.exec_id.as_deref()).collect();
    ensure!(named == [Some(""), Some("x")], "{processes:?}");

    let resources = br#"{"pids":{"limit":30}}"#.to_vec();
    containers.update_container(v1::UpdateContainerRequest { container_id: "c".into(), resources }).await?;
    let stats = containers.stats(v1::StatsRequest { container_id: "c".into() }).await?.into_inner();
    ensure!(stats.pids.context("pids")?.limit == 30);
    for bad in [&br#"{"pids":{"limit":"many"}}"#[..], br#"{"devices":[{"allow":true}]}"#, b"{"] {
        let request = v1::UpdateContainerRequest { container_id: "c".into(), resources: bad.to_vec() };
        ensure!(code(containers.update_container(request).await) == Some(Code::InvalidArgument));
    }

    let pause = || v1::PauseContainerRequest { container_id: "c".into() };
    let resume = || v1::ResumeContainerRequest { container_id: "c".into() };
    ensure!(code(containers.resume_container(resume()).await) == Some(Code::FailedPrecondition));
    containers.pause_container(pause()).await?;
    ensure!(code(containers.pause_container(pause()).await) == Some(Code::FailedPrecondition));
    ensure!(code(containers.exec(exec("y", "true")).await) == Some(Code::FailedPrecondition));
    let listed = containers.list_containers(v1::ListContainersRequest {}).await?.into_inner().containers;
    ensure!(listed.len() == 1 && listed[0].state() == State::Paused, "{listed:?}");
    ensure!(listed[0].annotations["key"] == "value" && listed[0].exec_ids == ["x"], "{listed:?}");
    containers.resume_container(resume()).await?;
    let from = v1::EventsRequest { from_sequence: 1, epoch: Vec::new() };
    let mut events = bed.pod.client.agent().events(from).await?.into_inner();
    let mut next = async || anyhow::Ok(events.message().await?.context("an event")?.kind);
    ensure!(matches!(next().await?, Some(Kind::Paused(paused)) if paused.container_id == "c"));
    ensure!(matches!(next().await?, Some(Kind::Resumed(resumed)) if resumed.container_id == "c"));
    bed.pod.remove("c").await
}

#[tokio::test]
async fn standard_input_is_closed_after_what_was_written() -> Result<()> {
    let bed = Bed::start().await?;
    let streams = bed.pod.run("c", &process("exec cat", false), "{}").await?;
    let mut stdin = bed.pod.client.stream(streams.stdin).await?;
    let mut stdout = bed.pod.client.stream(streams.stdout).await?;
    stdin.write_all(b"all of it").await?;
    let mut output = [0; 9];
    stdout.read_exact(&mut output).await?;
    ensure!(&output == b"all of it");
    let request = v1::CloseStdinRequest { container_id: "c".into(), exec_id: String::new() };
    for _ in 0..2 {
        bed.pod.client.containers().close_stdin(request.clone()).await?;
    }
    ensure!(stdout.read(&mut output).await? == 0, "there is more");
    ensure!(bed.pod.text(streams.stderr).await?.is_empty());
    ensure!(bed.pod.wait("c", "").await?.code == 0);
    bed.pod.remove("c").await
}

#[tokio::test]
async fn what_can_not_be_done_has_its_code() -> Result<()> {
    let bed = Bed::start().await?;
    let mut containers = bed.pod.client.containers();
    let signal = |container_id: &str, exec_id: &str, signal| v1::SignalRequest {
        container_id: container_id.into(),
        exec_id: exec_id.into(),
        signal,
        all: false,
    };
    let wait =
        |container_id: &str| v1::WaitRequest { container_id: container_id.into(), ..Default::default() };
    let remove =
        |id: &str, force| v1::RemoveContainerRequest { container_id: id.into(), force, released: Vec::new() };
    let resize = |id: &str, width| v1::ResizeTerminalRequest {
        container_id: id.into(),
        width,
        height: 1,
        ..Default::default()
    };
    let delete = |exec_id: &str| v1::DeleteExecRequest { container_id: "c".into(), exec_id: exec_id.into() };

    ensure!(code(containers.exec(exec("x", "true")).await) == Some(Code::NotFound));
    ensure!(code(containers.signal(signal("c", "", 15)).await) == Some(Code::NotFound));
    ensure!(code(containers.wait(wait("c")).await) == Some(Code::NotFound));
    ensure!(code(containers.remove_container(remove("c", true)).await) == Some(Code::NotFound));
    ensure!(code(containers.resize_terminal(resize("c", 1)).await) == Some(Code::NotFound));

    bed.pod.run("c", &process("exec sleep 1000", false), "{}").await?;
    containers.exec(exec("x", "exec sleep 1000")).await?;
    ensure!(code(containers.exec(exec("x", "true")).await) == Some(Code::AlreadyExists));
    ensure!(code(containers.exec(exec("../x", "true")).await) == Some(Code::InvalidArgument));
    ensure!(code(containers.exec(exec("", "true")).await) == Some(Code::InvalidArgument));
    for number in [0, 65, u32::MAX] {
        ensure!(code(containers.signal(signal("c", "", number)).await) == Some(Code::InvalidArgument));
    }
    let all_of_an_exec = v1::SignalRequest { all: true, ..signal("c", "x", 15) };
    ensure!(code(containers.signal(all_of_an_exec).await) == Some(Code::InvalidArgument));
    ensure!(code(containers.signal(signal("c", "z", 15)).await) == Some(Code::NotFound));
    ensure!(code(containers.remove_container(remove("c", false)).await) == Some(Code::FailedPrecondition));
    ensure!(code(containers.resize_terminal(resize("c", 1)).await) == Some(Code::FailedPrecondition));
    ensure!(code(containers.resize_terminal(resize("c", 65_536)).await) == Some(Code::InvalidArgument));
    ensure!(code(containers.delete_exec(delete("x")).await) == Some(Code::FailedPrecondition));
    ensure!(code(containers.delete_exec(delete("z")).await) == Some(Code::NotFound));
    containers.signal(signal("c", "x", 9)).await?;
    let ended = v1::WaitRequest { container_id: "c".into(), exec_id: "x".into() };
    let status = containers.wait(ended).await?.into_inner().status.context("a status")?;
    ensure!((status.code, status.signal) == (137, 9), "{status:?}");
    containers.delete_exec(delete("x")).await?;

    let mut wrong = spec(&process("true", false), "{}")?;
    wrong["process"]["user"]["uid"] = (-1).into();
    let refused = bed.pod.launch("d", &wrong).await.err().context("it was made")?;
    let status = refused.downcast_ref::<Status>().context("a status")?;
    ensure!(
        status.code() == Code::InvalidArgument && status.message().starts_with("process.user.uid: "),
        "{status}"
    );
    bed.pod.remove("c").await
}

#[tokio::test]
async fn a_deadline_ends_the_call_alone() -> Result<()> {
    let bed = Bed::start().await?;
    bed.pod.run("c", &process("exec sleep 1000", false), "{}").await?;
    let wait = v1::WaitRequest { container_id: "c".into(), exec_id: "x".into() };
    let mut containers = bed.pod.client.containers();
    containers.exec(exec("x", "exec sleep 1000")).await?;
    let late = code(containers.wait(with_deadline(wait.clone(), Duration::from_millis(200))).await);
    // Whichever end's clock strikes first.
    ensure!(matches!(late, Some(Code::DeadlineExceeded | Code::Cancelled)), "{late:?}");
    let waits = tokio::spawn(async move { containers.wait(wait).await });
    bed.pod
        .client
        .containers()
        .signal(v1::SignalRequest {
            container_id: "c".into(),
            exec_id: "x".into(),
            signal: 9,
            ..Default::default()
        })
        .await?;
    let status = waits.await??.into_inner().status.context("a status")?;
    ensure!(status.code == 137, "{status:?}");
    bed.pod.remove("c").await
}

#[tokio::test]
async fn the_policy_turns_verbs_off() -> Result<()> {
    let bed = Bed::start().await?;
    bed.pod.run("c", &process("exec sleep 1000", false), "{}").await?;
    let policy = Some(v1::Policy { deny_exec: true, deny_port_forward: true, ..Default::default() });
    bed.pod.client.agent().restrict_policy(v1::RestrictPolicyRequest { policy }).await?;
    let refused = code(bed.pod.client.containers().exec(exec("x", "true")).await);
    ensure!(refused == Some(Code::PermissionDenied), "{refused:?}");
    let request = v1::PortForwardRequest { port: 80, address: String::new() };
    let refused = code(bed.pod.client.transfers().port_forward(request).await);
    ensure!(refused == Some(Code::PermissionDenied), "{refused:?}");
    bed.pod.remove("c").await
}
