//! Token buckets that hold a device to a rate of bytes and of operations.
//!
//! A bucket of `size` tokens fills at `size` per `refill_ms`, so `size` bounds a burst and the quotient the
//! sustained rate. A request that is larger than the whole bucket passes when the bucket is full and leaves
//! it in debt: it is slowed like any other, and not stuck for ever.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    time::{Duration, Instant},
};

use caisson_vmm_api::devices::{Bucket, RateLimits};
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};

/// Why limits were refused.
#[derive(Debug, thiserror::Error)]
pub enum RateLimitError {
    /// A bucket that holds nothing lets nothing through.
    #[error("a bucket's size must not be 0")]
    ZeroSize,
    /// A bucket that fills in no time limits nothing.
    #[error("a bucket's refill_ms must not be 0")]
    ZeroRefill,
    /// The timer could not be made.
    #[error("creating a timer")]
    Timer(#[source] io::Error),
}

/// A bucket at work. Time is given to it, in nanoseconds since its creation, so that it is tested without a
/// clock.
#[derive(Clone, Copy, Debug)]
struct TokenBucket {
    size: i128,
    refill_ns: i128,
    /// Negative after a request larger than the bucket.
    level: i128,
    burst: i128,
    /// The time up to which tokens were credited.
    credited: i128,
}

impl TokenBucket {
    fn new(bucket: Bucket) -> Result<Self, RateLimitError> {
        if bucket.size == 0 {
            return Err(RateLimitError::ZeroSize);
        }
        if bucket.refill_ms == 0 {
            return Err(RateLimitError::ZeroRefill);
        }
        let size = i128::from(bucket.size);
        Ok(Self {
            size,
            refill_ns: i128::from(bucket.refill_ms) * 1_000_000,
            level: size,
            burst: i128::from(bucket.initial_burst),
            credited: 0,
        })
    }

    /// Credits the tokens that are due at `now`.
    ///
    /// All factors fit 64 bits (times: 2^63 ns are 292 years; refill_ns: 84), so no product overflows 128.
    fn refill(&mut self, now: i128) {
        let elapsed = (now - self.credited).max(0);
        let missing = self.size - self.level;
        let due = elapsed.saturating_mul(self.size) / self.refill_ns;
        if due >= missing {
            self.level = self.size;
            self.credited = self.credited.max(now);
        } else {
            self.level += due;
            // Rounded up: the fraction of a token that has not been credited is kept as time, never doubled.
            self.credited += self.time_for(due);
        }
    }

    /// How long `tokens` take to come in, rounded up.
    fn time_for(&self, tokens: i128) -> i128 {
        (tokens.saturating_mul(self.refill_ns)).saturating_add(self.size - 1) / self.size
    }

    /// How long a request for `tokens` has to wait from `now`. Call [`refill`](Self::refill) first.
    fn wait(&self, tokens: i128, now: i128) -> Option<i128> {
        let missing = tokens.min(self.size) - self.level;
        if missing <= 0 || tokens <= self.level + self.burst {
            return None;
        }
        Some((self.credited + self.time_for(missing) - now).max(1))
    }

    fn take(&mut self, tokens: i128) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.level -= tokens - from_burst;
    }
}

/// Both buckets of one direction, with the timer that says when to go on.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    timer: Option<TimerFd>,
    start: Instant,
    blocked: bool,
}

