//! A machine from a template, and a template from a machine.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_protocol::client::{call, with_deadline};
use caisson_protocol::v1;
use caisson_vmm_api::config::FileSource;
use caisson_vmm_api::control::client::ClientError;
use caisson_vmm_api::control::{self, metrics::Counter};
use rustix::rand::GetRandomFlags;
use tokio::time::{Instant, sleep};

use super::console::Console;
use super::{Control, Machine, MachineError, Plan, drive, find_agent, host, vmm};
use crate::{journal::Journal, phases::Phases, template::Template};

/// Bytes of entropy for a clone: what the kernel's generator takes in, twice over.
const ENTROPY: usize = 64;
/// How long a clone's agent may take to become another guest.
const RESTORED: Duration = Duration::from_secs(60);
/// How long a guest may take to report the memory that it has freed, and how long it must have reported none to be done.
/// Linux begins with it 2 seconds after the last was freed.
const REPORTING: Duration = Duration::from_secs(30);
const QUIET: Duration = Duration::from_secs(4);
/// Between two looks at how much it has reported.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Why there is no clone.
#[derive(Debug)]
pub(super) enum CloneError {
    /// The VMM refuses the template. No guest has run, and the pod's devices are still in the plan.
    Template(ClientError),
    /// Anything else.
    Machine(MachineError),
}

impl From<MachineError> for CloneError {
    fn from(error: MachineError) -> Self {
        Self::Machine(error)
    }
}

impl Machine {
    /// Makes a clone of a template. What differs between two guests is given to it before this returns: nothing of a pod
    /// is in the guest until then.
    pub(super) async fn clone_from(
        plan: &mut Plan<'_>,
        template: Box<Template>,
        journal: &mut Journal,
        phases: &mut Phases,
    ) -> Result<Machine, CloneError> {
        let console = Console::default();
        let vmm::Started { process, client, listener } = vmm::start(plan, journal, &console)?;
        phases.done("vmm");
        let (command, files) = vmm::restored(&template, listener, &console)?;
        let restored = drive(client, move |vmm| {
            let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            vmm.restore(command, &descriptors)
        });
        let (client, restored) = restored.await?;
        if let Err(error) = restored {
            process.kill();
            process.ended().await;
            discard(template).await;
            return Err(CloneError::Template(error));
        }
        phases.done("template");
        let devices = vmm::pods_devices(plan)?;
        let plugged = drive(client, move |vmm| {
            let plugged = devices.into_iter().map(|(device, file)| {
                let files: Vec<_> = file.iter().map(OwnedFd::as_fd).collect();
                Ok(u32::from(vmm.plug(None, device(FileSource::Descriptor(0)), &files)?.0))
            });
            let slots = plugged.collect::<Result<Vec<u32>, ClientError>>()?;
            vmm.boot()?;
            Ok(slots)
        });
        let (client, plugged) = plugged.await?;
        let slots = match plugged {
            Ok(slots) => slots,
            Err(source) => return Err(MachineError::Vmm { source, said: console.tail().await }.into()),
        };
        phases.done("machine");
        let agent = find_agent(&plan.socket, process.ended.clone(), &console).await?;
        phases.done("guest");
        let machine = Machine { process, control: Arc::new(Mutex::new(Control(client))), agent, console };
        machine.become_another(slots).await?;
        phases.done("identity");
        Ok(machine)
    }

    /// Gives a clone what no two guests may have in common, and the devices in these slots.
    async fn become_another(&self, slots: Vec<u32>) -> Result<(), MachineError> {
        let mut entropy = vec![0; ENTROPY];
        // The kernel fills up to 256 bytes at once (getrandom(2)).
        rustix::rand::getrandom(&mut entropy, GetRandomFlags::empty())
            .map_err(|errno| host("draw entropy for the guest")(errno.into()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = v1::AfterRestoreRequest {
            entropy,
            realtime_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
            slots,
            ..v1::AfterRestoreRequest::default()
        };
        let mut agent = self.agent().machine();
        self.answer(agent.after_restore(with_deadline(request, RESTORED))).await?;
        Ok(())
    }

    /// Saves the guest as a template: with as little in its memory as can be, and nobody connected to its agent. The
    /// machine is not to be used any more.
    ///
    /// # Errors
    /// The agent's and the VMM's own.
    pub async fn save(self, state: File, memory: File) -> Result<(), MachineError> {
        let mut agent = self.agent().machine();
        self.answer(agent.before_snapshot(call(v1::BeforeSnapshotRequest {}))).await?;
        drop(agent);
        self.wait_for_reports().await?;
        let Machine { process, control, agent, console } = self;
        drop(agent);
        let saved = tokio::task::spawn_blocking(move || {
            let mut control = control.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            control.0.pause()?;
            control.0.snapshot(state.as_fd(), memory.as_fd())
        });
        let saved = saved.await.map_err(|error| host("drive the VMM")(std::io::Error::other(error)))?;
        if let Err(source) = saved {
            return Err(MachineError::Vmm { source, said: console.tail().await });
        }
        process.kill();
        process.ended().await;
        Ok(())
    }

    /// Returns when the guest has reported all memory that is free, which is then none in the snapshot.
    async fn wait_for_reports(&self) -> Result<(), MachineError> {
        let deadline = Instant::now() + REPORTING;
        let (mut reported, mut since) = (0, Instant::now());
        while Instant::now() < deadline && since.elapsed() < QUIET {
            let now = self.reported().await?;
            if now != reported {
                (reported, since) = (now, Instant::now());
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    async fn reported(&self) -> Result<u64, MachineError> {
        let metrics = self.control(control::Client::metrics).await?;
        let of = |device: &control::metrics::DeviceMetrics| match device.counter("balloon", "reported_bytes")
        {
            Some(Counter::Single(bytes)) => Some(*bytes),
            _ => None,
        };
        Ok(metrics.slots.values().find_map(of).unwrap_or(0))
    }
}

/// For another to be made in its place.
async fn discard(template: Box<Template>) {
    let discarded = tokio::task::spawn_blocking(move || template.discard());
    match discarded.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = crate::log::one_line(&error), "it stays"),
        Err(error) => tracing::warn!(%error, "it stays"),
    }
}
