//! A pod's machine: the jailed VMM and the agent in it.
//!
//! | module | does |
//! |---|---|
//! | `vmm` | starts the VMM's process in its jail, and tells it what to boot |
//! | `clone` | makes a machine from a template; and a template from a machine |
//! | `resize` | makes a machine that runs larger or smaller |
//! | `console` | the guest's console, and what the VMM says: kept for errors, logged for those who look |
//!
//! The machine's end is seen at once, by the process's descriptor (pidfd_open(2)), whatever brought it about.

mod clone;
mod console;
mod resize;
mod vmm;

use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use caisson_protocol::client::{Client, ClientError, with_deadline};
use caisson_protocol::connect::UnixVsock;
use caisson_protocol::v1;
use caisson_vmm_api::control;
use rustix::process::Signal;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use self::clone::CloneError;
use self::console::Console;
use crate::{
    config,
    journal::{Journal, JournalError},
    network::Card,
    phases::Phases,
    share::IdRange,
    sizing::Shape,
    template::Template,
};

/// How long a guest may take until its agent answers.
const BOOT: Duration = Duration::from_secs(60);
/// Between two looks whether the agent listens.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long an orderly end may take before the VMM is killed.
const SHUTDOWN: Duration = Duration::from_secs(10);
/// How long a killed VMM may take to go.
const GONE: Duration = Duration::from_secs(10);
/// How long a machine whose agent is not to be reached any more may take to end.
pub const AGENT_GONE: Duration = Duration::from_secs(5);
/// How long any answer of the agent may take.
const ANSWER: Duration = Duration::from_secs(150);
/// The tag of the pod's share.
pub const SHARE_TAG: &str = "share";

/// What a machine is made from.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The programs to use.
    pub programs: &'a config::Machine,
    /// Its size, and what it can become.
    pub shape: Shape,
    /// The directory that it shares, on a mount with shared propagation. None: it is to become a template.
    pub share: Option<PathBuf>,
    /// The host ids that its process has to itself, as whose the share shows its files. None: they are the host's.
    pub ids: Option<IdRange>,
    /// Its network cards.
    pub cards: Vec<Card>,
    /// The pod's directory: absolute, for what lasts.
    pub directory: &'a Path,
    /// The path of the socket to reach the guest by, within this process.
    pub socket: PathBuf,
    /// The same by its absolute path, for the record.
    pub socket_record: PathBuf,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Something on the host.
    #[error("{action}")]
    Host {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// An interface whose hardware address no card can have.
    #[error("interface {0}: its hardware address is none that a network card can have")]
    Address(String),
    /// The record can't be kept.
    #[error("keep the pod's record")]
    Journal(#[from] JournalError),
    /// The VMM refused.
    #[error("the VMM; it said: {said}")]
    Vmm {
        /// Why.
        source: control::client::ClientError,
        /// The last lines of its log and the guest's console.
        said: String,
    },
    /// The VMM ended before the agent answered.
    #[error("the VMM ended ({status}) while the guest booted; it said: {said}")]
    Ended {
        /// How.
        status: String,
        /// The last lines of its log and the guest's console.
        said: String,
    },
    /// The machine ended before the agent's answer.
    #[error("it has ended ({status}); it said: {said}")]
    Gone {
        /// How.
        status: String,
        /// The last lines of its log and the guest's console.
        said: String,
    },
    /// The agent refused.
    #[error("the guest's agent: {}", .0.message())]
    Agent(Box<tonic::Status>),
    /// The guest does not plug memory, or does not give it back.
    #[error(
        "the guest is at {plugged_mib} MiB of {wanted_mib} to be plugged and {balloon_mib} MiB of \
         {wanted_balloon_mib} to be given back after {} s: it goes on trying",
        resize::GUEST.as_secs()
    )]
    Stuck {
        /// MiB that are plugged.
        plugged_mib: u64,
        /// MiB that should be.
        wanted_mib: u64,
        /// MiB that the guest gave back by its balloon.
        balloon_mib: u64,
        /// MiB that it should.
        wanted_balloon_mib: u64,
    },
    /// The agent did not answer in time.
    #[error("the guest's agent does not answer after {} s; the guest said: {said}", BOOT.as_secs())]
    Silent {
        /// The last attempt.
        source: ClientError,
        /// The last lines of its log and the guest's console.
        said: String,
    },
}