impl RateLimiter {
    /// A limiter with full buckets. Without limits it owns no timer and admits everything.
    ///
    /// # Errors
    /// When a bucket makes no sense, or its timer cannot be made.
    pub fn new(limits: RateLimits) -> Result<Self, RateLimitError> {
        let bytes = limits.bytes.map(TokenBucket::new).transpose()?;
        let operations = limits.operations.map(TokenBucket::new).transpose()?;
        let timer = if bytes.is_some() || operations.is_some() {
            let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags);
            Some(timer.map_err(|errno| RateLimitError::Timer(errno.into()))?)
        } else {
            None
        };
        Ok(Self { bytes, operations, timer, start: Instant::now(), blocked: false })
    }

    /// The timer to poll for reading; call [`timer_expired`](Self::timer_expired) when it is ready.
    pub fn timer_fd(&self) -> Option<RawFd> {
        self.timer.as_ref().map(|timer| timer.as_fd().as_raw_fd())
    }

    /// Asks for one operation of so many bytes. When the answer is no, nothing was taken, the timer is set,
    /// and the answer stays no until the timer has expired.
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn admit(&mut self, bytes: u64) -> io::Result<bool> {
        if self.timer.is_none() {
            return Ok(true);
        }
        if self.blocked {
            return Ok(false);
        }
        let now = i128::try_from(self.start.elapsed().as_nanos()).unwrap_or(i128::from(i64::MAX));
        match self.take(bytes, now) {
            None => Ok(true),
            Some(wait) => {
                let wait = Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX));
                if let Some(timer) = &self.timer {
                    let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
                    timer.set(expiration, TimerSetTimeFlags::empty())?;
                }
                self.blocked = true;
                Ok(false)
            }
        }
    }

    /// The timer's descriptor is ready (or was said to be): requests may be tried again.
    pub fn timer_expired(&mut self) {
        // Nothing to read means that the event was spurious; then the time is not up yet.
        if self.timer.as_ref().is_some_and(|timer| timer.wait().is_ok()) {
            self.blocked = false;
        }
    }

    /// Whether the last request was put off and its time is not up.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Takes from both buckets or from none; how long to wait for both, if at all.
    fn take(&mut self, bytes: u64, now: i128) -> Option<i128> {
        let mut requests = [(&mut self.bytes, i128::from(bytes)), (&mut self.operations, 1)];
        let mut wait = None;
        for (bucket, tokens) in requests.iter_mut().filter_map(|(b, t)| b.as_mut().map(|b| (b, *t))) {
            bucket.refill(now);
            wait = wait.max(bucket.wait(tokens, now));
        }
        if wait.is_none() {
            for (bucket, tokens) in requests {
                if let Some(bucket) = bucket {
                    bucket.take(tokens);
                }
            }
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: i128 = 1_000_000_000;

    fn limiter(bytes: Option<Bucket>, operations: Option<Bucket>) -> RateLimiter {
        RateLimiter::new(RateLimits { bytes, operations }).unwrap()
    }

    fn bucket(size: u64, refill_ms: u64, initial_burst: u64) -> Bucket {
        Bucket { size, refill_ms, initial_burst }
    }

    #[test]
    fn nothing_to_limit_needs_no_timer() {
        let mut free = limiter(None, None);
        assert_eq!(free.timer_fd(), None);
        assert!((0..1000).all(|_| free.admit(u64::MAX).unwrap()));
    }

    #[test]
    fn senseless_buckets_are_refused() {
        let limits = |bucket| RateLimits { bytes: Some(bucket), operations: None };
        assert!(matches!(RateLimiter::new(limits(bucket(0, 1, 0))), Err(RateLimitError::ZeroSize)));
        assert!(matches!(RateLimiter::new(limits(bucket(1, 0, 0))), Err(RateLimitError::ZeroRefill)));
    }

    #[test]
    fn a_refused_request_takes_from_neither_bucket() {
        let mut both = limiter(Some(bucket(100, 1000, 0)), Some(bucket(1, 1000, 0)));
        assert_eq!(both.take(10, 0), None);
        assert!(both.take(10, 0).is_some());
        assert_eq!(both.bytes.unwrap().level, 90);
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_in_debt() {
        let mut limited = limiter(Some(bucket(100, 1000, 0)), None);
        assert_eq!(limited.take(1000, 0), None);
        // 900 in debt, and a full bucket again after another 100.
        assert_eq!(limited.take(1000, SECOND), Some(9 * SECOND));
        assert_eq!(limited.take(1000, 10 * SECOND), None);
    }

    #[test]
    fn the_initial_burst_is_there_once() {
        let mut limited = limiter(None, Some(bucket(1, 1000, 5)));
        assert_eq!((0..10).take_while(|_| limited.take(0, 0).is_none()).count(), 6);
        assert_eq!((0..10).take_while(|_| limited.take(0, 100 * SECOND).is_none()).count(), 1);
    }

    #[test]
    fn the_timer_says_when_to_go_on() {
        let mut limited = limiter(None, Some(bucket(1, 20, 0)));
        assert!(limited.admit(0).unwrap());
        assert!(!limited.admit(0).unwrap());
        limited.timer_expired();
        assert!(limited.is_blocked(), "a spurious event must not unblock");
        let mut poll = [libc::pollfd { fd: limited.timer_fd().unwrap(), events: libc::POLLIN, revents: 0 }];
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(poll.as_mut_ptr(), 1, 5000) }, 1);
        limited.timer_expired();
        assert!(limited.admit(0).unwrap());
    }

    proptest! {
        /// Whatever the pattern of requests, no more passes than the bucket, its burst, what came in since,
        /// and one overdraft; and what is told to wait passes when that time is up.
        #[test]
        fn the_rate_holds(
            size in 1u64..1 << 40, refill_ms in 1u64..1 << 40, burst in 0u64..1 << 40,
            steps in proptest::collection::vec((0i128..SECOND * 1000, 0u64..1 << 34), 1..60),
        ) {
            let mut limited = limiter(Some(bucket(size, refill_ms, burst)), None);
            let (mut now, mut passed, mut largest) = (0i128, 0i128, 0i128);
            for (pause, bytes) in steps {
                now += pause;
                largest = largest.max(i128::from(bytes));
                if let Some(wait) = limited.take(bytes, now) {
                    prop_assert!(wait > 0);
                    now += wait;
                    prop_assert_eq!(limited.take(bytes, now), None, "after {} ns", wait);
                }
                passed += i128::from(bytes);
                let came_in = now * i128::from(size) / (i128::from(refill_ms) * 1_000_000);
                prop_assert!(passed <= i128::from(size) + i128::from(burst) + came_in + largest + 1);
            }
        }

        /// No value makes it panic.
        #[test]
        fn extremes_are_harmless(size in 1u64.., refill_ms in 1u64.., burst: u64, bytes: u64, now in 0..i128::from(i64::MAX)) {
            let mut limited = limiter(Some(bucket(size, refill_ms, burst)), Some(bucket(1, refill_ms, burst)));
            for step in 0..4 {
                limited.take(bytes, now / 4 * step);
            }
        }
    }
}
