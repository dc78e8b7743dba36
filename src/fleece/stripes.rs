//! Striped locks by which one first writer of a chunk copies its old content while the others wait.

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Bytes of disk that share a stripe: one request of 1 MiB needs at most five.
const STRIPE_BYTES: u64 = 256 << 10;
/// Number of stripes. Two requests meet by chance once in this many.
const STRIPES: u64 = 2048;
/// Who waits for a stripe looks up so often whether there is still a reason to.
const LOOK_UP: Duration = Duration::from_millis(20);

/// The stripes of one layer (lock rank 4).
///
/// Who holds one may be in a call on the store that hangs, and then comes back late or never. So others wait as long as
/// they want to, and not behind one call on the store that takes longer than such a call may. Nothing else counts: an
/// image that is slow, or many calls one after the other, say nothing of the store.
#[derive(Debug)]
pub(super) struct Stripes {
    stripes: Vec<Stripe>,
    /// What times are counted from.
    start: Instant,
}

#[derive(Debug)]
struct Stripe {
    lock: Mutex<()>,
    /// Since when the holder waits for the store, in milliseconds; 0 where it does not.
    asked_ms: AtomicU32,
    /// Calls on the store that took too long; wraps. Who waited for one does not wait for the next one, too.
    hung: AtomicU32,
}

/// A stripe that is claimed.
struct Held<'a> {
    stripe: &'a Stripe,
    _guard: MutexGuard<'a, ()>,
}

/// What was claimed, until it is dropped.
pub(super) struct Claim<'a> {
    start: Instant,
    first: Option<Held<'a>>,
    others: Vec<Held<'a>>,
}

impl Claim<'_> {
    /// The holder makes a call on the store; what it returns, and whether the call took too long, is said by `call`.
    pub(super) fn ask<T>(&self, call: impl FnOnce() -> (T, bool)) -> T {
        let now_ms = since(self.start).max(1);
        self.held().for_each(|stripe| stripe.asked_ms.store(now_ms, Ordering::Relaxed));
        let (result, hung) = call();
        for stripe in self.held() {
            stripe.hung.fetch_add(u32::from(hung), Ordering::Relaxed);
            stripe.asked_ms.store(0, Ordering::Relaxed);
        }
        result
    }

    fn held(&self) -> impl Iterator<Item = &Stripe> {
        self.first.iter().chain(&self.others).map(|held| held.stripe)
    }
}

/// Milliseconds since `start`; wraps.
fn since(start: Instant) -> u32 {
    start.elapsed().as_millis() as u32
}

impl Stripes {
    pub(super) fn new() -> Self {
        let stripe = || Stripe { lock: Mutex::new(()), asked_ms: AtomicU32::new(0), hung: AtomicU32::new(0) };
        Stripes { stripes: (0..STRIPES).map(|_| stripe()).collect(), start: Instant::now() }
    }

