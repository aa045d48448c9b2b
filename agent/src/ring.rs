//! A bounded, numbered history that any number of readers follow, each at its own pace.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tokio::sync::watch;

/// Items handed to a reader at a time.
const BATCH: usize = 64;

/// The reader asked for items that are gone, or not there yet by more than one.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("sequence number {wanted} is outside of the kept range {oldest} to {next}")]
pub struct Gap {
    /// The number asked for.
    pub wanted: u64,
    /// The oldest number that is kept.
    pub oldest: u64,
    /// The number of the next item.
    pub next: u64,
}

/// The history. Sequence numbers begin with 1.
#[derive(Debug)]
pub struct Ring<T> {
    items: Mutex<Items<T>>,
    next: watch::Sender<u64>,
}

#[derive(Debug)]
struct Items<T> {
    capacity: usize,
    next: u64,
    kept: VecDeque<T>,
}

impl<T: Clone> Ring<T> {
    /// A ring that keeps the last `capacity` items.
    pub fn new(capacity: usize) -> Ring<T> {
        let items = Items { capacity: capacity.max(1), next: 1, kept: VecDeque::new() };
        Ring { items: Mutex::new(items), next: watch::Sender::new(1) }
    }

    /// Appends the item that `make` returns for its sequence number.
    pub fn push(&self, make: impl FnOnce(u64) -> T) {
        let mut items = self.lock();
        let item = make(items.next);
        if items.kept.len() == items.capacity {
            items.kept.pop_front();
        }
        items.kept.push_back(item);
        items.next = items.next.saturating_add(1);
        let next = items.next;
        // Under the lock, so that the watch never goes back.
        self.next.send_replace(next);
    }

    /// Oldest kept sequence number.
    pub fn oldest(&self) -> u64 {
        self.lock().oldest()
    }

    /// Sequence number of the next item.
    pub fn next(&self) -> u64 {
        self.lock().next
    }

    /// Items from number `from` on, in order, a batch at most; none when there are none yet.
    ///
    /// # Errors
    /// When `from` is not kept any more or is beyond the next number.
    pub fn read(&self, from: u64) -> Result<Vec<T>, Gap> {
        let items = self.lock();
        let (oldest, next) = (items.oldest(), items.next);
        if from < oldest || from > next {
            return Err(Gap { wanted: from, oldest, next });
        }
        let skip = usize::try_from(from - oldest).unwrap_or(usize::MAX);
        Ok(items.kept.iter().skip(skip).take(BATCH).cloned().collect())
    }

    /// Returns once there is an item with number `from`.
    pub async fn wait(&self, from: u64) {
        // The sender lives as long as self, so this can not fail.
        let _ = self.next.subscribe().wait_for(|&next| next > from).await;
    }

    fn lock(&self) -> MutexGuard<'_, Items<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Items<T> {
    fn oldest(&self) -> u64 {
        self.next.saturating_sub(self.kept.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn old_items_leave_a_gap_that_is_named() {
        let ring = Ring::new(3);
        for _ in 0..5 {
            ring.push(|sequence| sequence);
        }
        assert_eq!(ring.read(3), Ok(vec![3, 4, 5]));
        assert_eq!(ring.read(6), Ok(vec![]));
        assert_eq!(ring.read(2), Err(Gap { wanted: 2, oldest: 3, next: 6 }));
        assert_eq!(ring.read(7), Err(Gap { wanted: 7, oldest: 3, next: 6 }));
    }

    #[tokio::test]
    async fn a_reader_is_woken() {
        let ring = std::sync::Arc::new(Ring::new(4));
        let waiting = tokio::spawn({
            let ring = ring.clone();
            async move { ring.wait(2).await }
        });
        ring.push(|_| ());
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        ring.push(|_| ());
        waiting.await.unwrap();
    }

    proptest! {
        #[test]
        fn a_reader_sees_every_item_once_or_is_told(capacity in 1usize..20, rounds in
            proptest::collection::vec((0usize..40, any::<bool>()), 1..30)) {
            let ring = Ring::new(capacity);
            let (mut wanted, mut pushed) = (1u64, 0u64);
            for (count, reads) in rounds {
                for _ in 0..count {
                    ring.push(|sequence| sequence);
                    pushed += 1;
                }
                if !reads {
                    continue;
                }
                match ring.read(wanted) {
                    Ok(items) => for item in items {
                        prop_assert_eq!(item, wanted);
                        wanted += 1;
                    },
                    Err(gap) => {
                        prop_assert_eq!(gap.oldest, pushed + 1 - (capacity as u64).min(pushed));
                        prop_assert!(gap.oldest > wanted);
                        wanted = gap.oldest;
                    }
                }
            }
        }
    }
}