fn host(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> MachineError {
    let action = action.into();
    move |source| MachineError::Host { action, source }
}

/// A machine that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Machine {
    process: Process,
    /// Held for the machine's life: a VMM without it would have nobody to take orders from.
    control: Arc<Mutex<Control>>,
    agent: Client<UnixVsock>,
    console: Console,
}

/// The VMM's process. Dropping it kills it.
#[derive(Debug)]
struct Process {
    pid: u32,
    pidfd: OwnedFd,
    ended: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    /// Watches a child, in a task of its own.
    fn watch(mut child: Child, pid: u32, pidfd: OwnedFd) -> Process {
        let (tell, ended) = watch::channel(None);
        tokio::spawn(async move {
            // Waiting for one's own child fails for no reason that could be acted on.
            if let Ok(status) = child.wait().await {
                tracing::info!(pid, %status, "the VMM has ended");
                tell.send_replace(Some(status));
            }
        });
        Process { pid, pidfd, ended }
    }

    fn kill(&self) {
        // The only failure left is that it has ended.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Returns once it has ended.
    async fn ended(&self) {
        // The other end goes only after it has told.
        let _ = self.ended.clone().wait_for(Option::is_some).await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Without `Debug` of its own.
struct Control(control::Client);

impl std::fmt::Debug for Control {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Control")
    }
}

/// How a machine came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Its kernel was booted, in a machine of the plan's shape.
    Boot,
    /// It is a clone of the template, and has the template's shape.
    Template,
}

impl Machine {
    /// Makes a machine from a template, or boots one: without a template, and when this one cannot be cloned. The template
    /// is discarded then.
    ///
    /// # Errors
    /// As [`boot`](Self::boot); and when the guest of a clone does not answer or refuses.
    pub async fn start(
        mut plan: Plan<'_>,
        template: Option<Box<Template>>,
        journal: &mut Journal,
        phases: &mut Phases,
    ) -> Result<(Machine, Origin), MachineError> {
        if let Some(template) = template {
            match Self::clone_from(&mut plan, template, journal, phases).await {
                Err(CloneError::Template(error)) => {
                    let error = crate::log::one_line(&error);
                    tracing::warn!(error, "the template cannot be cloned and is discarded: the pod boots");
                    vmm::forget(&plan)?;
                }
                Err(CloneError::Machine(error)) => return Err(error),
                Ok(machine) => return Ok((machine, Origin::Template)),
            }
        }
        Ok((Self::boot(plan, journal, phases).await?, Origin::Boot))
    }

    /// Starts a VMM, boots a guest in it and waits for its agent.
    ///
    /// # Errors
    /// When any of it fails. What was made is in the record by then; the process is killed.
    pub async fn boot(
        mut plan: Plan<'_>,
        journal: &mut Journal,
        phases: &mut Phases,
    ) -> Result<Machine, MachineError> {
        let console = Console::default();
        let vmm::Started { process, client, listener } = vmm::start(&plan, journal, &console)?;
        phases.done("vmm");
        let (config, files) = vmm::machine(&mut plan, listener, &console)?;
        let made = drive(client, move |vmm| {
            let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            vmm.create(config, &descriptors).and_then(|()| vmm.boot())
        });
        let (client, made) = made.await?;
        if let Err(source) = made {
            return Err(MachineError::Vmm { source, said: console.tail().await });
        }
        phases.done("machine");
        let agent = find_agent(&plan.socket, process.ended.clone(), &console).await?;
        phases.done("guest");
        Ok(Machine { process, control: Arc::new(Mutex::new(Control(client))), agent, console })
    }

    /// The VMM's process: the one of the pod's processes that the host knows.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// A client of the agent.
    pub fn agent(&self) -> &Client<UnixVsock> {
        &self.agent
    }

    /// What the agent answers to a call.
    ///
    /// # Errors
    /// The agent's own, and the machine's end when that is why it does not answer.
    pub async fn answer<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, MachineError> {
        let status = match within(ANSWER, call).await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        // The agent's own have no cause on this side.
        let broken = std::error::Error::source(&status).is_some();
        if broken && timeout(AGENT_GONE, self.ended()).await.is_ok() {
            let status = self.process.ended.borrow().map_or_else(String::new, |status| status.to_string());
            return Err(MachineError::Gone { status, said: self.console.tail().await });
        }
        // That is what a deadline looks like that passes on this side.
        if broken && status.code() == tonic::Code::Cancelled {
            let late = tonic::Status::deadline_exceeded("the guest's agent does not answer in time");
            return Err(MachineError::Agent(Box::new(late)));
        }
        Err(MachineError::Agent(Box::new(status)))
    }

