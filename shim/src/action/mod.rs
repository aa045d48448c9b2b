//! What a call of the binary does.
//!
//! | module | is called |
//! |---|---|
//! | [`start`] | by containerd for each container: brings the pod's shim up, or finds it |
//! | [`serve`] | by `start`: the shim itself, for the pod's life |
//! | [`delete`] | by containerd when a shim is dead, or may be: removes what is left |
//! | [`template`] | by a shim that found no template, or by an operator: makes one |
//! | [`info`] | by whoever wants to know what this is |

pub mod delete;
pub mod info;
pub mod serve;
pub mod start;
pub mod template;

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use crate::bundle::{BundleError, Role, Spec};
use crate::config::ConfigFiles;
use crate::directory::DirectoryError;
use crate::id::{Id, IdError};
use crate::invocation::Invocation;
use crate::journal::UndoError;
use crate::options::OptionsError;
use crate::template::build::BuildError;

/// Where shims of containerd listen.
const SOCKETS: &str = "/run/containerd/s";
/// The directory of the node's configuration, unless the environment names another.
const CONFIG: &str = "/etc/caisson";
/// The variable that names another. containerd passes its own environment on to shims.
const CONFIG_VARIABLE: &str = "CAISSON_CONFIG";

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// A flag that containerd always passes.
    #[error("the flag -{0} is missing")]
    Missing(&'static str),
    /// A name that can't be one.
    #[error("{what} of the parameters")]
    Id {
        /// Which one.
        what: &'static str,
        /// What is wrong with it.
        source: IdError,
    },
    /// The bundle.
    #[error("the bundle")]
    Bundle(#[from] BundleError),
    /// The handler's options in containerd's configuration.
    #[error("the runtime handler's options")]
    Options(#[from] OptionsError),
    /// The pod's directory.
    #[error("the pod's directory")]
    Directory(#[from] DirectoryError),
    /// Something that was left can't be removed.
    #[error("remove what is left")]
    Undo(#[from] UndoError),
    /// The pod of a container has no shim that lives.
    #[error("the shim of pod {0} is gone")]
    PodGone(Id),
    /// The process that removes what is left did not.
    #[error("the removal ({status}): {said}")]
    Removal {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// The template was not made.
    #[error("make a template")]
    Template(#[from] BuildError),
    /// A message that can't be read or written.
    #[error("a message to or from containerd")]
    Message(#[from] containerd_shim_protos::protobuf::Error),
    /// An answer in JSON.
    #[error("the answer")]
    Json(#[from] serde_json::Error),
    /// The ttrpc server.
    #[error("serve")]
    Serve(#[from] ttrpc::Error),
    /// The host.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Standard output.
    #[error("write the answer")]
    Answer(#[from] io::Error),
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> ActionError {
    let action = action.into();
    move |source| ActionError::Io { action, source }
}

/// Who a call is about.
#[derive(Debug)]
struct Subject {
    namespace: Id,
    id: Id,
    bundle: PathBuf,
}

impl Subject {
    fn of(invocation: &Invocation) -> Result<Subject, ActionError> {
        Ok(Subject {
            namespace: invocation.namespace.clone().ok_or(ActionError::Missing("namespace"))?,
            id: invocation.id.clone().ok_or(ActionError::Missing("id"))?,
            bundle: invocation.bundle.clone().unwrap_or_else(|| PathBuf::from(".")),
        })
    }

    /// The pod, and whether the container came with it. A bundle without a configuration is that of a sandbox which the
    /// sandbox API makes.
    fn pod(&self) -> Result<(Id, bool), BundleError> {
        let role = match Spec::read(&self.bundle) {
            Err(BundleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Role::Sandbox
            }
            spec => spec?.role()?,
        };
        Ok(match role {
            Role::Alone | Role::Sandbox => (self.id.clone(), true),
            Role::Member(pod) => (pod, false),
        })
    }
}

/// Where the configuration of this node, and of the pod's runtime handler, is.
fn config_files(handler: Option<PathBuf>) -> ConfigFiles {
    let node = std::env::var_os(CONFIG_VARIABLE).unwrap_or_else(|| CONFIG.into());
    ConfigFiles { node: node.into(), handler }
}
