//! containerd's services on the shim's socket: thin layers over the [pod](crate::pod).
//!
//! | module | serves |
//! |---|---|
//! | [`task`] | the task API, of which version 3 is version 2 by another name |
//! | [`sandbox`] | the sandbox API, for pods without a container that stands for them |
//! | `stats` | what a container uses, in containerd's message of either version |

pub mod sandbox;
mod stats;
pub mod task;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use tonic::Code;
use ttrpc::asynchronous::Service;

use self::sandbox::SandboxService;
use self::task::TaskService;
use crate::log;
use crate::pod::{Pod, PodError};
use crate::rest::Activity;

/// The names under which the one task service is found: containerd 2, and before.
const TASK_NAMES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// All services of a pod, by name. Their calls are noted.
pub fn all(pod: &Arc<Pod>, activity: &Activity) -> HashMap<String, Service> {
    let service = || create_task(Arc::new(TaskService::new(pod.clone())));
    let mut all = create_sandbox(Arc::new(SandboxService::new(pod.clone())));
    let tasks = |name: &'static str| service().into_values().map(move |service| (name.to_owned(), service));
    all.extend(TASK_NAMES.into_iter().flat_map(tasks));
    all.into_iter().map(|(name, service)| (name, activity.of_calls(service))).collect()
}

/// Runs what must not stop half-way when containerd's call ends early, and turns its error into a status.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|error| status(&error)),
        Err(error) => Err(status(&PodError::Broken(error))),
    }
}

/// An error as containerd gets it: with its causes, and the code that says what kind it is.
fn status(error: &PodError) -> ttrpc::Error {
    let code = ttrpc_code(error.code());
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, log::one_line(error)))
}

/// The codes of gRPC and ttrpc are the same; the types are not.
fn ttrpc_code(code: Code) -> ttrpc::Code {
    match code {
        Code::Ok => ttrpc::Code::OK,
        Code::Cancelled => ttrpc::Code::CANCELLED,
        Code::Unknown => ttrpc::Code::UNKNOWN,
        Code::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Code::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Code::NotFound => ttrpc::Code::NOT_FOUND,
        Code::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Code::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
        Code::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Code::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Code::Aborted => ttrpc::Code::ABORTED,
        Code::OutOfRange => ttrpc::Code::OUT_OF_RANGE,
        Code::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Code::Internal => ttrpc::Code::INTERNAL,
        Code::Unavailable => ttrpc::Code::UNAVAILABLE,
        Code::DataLoss => ttrpc::Code::DATA_LOSS,
        Code::Unauthenticated => ttrpc::Code::UNAUTHENTICATED,
    }
}
