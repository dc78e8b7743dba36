//! A lock over ranges of a disk.
//!
//! Invariant: no two holders' ranges overlap. Who waits holds no other range, so nobody waits for ever.

use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that are held.
#[derive(Debug, Default)]
pub struct RangeLock {
    /// By its start the end of each range.
    held: Mutex<BTreeMap<u64, u64>>,
    released: Condvar,
}

/// Holds a range until it is dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    start: u64,
}

impl RangeLock {
    /// Waits until nobody holds any part of `range` (not empty), and takes it.
    pub fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let mut held = self.held.lock();
        while held.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start) {
            self.released.wait(&mut held);
        }
        held.insert(range.start, range.end);
        RangeGuard { lock: self, start: range.start }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.held.lock().remove(&self.start);
        self.lock.released.notify_all();
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn ranges_that_overlap_exclude_each_other_and_others_do_not() {
        let lock = RangeLock::default();
        let _first = lock.lock(0..10);
        let _behind = lock.lock(10..20);
        drop(lock.lock(20..21));
        let holders: Vec<AtomicU32> = (0..64).map(|_| AtomicU32::new(0)).collect();
        let lock = RangeLock::default();
        std::thread::scope(|scope| {
            for seed in 0..4u64 {
                let (lock, holders) = (&lock, &holders);
                scope.spawn(move || {
                    let mut random = seed * 7919 + 1;
                    for _ in 0..5000 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let start = random >> 33 & 63;
                        let end = (start + 1 + (random >> 50 & 15)).min(64);
                        let _held = lock.lock(start..end);
                        for one in &holders[start as usize..end as usize] {
                            assert_eq!(one.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        std::thread::yield_now();
                        for one in &holders[start as usize..end as usize] {
                            one.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(lock.held.lock().is_empty());
    }
}
