//! Synchronisation primitives of the core: parking_lot's and std's in the product, shuttle's under
//! `--features shuttle` and loom's under `--cfg loom`, so that the concurrency tests drive the very code that ships.
//!
//! Lock ranks, taken in this order only (a lock is never waited for while one further down is held):
//! 1. control (one snapshot, checkpoint or consumer operation at a time)
//! 2. a disk's `reaping` (folding and closing), then its `disarming` (a round of disarming, resize, close)
//! 3. scanning live disks for volumes, which reads images; then gates of disks, in name order; in one, holds of watches
//! 4. a layer's stripes, in index order
//! 5. chain edit, noting a loss (`fleece::lost`); `arming` of a disk's regions, which nobody waits for in a pin of a
//!    region, and writers do not in a gate or stripe; then the sidecar's writer
//! 6. everything else (leaf locks, held for a few instructions and never across I/O)

#[cfg(not(any(feature = "shuttle", loom)))]
mod imp {
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    pub use std::sync::atomic;
    pub use std::thread;

    /// An immutable value that is replaced as a whole; readers take no lock.
    #[derive(Debug)]
    pub struct Published<T>(arc_swap::ArcSwap<T>);

    impl<T> Published<T> {
        /// Starts with `value`.
        pub fn new(value: T) -> Self {
            Published(arc_swap::ArcSwap::from_pointee(value))
        }

        /// The value of now, kept alive while the caller holds it.
        pub fn load(&self) -> std::sync::Arc<T> {
            self.0.load_full()
        }

        /// The value of now for a moment: without a write to memory that threads share.
        pub fn peek(&self) -> impl std::ops::Deref<Target = std::sync::Arc<T>> + '_ {
            self.0.load()
        }

        /// Puts `value` in its place for every later [`Published::load`].
        pub fn store(&self, value: std::sync::Arc<T>) {
            self.0.store(value);
        }
    }
}

#[cfg(any(feature = "shuttle", loom))]
mod imp {
    #[cfg(loom)]
    use loom as explorer;
    #[cfg(not(loom))]
    use shuttle as explorer;

    pub use explorer::sync::atomic;
    pub use explorer::thread;
    use std::ops::{Deref, DerefMut};
    use std::sync::Arc;

    /// The explorer's mutex with parking_lot's signatures (a poisoned lock is a failed test).
    #[derive(Debug, Default)]
    pub struct Mutex<T>(explorer::sync::Mutex<T>);
    /// See [`Mutex`].
    pub type MutexGuard<'a, T> = explorer::sync::MutexGuard<'a, T>;

    #[allow(clippy::unwrap_used)]
    impl<T> Mutex<T> {
        /// A free lock around `value`.
        pub fn new(value: T) -> Self {
            Mutex(explorer::sync::Mutex::new(value))
        }
        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
        /// The lock, however long it takes: time stands still.
        pub fn try_lock_for(&self, _patience: std::time::Duration) -> Option<MutexGuard<'_, T>> {
            Some(self.lock())
        }
        /// The lock, where nobody holds it.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }

    /// The explorer's reader-writer lock with parking_lot's signatures.
    #[derive(Debug, Default)]
    pub struct RwLock<T>(explorer::sync::RwLock<T>);
    /// See [`RwLock`].
    pub struct RwLockReadGuard<'a, T>(explorer::sync::RwLockReadGuard<'a, T>);
    /// See [`RwLock`].
    pub struct RwLockWriteGuard<'a, T>(explorer::sync::RwLockWriteGuard<'a, T>);

    impl<T> RwLock<T> {
        /// A free lock around `value`.
        pub fn new(value: T) -> Self {
            RwLock(explorer::sync::RwLock::new(value))
        }
        /// Waits for a shared hold.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            RwLockReadGuard(self.0.read().unwrap())
        }
        /// Waits for the exclusive hold.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            RwLockWriteGuard(self.0.write().unwrap())
        }
        /// The exclusive hold, however long it takes: time stands still.
        pub fn try_write_for(&self, _patience: std::time::Duration) -> Option<RwLockWriteGuard<'_, T>> {
            Some(self.write())
        }
    }
    impl<T> Deref for RwLockReadGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.0
        }
    }
    impl<T> Deref for RwLockWriteGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.0
        }
    }
    impl<T> DerefMut for RwLockWriteGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.0
        }
    }

    /// See the product's `Published`; a lock stands in for the atomic pointer.
    #[derive(Debug)]
    pub struct Published<T>(Mutex<Arc<T>>);
    impl<T> Published<T> {
        /// Starts with `value`.
        pub fn new(value: T) -> Self {
            Published(Mutex::new(Arc::new(value)))
        }
        /// The value of now.
        pub fn load(&self) -> Arc<T> {
            self.0.lock().clone()
        }
        /// The value of now for a moment.
        pub fn peek(&self) -> Box<Arc<T>> {
            Box::new(self.load())
        }
        /// Puts `value` in its place.
        pub fn store(&self, value: Arc<T>) {
            *self.0.lock() = value;
        }
    }
}

pub use imp::*;

/// A full (sequentially consistent) fence: stores before it are seen by everybody who passed a later one.
///
/// The optimistic questions of the core (`fleece::view`) and the preserve path (`fleece::disk`) rely on it on both
/// sides: release and acquire alone would let the re-check be answered from before the image was read.
pub fn full_fence() {
    atomic::fence(atomic::Ordering::SeqCst);
}
