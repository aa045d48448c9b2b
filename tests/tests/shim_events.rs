//! What containerd's other clients see of our containers: its events, the codes of what it refuses, its log. The same is
//! asked of runc's, in the same run.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::BUSYBOX_IMAGE,
    ctr::Ctr,
    events::{Event, Events},
    leaks::Holdings,
    node::Node,
    record,
    tasks::{self, Answer, Tasks},
};
use serde_json::{Value, json};
use tonic::Code;

const OURS: &str = "io.containerd.caisson.v2";
const RUNC: &str = "io.containerd.runc.v2";

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// One event in words that are the same for every container that lives the same life.
fn told(event: &Event, id: &str) -> Result<String> {
    let mut fields = BTreeMap::new();
    for (key, value) in event.body.as_object().context("an event of fields")? {
        let said = match (key.as_str(), value) {
            // Whatever it is, it is known.
            ("pid", Value::Number(pid)) => if pid.as_u64() > Some(1) { "known" } else { "none" }.to_owned(),
            ("exited_at", Value::Object(_)) => "known".to_owned(),
            // The one is mounted by us, the other by runc, from the same snapshot; nor are fifos' names of interest.
            ("rootfs" | "io", _) => continue,
            ("bundle", Value::String(path)) => path.rsplit('/').next().unwrap_or_default().replace(id, "ID"),
            (_, value) => value.to_string().replace(id, "ID"),
        };
        fields.insert(key, said);
    }
    Ok(format!("{} {fields:?}", event.topic))
}

/// A container's life from its making to its end, and what is told of it.
async fn life(
    ctr: &Ctr,
    tasks: &mut Tasks,
    events: &mut Events,
    (runtime, id): (&str, &str),
) -> Result<Vec<String>> {
    let mut story = Vec::new();
    let mut tell = |topic: &str| {
        for event in events.until(|event| event.topic == topic)? {
            if event.topic.starts_with("/tasks/") {
                story.push(told(&event, id)?);
            }
        }
        anyhow::Ok(())
    };
    let limit = (48 << 20).to_string();
    made(ctr, tasks, (runtime, id), &["--memory-limit", &limit]).await?;
    tell("/tasks/create")?;
    tasks.start(id, "").await?;
    tell("/tasks/start")?;
    tasks.exec(id, "one", &["sh", "-c", "exit 4"]).await?;
    tell("/tasks/exec-added")?;
    tasks.start(id, "one").await?;
    tell("/tasks/exit")?;
    tasks.delete_exec(id, "one").await?;
    tasks.pause(id).await?;
    tell("/tasks/paused")?;
    tasks.resume(id).await?;
    tell("/tasks/resumed")?;
    tasks.exec(id, "greedy", &["tail", "/dev/zero"]).await?;
    tasks.start(id, "greedy").await?;
    tell("/tasks/exec-started")?;
    story.extend(out_of_memory(events, id)?);
    let mut tell = |topic: &str| {
        for event in events.until(|event| event.topic == topic)? {
            // It may be told once more.
            if event.topic.starts_with("/tasks/") && event.topic != "/tasks/oom" {
                story.push(told(&event, id)?);
            }
        }
        anyhow::Ok(())
    };
    tasks.kill(id, "", SIGTERM).await?;
    tell("/tasks/exit")?;
    tasks.delete(id).await?;
    tell("/tasks/delete")?;
    ctr.run(&["containers", "delete", id])?;
    tell("/containers/delete")?;
    Ok(story)
}

/// A process that took too much ends, and it is told why: in whichever order.
fn out_of_memory(events: &mut Events, id: &str) -> Result<Vec<String>> {
    let mut both = BTreeMap::new();
    while both.len() < 2 {
        for event in events.until(|event| ["/tasks/oom", "/tasks/exit"].contains(&&*event.topic))? {
            both.insert(event.topic.clone(), told(&event, id)?);
        }
    }
    Ok(both.into_values().collect())
}

#[tokio::test]
async fn a_containers_life_is_told_as_runc_tells_it() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let mut tasks = Tasks::connect(&node).await?;
    let before = Holdings::now()?;
    let mut events = Events::listen(&node)?;
    let theirs = life(&ctr, &mut tasks, &mut events, (RUNC, "events-runc")).await.context("runc's")?;
    let ours = life(&ctr, &mut tasks, &mut events, (OURS, "events-caisson"));
    let ours = ours.await.with_context(|| node.containerd_log())?;
    drop(events);
    ensure!(theirs.len() == 13, "{theirs:#?}");
    ensure!(ours == theirs, "ours {ours:#?}\nrunc's {theirs:#?}");
    before.assert_nothing_added()
}

/// What comes of each call.
type Answers = BTreeMap<&'static str, String>;

