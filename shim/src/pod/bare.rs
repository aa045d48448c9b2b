//! A pod as the sandbox API has it: without a container that stands for it.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use super::error::PodError;
use super::process::Exit;
use super::spec::SandboxSpec;
use super::{Pod, Sandbox};

/// Where such a sandbox is in its life.
#[derive(Clone, Debug, Default)]
pub enum BareState {
    /// Nobody has asked for one: the pod's first container brings the machine.
    #[default]
    Absent,
    /// It is to be started.
    Made(Arc<SandboxSpec>),
    /// It is being started.
    Starting,
    /// Its machine runs.
    Ready {
        /// The machine's process.
        pid: u32,
        /// Since when.
        at: SystemTime,
    },
    /// It has ended.
    Ended(Exit),
}

/// The state of a sandbox of the sandbox API.
#[derive(Debug, Default)]
pub(super) struct Bare(watch::Sender<BareState>);

impl Bare {
    /// Whether the sandbox is the sandbox API's, which then also says when the shim's work is done.
    pub(super) fn is_asked_for(&self) -> bool {
        !matches!(*self.0.borrow(), BareState::Absent)
    }

    /// Takes one step, if this is its time. The state before it.
    fn step(&self, next: impl FnOnce(&BareState) -> Option<BareState>) -> Option<BareState> {
        let mut before = None;
        self.0.send_if_modified(|state| match next(state) {
            Some(next) => {
                before = Some(std::mem::replace(state, next));
                true
            }
            None => false,
        });
        before
    }
}

impl Pod {
    /// Notes what sandbox is wanted.
    ///
    /// # Errors
    /// When there is one.
    pub fn create_sandbox(&self, wanted: SandboxSpec) -> Result<(), PodError> {
        let make = |state: &BareState| match state {
            BareState::Absent => Some(BareState::Made(Arc::new(wanted))),
            _ => None,
        };
        match self.bare.step(make) {
            Some(_) => Ok(()),
            None => Err(PodError::Exists(format!("sandbox {}", self.settings.id))),
        }
    }

    /// Brings the machine up, and returns its process and the time.
    ///
    /// # Errors
    /// When it is not the time for it, or it fails; nothing is left then.
    pub async fn start_sandbox(self: &Arc<Self>) -> Result<(u32, SystemTime), PodError> {
        let begin = |state: &BareState| match state {
            BareState::Made(_) => Some(BareState::Starting),
            _ => None,
        };
        let Some(BareState::Made(wanted)) = self.bare.step(begin) else {
            return Err(PodError::State(format!("sandbox {} is not one to be started", self.settings.id)));
        };
        let sandbox = match self.bring_up((*wanted).clone(), Vec::new()).await {
            Ok(sandbox) => sandbox,
            Err(error) => {
                self.bare.0.send_replace(BareState::Ended(Exit::killed()));
                return Err(error);
            }
        };
        let (pid, at) = (sandbox.machine().pid(), SystemTime::now());
        self.bare.0.send_replace(BareState::Ready { pid, at });
        self.follow_machine(sandbox);
        Ok((pid, at))
    }

    /// Tells the sandbox's end after that of what was in it.
    fn follow_machine(self: &Arc<Self>, sandbox: Arc<Sandbox>) {
        let pod = self.clone();
        tokio::spawn(async move {
            sandbox.machine().ended().await;
            for process in pod.followed_in_guest() {
                process.wait().await;
            }
            pod.bare.0.send_replace(BareState::Ended(Exit::killed()));
        });
    }

    /// Ends the machine, with all that is in it, and undoes what was made for it. One that has ended is left as it is.
    pub async fn stop_sandbox(&self) {
        let never_started = |state: &BareState| match state {
            BareState::Made(_) => Some(BareState::Ended(Exit::killed())),
            _ => None,
        };
        if self.bare.step(never_started).is_none() && self.bare.is_asked_for() {
            self.tear_down().await;
            self.wait_sandbox().await;
        }
    }

    /// Waits for the sandbox's end.
    pub async fn wait_sandbox(&self) -> Exit {
        let mut state = self.bare.0.subscribe();
        loop {
            if let BareState::Ended(exit) = *state.borrow_and_update() {
                return exit;
            }
            // The sender is `self`'s.
            if state.changed().await.is_err() {
                return Exit::killed();
            }
        }
    }

    /// Where it is in its life.
    pub fn sandbox_state(&self) -> BareState {
        self.bare.0.borrow().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigFiles;
    use crate::events::Events;
    use crate::pod::Settings;

    fn pod(root: &std::path::Path) -> Arc<Pod> {
        let (events, _publisher) = Events::publish("", "n");
        let id = |text: &str| text.parse().unwrap();
        let config = ConfigFiles { node: "/nonexistent".into(), handler: Some("/nonexistent/file".into()) };
        let settings = Settings { namespace: id("n"), id: id("p"), root: root.to_owned(), config };
        Arc::new(Pod::new(settings, events))
    }

    #[tokio::test]
    async fn a_sandbox_is_made_once_and_started_once() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        assert!(matches!(pod.start_sandbox().await, Err(PodError::State(_))));
        pod.create_sandbox(SandboxSpec::default()).unwrap();
        assert!(matches!(pod.create_sandbox(SandboxSpec::default()), Err(PodError::Exists(_))));
        // This node has no such configuration: it can't be started, and that is its end.
        assert!(matches!(pod.start_sandbox().await, Err(PodError::Config(_))));
        assert_eq!(pod.wait_sandbox().await.code, 137);
        assert!(matches!(pod.start_sandbox().await, Err(PodError::State(_))));
        pod.stop_sandbox().await;
    }

    #[tokio::test]
    async fn one_that_was_never_started_is_stopped_at_once() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create_sandbox(SandboxSpec::default()).unwrap();
        pod.stop_sandbox().await;
        assert_eq!(pod.wait_sandbox().await.code, 137);
        // The task API's word that nothing is left does not end the shim: the sandbox API's does.
        pod.shutdown(false).await;
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), pod.finished()).await;
        assert!(early.is_err());
        pod.shutdown(true).await;
        pod.finished().await;
    }
}
