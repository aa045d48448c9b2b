//! Whether what the guest has cached of a file's contents is still so when it opens the file again.
//!
//! A guest drops the contents of a file when it is told another size or time of change than before. So what
//! it holds belongs to the attributes that it was told last, and if the file still has them at the next open
//! there is nothing to drop. Times are only as fine as the clock that file systems take them from: a change
//! within one tick of that leaves the time as it was, so a file that had just been changed when the guest was
//! told of it counts as changed.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use libc::stat64;

/// More than a tick of any kernel's clock (HZ=100).
const TICK: Duration = Duration::from_millis(20);

/// What tells one state of a file's contents from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(stat: &stat64) -> Self {
        Self {
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Whether a change from `now` on shows. One that lies in the future, by whatever clock, need not.
    fn settled(&self, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let changed = u64::try_from(seconds).ok().zip(u32::try_from(nanoseconds).ok());
        let Some((seconds, nanoseconds)) = changed else { return false };
        let changed = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds.min(999_999_999)));
        changed.is_some_and(|changed| now.duration_since(changed).is_ok_and(|age| age > TICK))
    }
}

/// The version of a file that the guest was told last, if later ones can be told from it.
#[derive(Debug, Default)]
pub(super) struct LastTold(Mutex<Option<Version>>);

impl LastTold {
    /// The guest is told of these attributes.
    pub(super) fn tell(&self, stat: &stat64) {
        self.tell_at(stat, SystemTime::now());
    }

    fn tell_at(&self, stat: &stat64, now: SystemTime) {
        let version = Version::of(stat);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = version.settled(now).then_some(version);
    }

    /// Whether the file is still what the guest was told.
    pub(super) fn holds(&self, stat: &stat64) -> bool {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) == Some(Version::of(stat))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(size: i64, time: (i64, i64)) -> stat64 {
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut stat: stat64 = unsafe { std::mem::zeroed() };
        (stat.st_size, stat.st_mtime, stat.st_mtime_nsec) = (size, time.0, time.1);
        (stat.st_ctime, stat.st_ctime_nsec) = time;
        stat
    }

    #[test]
    fn what_was_told_holds_until_something_changes() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let told = LastTold::default();
        assert!(!told.holds(&stat(1, (5, 0))), "nothing was told");
        told.tell_at(&stat(1, (5, 0)), at(9));
        assert!(told.holds(&stat(1, (5, 0))));
        for other in [stat(2, (5, 0)), stat(1, (5, 1)), stat(1, (6, 0))] {
            assert!(!told.holds(&other));
        }
    }

    #[test]
    fn what_changed_just_now_may_change_unseen() {
        let told = LastTold::default();
        for (changed, now) in
            [((9, 0), 9_000), ((9, 990_000_000), 10_000), ((11, 0), 10_000), ((-1, 0), 10_000)]
        {
            told.tell_at(&stat(1, changed), UNIX_EPOCH + Duration::from_millis(now));
            assert!(!told.holds(&stat(1, changed)), "{changed:?}");
        }
    }
}
