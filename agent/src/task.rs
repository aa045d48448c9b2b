//! Tasks, and work that blocks.
//!
//! The runtime's code for a task exists once for each type of future or function. Here all have one type, and share
//! one copy: with dozens of kinds of work it would be a twentieth of the agent otherwise.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use tokio::task::JoinHandle;

type Output = Box<dyn Any + Send>;

/// The work did not end by itself.
#[derive(Clone, Copy, Debug, Error)]
#[error("the work panicked")]
pub struct Panicked;

impl From<Panicked> for std::io::Error {
    fn from(panicked: Panicked) -> Self {
        Self::other(panicked)
    }
}

/// Starts a task that nobody needs to wait for.
pub fn spawn(work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(work);
    tokio::spawn(work)
}

/// Runs `work` to its end, even if this call is cancelled.
///
/// # Errors
/// When it panics.
pub async fn detached<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Panicked> {
    let work: Pin<Box<dyn Future<Output = Output> + Send>> =
        Box::pin(async move { Box::new(work.await) as Output });
    taken(tokio::spawn(work)).await
}

/// Runs work that blocks (mounts, sysfs, namespaces) off the reactor's thread, and to its end, even if this call is
/// cancelled.
///
/// # Errors
/// When it panics, or there is no thread for it.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
    taken(on_thread(Box::new(move || Box::new(work())))?).await
}

/// When the machine has no thread left, the runtime panics, and keeps the work for a better time: nobody would undo what
/// is done so late.
fn on_thread(work: Box<dyn FnOnce() -> Output + Send>) -> Result<JoinHandle<Output>, Panicked> {
    let given_up = Arc::new(AtomicBool::new(false));
    let seen = given_up.clone();
    let work = move || if seen.load(Ordering::Acquire) { Box::new(()) as Output } else { work() };
    catch_unwind(AssertUnwindSafe(|| tokio::task::spawn_blocking(work))).map_err(|_| {
        given_up.store(true, Ordering::Release);
        Panicked
    })
}

async fn taken<T: 'static>(handle: JoinHandle<Output>) -> Result<T, Panicked> {
    let output = handle.await.map_err(|_| Panicked)?;
    output.downcast().map(|output| *output).map_err(|_| Panicked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn results_come_back_with_their_types() {
        assert_eq!(blocking(|| "text".to_owned()).await.unwrap(), "text");
        assert_eq!(detached(async { Err::<u8, _>(7_u16) }).await.unwrap(), Err(7));
    }

    #[tokio::test]
    async fn a_panic_is_an_error() {
        assert!(blocking(|| panic!("on purpose")).await.is_err());
        assert!(detached(async { panic!("on purpose") }).await.is_err());
    }

    #[tokio::test]
    async fn detached_work_outlives_its_call() {
        let (go, gone) = oneshot::channel::<()>();
        let (told, tell) = oneshot::channel();
        let call = tokio::spawn(detached(async move {
            gone.await.unwrap();
            told.send("done").unwrap();
        }));
        tokio::task::yield_now().await;
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        go.send(()).unwrap();
        assert_eq!(tell.await, Ok("done"));
    }
}