/// A task that is made, and not started.
async fn made(ctr: &Ctr, tasks: &mut Tasks, (runtime, id): (&str, &str), options: &[&str]) -> Result<u32> {
    let script = "trap 'exit 5' TERM; while :; do sleep 0.1; done";
    let create = ["containers", "create", "--runtime", runtime];
    let what = [BUSYBOX_IMAGE, id, "sh", "-c", script];
    ctr.run(&[&create, options, &what].concat())?;
    tasks.create(id, tasks::rootfs(ctr, id)?).await.context("Create")
}

fn word<T>(answer: Answer<T>) -> String {
    answer.map_or_else(|status| format!("{:?}: {}", status.code(), status.message()), |_| "Ok".to_owned())
}

/// How a process ended, where that is known.
fn code(answer: Answer<u32>) -> String {
    answer.map_or_else(|status| word::<u32>(Err(status)), |code| format!("ended with {code}"))
}

/// Whether both refuse or neither does. Where runc has a code, ours is the same; where it has none, which is most of the
/// time, ours says which kind of a mistake it was.
fn agree(ours: &str, theirs: &str) -> bool {
    let word = |answer: &str| answer.split_once(": ").map_or(answer, |(code, _)| code).to_owned();
    match (word(ours), word(theirs)) {
        (ours, theirs) if theirs == "Unknown" => {
            ["FailedPrecondition", "InvalidArgument", "NotFound"].contains(&&*ours)
        }
        (ours, theirs) => ours == theirs,
    }
}

/// Everything that a client should not do, with one container after the other.
async fn misuse(ctr: &Ctr, tasks: &mut Tasks, runtime: &str) -> Result<Answers> {
    let mut answers = unstarted(ctr, tasks, (runtime, "misused-unstarted")).await?;
    answers.extend(running(ctr, tasks, (runtime, "misused-running")).await?);
    answers.extend(ended(ctr, tasks, (runtime, "misused-ended")).await?);
    Ok(answers)
}

async fn unstarted(ctr: &Ctr, tasks: &mut Tasks, (runtime, id): (&str, &str)) -> Result<Answers> {
    made(ctr, tasks, (runtime, id), &[]).await?;
    let answers = [
        ("make twice", word(tasks.create(id, Vec::new()).await)),
        ("pause before the start", word(tasks.pause(id).await)),
        ("resume before the start", word(tasks.resume(id).await)),
        ("kill before the start", word(tasks.kill(id, "", SIGKILL).await)),
        ("the end without a start", code(tasks.wait(id, "").await)),
        ("start after the end", word(tasks.start(id, "").await)),
        ("delete without a start", word(tasks.delete(id).await)),
    ];
    ctr.run(&["containers", "delete", id])?;
    Ok(answers.into())
}

async fn running(ctr: &Ctr, tasks: &mut Tasks, (runtime, id): (&str, &str)) -> Result<Answers> {
    made(ctr, tasks, (runtime, id), &[]).await?;
    tasks.start(id, "").await.context("Start")?;
    let mut answers = Answers::from([
        ("delete while it runs", word(tasks.delete(id).await)),
        ("a terminal that it has not", word(tasks.resize(id, "").await)),
        ("no input", word(tasks.close_input(id, "").await)),
        ("an update that says nothing", word(tasks.update(id, &json!({})).await)),
        ("an update that is none", word(tasks.update(id, &json!([1])).await)),
        ("kill an unknown exec", word(tasks.kill(id, "nobody", SIGTERM).await)),
        ("delete an unknown exec", word(tasks.delete_exec(id, "nobody").await)),
        ("wait for an unknown exec", word(tasks.wait(id, "nobody").await)),
        ("resize an unknown exec", word(tasks.resize(id, "nobody").await)),
        ("close an unknown exec's input", word(tasks.close_input(id, "nobody").await)),
        ("resume while it runs", word(tasks.resume(id).await)),
    ]);

    tasks.exec(id, "one", &["sleep", "1000"]).await.context("Exec")?;
    answers.extend([
        ("add an exec twice", word(tasks.exec(id, "one", &["true"]).await)),
        ("kill an exec before the start", word(tasks.kill(id, "one", SIGKILL).await)),
    ]);
    tasks.start(id, "one").await.context("Start of an exec")?;
    if runtime == OURS {
        starts_that_fail(tasks, id).await?;
    }
    answers.insert("delete an exec while it runs", word(tasks.delete_exec(id, "one").await));
    tasks.kill(id, "one", SIGKILL).await.context("Kill of an exec")?;
    answers.extend([
        ("the end of an exec", code(tasks.wait(id, "one").await)),
        ("kill an exec that has ended", word(tasks.kill(id, "one", SIGTERM).await)),
        ("delete an exec", code(tasks.delete_exec(id, "one").await.map(|exit| exit.exit_status))),
        ("delete an exec twice", word(tasks.delete_exec(id, "one").await)),
    ]);
    tasks.exec(id, "never", &["true"]).await.context("Exec")?;
    answers.insert("delete an exec that never started", word(tasks.delete_exec(id, "never").await));

    tasks.pause(id).await.context("Pause")?;
    answers.extend([
        ("pause twice", word(tasks.pause(id).await)),
        ("an exec while paused", word(added(tasks, id, "paused").await)),
        ("delete while paused", word(tasks.delete(id).await)),
    ]);
    tasks.resume(id).await.context("Resume")?;
    ctr.run(&["tasks", "delete", "--force", id])?;
    ctr.run(&["containers", "delete", id])?;
    Ok(answers)
}

