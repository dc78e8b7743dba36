//! What is made at open and used until release: texts, so that a reader sees one state from beginning to end, and
//! volumes of live disks, so that a file whose table was changed stays stale although another open finds the new table.

use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// What is held for open files, by inode and file handle.
pub struct Held<T: ?Sized> {
    next: AtomicU64,
    held: RwLock<HashMap<(u64, u64), Arc<T>>>,
}

impl<T: ?Sized> Default for Held<T> {
    /// Handles start at a random number: those of an earlier process of the same mount must not name ours.
    fn default() -> Self {
        let (random, _) = Uuid::new_v4().as_u64_pair();
        Held { next: AtomicU64::new(random | 1 << 63), held: RwLock::default() }
    }
}

impl<T: ?Sized> Held<T> {
    /// Keeps `value` for an open of `ino`; the handle is not 0.
    pub fn hold(&self, ino: u64, value: Arc<T>) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed).max(1);
        self.held.write().insert((ino, handle), value);
        handle
    }

    /// What is behind a handle, where this process made it.
    pub fn get(&self, ino: u64, handle: u64) -> Option<Arc<T>> {
        self.held.read().get(&(ino, handle)).cloned()
    }

    /// Lets go of what is behind a handle, and gives it.
    pub fn take(&self, ino: u64, handle: u64) -> Option<Arc<T>> {
        self.held.write().remove(&(ino, handle))
    }

    /// Count of what is held.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.held.read().len()
    }
}
