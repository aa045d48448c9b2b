//! Server streams that follow a ring.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::ring::Ring;
use crate::state::State;
use crate::task;

/// Items on their way to a client; more wait in the ring.
const IN_FLIGHT: usize = 16;

pub(super) type Followed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Streams the items of a ring of `state` from number `from` on; with `follow`, also those to come. Ends with
/// OUT_OF_RANGE when the client is too slow for the ring.
pub(super) fn follow<T, F>(state: Arc<State>, ring: F, from: u64, follow: bool) -> Followed<T>
where
    T: Clone + Send + 'static,
    F: Fn(&State) -> &Ring<T> + Send + Sync + 'static,
{
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    task::spawn(async move {
        let ring = ring(&state);
        let mut next = from;
        let mut closing = state.closing.subscribe();
        loop {
            // Before the ring is read: what comes before the end is still sent.
            let ends = *closing.borrow_and_update();
            let items = match ring.read(next) {
                Ok(items) => items,
                Err(gap) => {
                    let _ = sender.send(Err(gap.into())).await;
                    return;
                }
            };
            if items.is_empty() {
                if !follow || ends {
                    return;
                }
                tokio::select! {
                    () = ring.wait(next) => continue,
                    _ = closing.changed() => continue,
                    () = sender.closed() => return,
                }
            }
            for item in items {
                if sender.send(Ok(item)).await.is_err() {
                    return;
                }
                next = next.saturating_add(1);
            }
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}