/// Not for runc: its shim loses count of these starts, and does not outlive the container then.
async fn starts_that_fail(tasks: &mut Tasks, id: &str) -> Result<()> {
    tasks.exec(id, "nothing", &["/nonexistent"]).await.context("Exec")?;
    for (exec, code) in [
        ("", Code::FailedPrecondition),
        ("one", Code::FailedPrecondition),
        ("nothing", Code::NotFound),
        ("nobody", Code::NotFound),
    ] {
        let refused = tasks.start(id, exec).await.err().with_context(|| format!("{exec:?} was started"))?;
        ensure!(refused.code() == code, "{exec:?}: {refused:?}");
    }
    tasks.delete_exec(id, "nothing").await.context("Delete of an exec of nothing")?;
    Ok(())
}

/// Adds an exec and starts it: which of the two is refused makes no difference to anyone.
async fn added(tasks: &mut Tasks, id: &str, exec: &str) -> Answer {
    tasks.exec(id, exec, &["true"]).await?;
    let started = tasks.start(id, exec).await;
    tasks.delete_exec(id, exec).await?;
    started.map(drop)
}

async fn ended(ctr: &Ctr, tasks: &mut Tasks, (runtime, id): (&str, &str)) -> Result<Answers> {
    made(ctr, tasks, (runtime, id), &[]).await?;
    tasks.start(id, "").await.context("Start")?;
    // It may not yet know what to do about another one.
    tasks.kill(id, "", SIGKILL).await.context("Kill")?;
    let answers = [
        ("the end", code(tasks.wait(id, "").await)),
        ("the end once more", code(tasks.wait(id, "").await)),
        ("kill after the end", word(tasks.kill(id, "", SIGTERM).await)),
        ("start a second time", word(tasks.start(id, "").await)),
        ("pause after the end", word(tasks.pause(id).await)),
        ("resume after the end", word(tasks.resume(id).await)),
        ("an exec after the end", word(added(tasks, id, "late").await)),
        ("delete", code(tasks.delete(id).await.map(|exit| exit.exit_status))),
        ("delete twice", word(tasks.delete(id).await)),
        ("kill after the delete", word(tasks.kill(id, "", SIGTERM).await)),
    ];
    ctr.run(&["containers", "delete", id])?;
    Ok(answers.into())
}

#[tokio::test]
async fn what_is_refused_is_refused_as_runc_refuses_it() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let mut tasks = Tasks::connect(&node).await?;
    let before = Holdings::now()?;
    let theirs = misuse(&ctr, &mut tasks, RUNC).await.context("runc's")?;
    let ours = misuse(&ctr, &mut tasks, OURS).await.with_context(|| node.containerd_log())?;
    let both = ours.iter().zip(theirs.values());
    let differences = both.filter(|((_, ours), theirs)| !agree(ours, theirs));
    let differences: Vec<_> = differences.collect();
    ensure!(differences.is_empty(), "{differences:#?}");
    before.assert_nothing_added()
}

/// The only process that means something on this machine is the VMM; and what the shim logs can be told from what all
/// others log.
#[tokio::test]
async fn a_containers_process_is_its_machine_and_its_shims_lines_carry_its_ids() -> Result<()> {
    let node = Node::ready()?;
    let ctr = Ctr::new(&node);
    let mut tasks = Tasks::connect(&node).await?;
    let before = Holdings::now()?;
    let earlier = node.containerd_log().len();
    let id = "events-pids";
    let pid = made(&ctr, &mut tasks, (OURS, id), &[]).await?;
    let vmm = u32::try_from(record::vmm("default", id)?.as_raw())?;
    let started = tasks.start(id, "").await?;
    let listed = tasks.pids(id).await?;
    ensure!((pid, started, &*listed) == (vmm, vmm, &[vmm]), "{pid}, {started}, {listed:?} and not {vmm}");
    tasks.kill(id, "", SIGKILL).await?;
    ensure!(tasks.wait(id, "").await? == 137);
    tasks.delete(id).await?;
    ctr.run(&["containers", "delete", id])?;
    before.assert_nothing_added()?;

    let log = node.containerd_log();
    let new = log.get(earlier..).context("the log was longer before")?;
    // containerd's own lines begin with their time.
    let (ours, others): (Vec<_>, Vec<_>) =
        new.lines().partition(|line| line.starts_with(&format!("namespace=default pod={id} ")));
    ensure!(ours.iter().any(|line| line.contains("INFO serving")), "{new}");
    let foreign = others.iter().find(|line| !line.starts_with("time="));
    ensure!(foreign.is_none(), "{foreign:?} in\n{new}");
    Ok(())
}
