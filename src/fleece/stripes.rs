//! Striped locks by which one first writer of a chunk copies its old content while the others wait.

use crate::sync::{Mutex, MutexGuard};

/// Bytes of disk that share a stripe: one request of 1 MiB needs at most five.
const STRIPE_BYTES: u64 = 256 << 10;
/// Number of stripes. Two requests meet by chance once in this many.
const STRIPES: u64 = 256;

/// The stripes of one disk (lock rank 4).
#[derive(Debug)]
pub(super) struct Stripes(Vec<Mutex<()>>);

impl Stripes {
    pub(super) fn new() -> Self {
        Stripes((0..STRIPES).map(|_| Mutex::new(())).collect())
    }

    /// Claims every chunk that `offset..offset + len` touches. The guards let go when dropped.
    ///
    /// Taken in index order and each once, so that two claims never wait for each other in a circle.
    pub(super) fn claim(&self, offset: u64, len: u64) -> Vec<MutexGuard<'_, ()>> {
        let first = offset / STRIPE_BYTES;
        let last = (offset + len.max(1) - 1) / STRIPE_BYTES;
        let mut indices: Vec<usize> =
            (first..=last).take(STRIPES as usize).map(|group| (group % STRIPES) as usize).collect();
        indices.sort_unstable();
        indices.into_iter().map(|index| self.0[index].lock()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_takes_each_stripe_once_also_across_the_wrap() {
        let stripes = Stripes::new();
        assert_eq!(stripes.claim(0, 1).len(), 1);
        assert_eq!(stripes.claim(STRIPE_BYTES - 1, 2).len(), 2);
        assert_eq!(stripes.claim(STRIPE_BYTES * (STRIPES - 1), 2 * STRIPE_BYTES).len(), 2);
        assert_eq!(stripes.claim(0, STRIPE_BYTES * STRIPES * 3).len(), STRIPES as usize);
    }
}