    /// Claims every chunk that `offset..offset + len` touches. None: somebody holds one in a call on the store that took
    /// longer than `limit`, or `go_on` said so meanwhile.
    ///
    /// Taken in index order and each once, so that two claims never wait for each other in a circle.
    pub(super) fn claim(
        &self,
        offset: u64,
        len: u64,
        limit: Duration,
        mut go_on: impl FnMut() -> bool,
    ) -> Option<Claim<'_>> {
        let start = self.start;
        let (first, last) = (offset / STRIPE_BYTES, (offset + len.max(1) - 1) / STRIPE_BYTES);
        if first == last {
            let only = self.lock((first % STRIPES) as usize, limit, &mut go_on)?;
            return Some(Claim { start, first: Some(only), others: Vec::new() });
        }
        let mut indices: Vec<usize> =
            (first..=last).take(STRIPES as usize).map(|group| (group % STRIPES) as usize).collect();
        indices.sort_unstable();
        let others: Option<Vec<_>> = indices.into_iter().map(|index| self.lock(index, limit, &mut go_on)).collect();
        Some(Claim { start, first: None, others: others? })
    }

    fn lock(&self, index: usize, limit: Duration, go_on: &mut impl FnMut() -> bool) -> Option<Held<'_>> {
        let stripe = self.stripes.get(index)?;
        let hung = stripe.hung.load(Ordering::Relaxed);
        loop {
            let guard = stripe.lock.try_lock_for(LOOK_UP);
            if stripe.hung.load(Ordering::Relaxed) != hung {
                return None;
            }
            if let Some(guard) = guard {
                // Of a holder that panicked, if not 0.
                stripe.asked_ms.store(0, Ordering::Relaxed);
                return Some(Held { stripe, _guard: guard });
            }
            let asked_ms = stripe.asked_ms.load(Ordering::Relaxed);
            let hangs = asked_ms != 0 && u128::from(since(self.start).wrapping_sub(asked_ms)) >= limit.as_millis();
            if hangs || !go_on() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_claim_takes_each_stripe_once_also_across_the_wrap() {
        let stripes = Stripes::new();
        let count = |offset, len| stripes.claim(offset, len, LONG, || false).unwrap().held().count();
        assert_eq!(count(0, 1), 1);
        assert_eq!(count(STRIPE_BYTES - 1, 2), 2);
        assert_eq!(count(STRIPE_BYTES * (STRIPES - 1), 2 * STRIPE_BYTES), 2);
        assert_eq!(count(0, STRIPE_BYTES * STRIPES * 3), STRIPES as usize);
    }

    #[test]
    fn who_has_no_reason_to_wait_any_more_does_not() {
        let stripes = Stripes::new();
        let held = stripes.claim(0, 1, LONG, || false).unwrap();
        let mut looks = 0;
        let mut twice = || {
            looks += 1;
            looks < 2
        };
        assert!(stripes.claim(STRIPE_BYTES - 1, 2, LONG, &mut twice).is_none());
        assert_eq!(looks, 2);
        assert!(stripes.claim(STRIPE_BYTES, 1, LONG, || false).is_some(), "nothing was kept");
        drop(held);
        assert!(stripes.claim(0, 1, LONG, || false).is_some());
    }

    /// What counts is one call on the store: not what else the holder does, nor many calls.
    #[test]
    fn nobody_waits_behind_a_call_that_takes_too_long_nor_gives_up_for_less() {
        let stripes = Stripes::new();
        let looks = |most: usize| {
            let mut looks = 0;
            move || {
                looks += 1;
                looks < most
            }
        };
        let limit = LOOK_UP * 3;
        let held = stripes.claim(0, 1, limit, || false).unwrap();
        assert!(stripes.claim(0, 1, Duration::ZERO, looks(3)).is_none());
        let asked = Instant::now();
        held.ask(|| (assert!(stripes.claim(0, 1, limit, || true).is_none()), false));
        assert!(asked.elapsed() + Duration::from_millis(2) >= limit);
        let (told, tells) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let go_on = || told.send(()).is_ok();
                stripes.claim(0, 1, limit, go_on).is_some()
            });
            tells.recv().unwrap();
            for _ in 0..6 {
                held.ask(|| (std::thread::sleep(LOOK_UP), false));
            }
            drop(held);
            assert!(waits.join().unwrap(), "no call took too long");
        });
    }

    #[test]
    fn who_waited_for_a_call_that_took_too_long_makes_none_itself() {
        let stripes = Stripes::new();
        let held = stripes.claim(0, 1, LONG, || false).unwrap();
        let (told, tells) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| stripes.claim(0, 1, LONG, || told.send(()).is_ok()).is_some());
            tells.recv().unwrap();
            held.ask(|| ((), true));
            drop(held);
            assert!(!waits.join().unwrap());
        });
        assert!(stripes.claim(0, 1, LONG, || false).is_some(), "who comes later tries");
    }
}