    /// Has the VMM do something, on a thread that may wait for it.
    ///
    /// # Errors
    /// The VMM's own.
    pub async fn control<T: Send + 'static>(
        &self,
        order: impl FnOnce(&mut control::Client) -> Result<T, control::client::ClientError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let control = self.control.clone();
        let done = tokio::task::spawn_blocking(move || {
            order(&mut control.lock().unwrap_or_else(PoisonError::into_inner).0)
        });
        let result = done.await.map_err(|error| host("drive the VMM")(std::io::Error::other(error)))?;
        match result {
            Ok(value) => Ok(value),
            Err(source) => Err(MachineError::Vmm { source, said: self.console.tail().await }),
        }
    }

    /// Returns once the machine has ended, for whatever reason.
    pub async fn ended(&self) {
        self.process.ended().await;
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.process.ended.borrow().is_some()
    }

    /// Ends it now.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Ends it in order: the guest writes out what it holds. One that takes too long is killed.
    pub async fn stop(&self) {
        if self.has_ended() {
            return;
        }
        let request = with_deadline(v1::ShutdownRequest { grace_ms: 0, reboot: false }, SHUTDOWN);
        let mut agent = self.agent.sandbox();
        let mut phases = Phases::begin();
        let asked = within(SHUTDOWN, agent.shutdown(request)).await;
        phases.done("answer");
        if let Err(error) = &asked {
            tracing::warn!(error = error.message(), "the guest can't be shut down in order");
        }
        if asked.is_err() || timeout(SHUTDOWN, self.ended()).await.is_err() {
            self.kill();
            if timeout(GONE, self.ended()).await.is_err() {
                tracing::error!(pid = self.pid(), "the VMM survives SIGKILL");
            }
        }
        phases.done("machine");
        tracing::info!(pid = self.pid(), %phases, "the machine is stopped");
    }
}

/// What the agent answers, if it comes to the end of that within `limit`. A call's own deadline is for the agent to keep,
/// and ends on this side with the first bytes: a hostile agent could leave the rest out.
///
/// # Errors
/// The agent's own, and [`DeadlineExceeded`](tonic::Code::DeadlineExceeded).
pub async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, tonic::Status> {
    match timeout(limit, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(tonic::Status::deadline_exceeded("it does not come to the end of its answer")),
    }
}

/// Gives the VMM orders, on a thread that may wait for it.
async fn drive<T: Send + 'static>(
    mut client: control::Client,
    order: impl FnOnce(&mut control::Client) -> Result<T, control::client::ClientError> + Send + 'static,
) -> Result<(control::Client, Result<T, control::client::ClientError>), MachineError> {
    let driven = tokio::task::spawn_blocking(move || {
        let result = order(&mut client);
        (client, result)
    });
    driven.await.map_err(|error| host("drive the VMM")(std::io::Error::other(error)))
}

async fn find_agent(
    socket: &Path,
    ended: watch::Receiver<Option<ExitStatus>>,
    console: &Console,
) -> Result<Client<UnixVsock>, MachineError> {
    let deadline = Instant::now() + BOOT;
    loop {
        let mut watched = ended.clone();
        let end = async { watched.wait_for(Option::is_some).await.ok().and_then(|status| *status) };
        let connect = tokio::time::timeout_at(deadline, Client::connect(UnixVsock::new(socket)));
        let attempt = tokio::select! {
            attempt = connect => attempt.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("no answer").into())),
            status = end => {
                let status = status.map_or_else(String::new, |status| status.to_string());
                return Err(MachineError::Ended { status, said: console.tail().await });
            }
        };
        match attempt {
            Ok(agent) => return Ok(agent),
            Err(source) if Instant::now() >= deadline => {
                return Err(MachineError::Silent { source, said: console.tail().await });
            }
            Err(_) => sleep(LOOK_AGAIN).await,
        }
    }
}
