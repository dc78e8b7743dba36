//! Striped locks by which one first writer of a chunk copies its old content while the others wait.

use crate::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// Bytes of disk that share a stripe: one request of 1 MiB needs at most five.
const STRIPE_BYTES: u64 = 256 << 10;
/// Number of stripes. Two requests meet by chance once in this many.
const STRIPES: u64 = 2048;
/// Who waits for a stripe looks up so often whether there is still a reason to.
const LOOK_UP: Duration = Duration::from_millis(20);

/// The stripes of one layer (lock rank 4).
///
/// Who holds one may be in a call that hangs, and then comes back late or never: others wait as long as they want to.
#[derive(Debug)]
pub(super) struct Stripes(Vec<Mutex<()>>);

/// What was claimed, until it is dropped.
pub(super) struct Claim<'a> {
    _first: Option<MutexGuard<'a, ()>>,
    _others: Vec<MutexGuard<'a, ()>>,
}

impl Stripes {
    pub(super) fn new() -> Self {
        Stripes((0..STRIPES).map(|_| Mutex::new(())).collect())
    }

    /// Claims every chunk that `offset..offset + len` touches. None: `go_on` said so while somebody else held one.
    ///
    /// Taken in index order and each once, so that two claims never wait for each other in a circle.
    pub(super) fn claim(&self, offset: u64, len: u64, mut go_on: impl FnMut() -> bool) -> Option<Claim<'_>> {
        let (first, last) = (offset / STRIPE_BYTES, (offset + len.max(1) - 1) / STRIPE_BYTES);
        if first == last {
            let only = self.lock((first % STRIPES) as usize, &mut go_on)?;
            return Some(Claim { _first: Some(only), _others: Vec::new() });
        }
        let mut indices: Vec<usize> =
            (first..=last).take(STRIPES as usize).map(|group| (group % STRIPES) as usize).collect();
        indices.sort_unstable();
        let others: Option<Vec<_>> = indices.into_iter().map(|index| self.lock(index, &mut go_on)).collect();
        Some(Claim { _first: None, _others: others? })
    }

    fn lock(&self, index: usize, go_on: &mut impl FnMut() -> bool) -> Option<MutexGuard<'_, ()>> {
        let stripe = self.0.get(index)?;
        loop {
            if let Some(guard) = stripe.try_lock_for(LOOK_UP) {
                return Some(guard);
            }
            if !go_on() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_takes_each_stripe_once_also_across_the_wrap() {
        let stripes = Stripes::new();
        let count = |offset, len| {
            let claim = stripes.claim(offset, len, || false).unwrap();
            claim._others.len() + usize::from(claim._first.is_some())
        };
        assert_eq!(count(0, 1), 1);
        assert_eq!(count(STRIPE_BYTES - 1, 2), 2);
        assert_eq!(count(STRIPE_BYTES * (STRIPES - 1), 2 * STRIPE_BYTES), 2);
        assert_eq!(count(0, STRIPE_BYTES * STRIPES * 3), STRIPES as usize);
    }

    #[test]
    fn who_has_no_reason_to_wait_any_more_does_not() {
        let stripes = Stripes::new();
        let held = stripes.claim(0, 1, || false).unwrap();
        let mut looks = 0;
        let mut twice = || {
            looks += 1;
            looks < 2
        };
        assert!(stripes.claim(STRIPE_BYTES - 1, 2, &mut twice).is_none());
        assert_eq!(looks, 2);
        assert!(stripes.claim(STRIPE_BYTES, 1, || false).is_some(), "nothing was kept");
        drop(held);
        assert!(stripes.claim(0, 1, || false).is_some());
    }
}
